"""What tier 7 of the ladder wants of a backward's config: a rule of a few lines, not yet held against a sweep."""

from __future__ import annotations

import math

from kernels.variants.common import next_power_of_2
from tuning_db.model import Config, Device, Problem, itemsize

NARROW_ROW_BYTES = 2**10
"""Rows up to here go several to a program, as in the forward."""

WARPS_PER_SM = 16
"""One program of 16 warps an SM, or as many smaller ones: 0.96 of the floor at 4096 and 8192 columns of bf16 on an H100 (prototype)."""

ELEMENTS_PER_THREAD = 8
"""Of a row that one program holds; fewer warps than that asks for, where it is more than WARPS_PER_SM."""

CHUNK_COLS = 4096
"""Of a row that programs share: 16 elements a thread in 8 warps, two programs an SM."""


def backward_misfit(config: Config, problem: Problem, device: Device) -> tuple[int, float]:
    """How far a config is from what the rule wants: the variant's rank first, then octaves of warps an SM and elements a thread."""
    params = config.params
    row = next_power_of_2(problem.cols)
    threads = int(params["num_warps"]) * device.warp_size
    warps = 2 * _octaves(int(params["num_warps"]) * int(params["programs_per_sm"]) / WARPS_PER_SM)
    stages = abs(int(params.get("stages", 3)) - 3) / 4
    if config.variant == "backward_multi_row":
        wanted = row * itemsize(problem.x_dtype) <= NARROW_ROW_BYTES and problem.rows > device.sm_count
        elements = int(params["rows_per_program"]) * row / threads
        return (0 if wanted else 2, warps + stages + _octaves(elements / ELEMENTS_PER_THREAD))
    if config.variant == "backward_whole_row":
        return (1, warps + stages + _octaves(row / threads / ELEMENTS_PER_THREAD))
    return (3, warps + _octaves(int(params["block_cols"]) / CHUNK_COLS))


def _octaves(ratio: float) -> float:
    return abs(math.log2(ratio))
