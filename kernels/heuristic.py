"""The config to run when nothing was measured or modelled: tier 7 of the ladder, a rule of a few lines."""

from __future__ import annotations

import math
from collections.abc import Callable

from kernels.backward_heuristic import backward_misfit
from kernels.variants import candidates
from kernels.variants.common import next_power_of_2
from tuning_db.model import BACKWARD, Config, Device, Problem, itemsize

WHOLE_ROW_BYTES = 2**15
"""A row up to here is one program's: beyond, several programs a row keep more bytes in flight (H100, bf16: 1.2 × at 1 × 32768 columns)."""

NARROW_ROW_BYTES = 2**10
"""Rows up to here go several to a program, as soon as there are enough to fill tiles."""

TILE_BYTES = 2**13
"""What a program of `multi_row` takes: 32 bytes a thread in 8 warps, two loads in flight."""


def heuristic_config(problem: Problem, device: Device, allowed: Callable[[Config], bool] | None = None) -> Config | None:
    """The legal (and allowed) config nearest to the rule's wishes, or None where no variant serves the problem."""
    legal = [config for config in candidates(problem, device) if allowed is None or allowed(config)]
    misfit = backward_misfit if problem.op == BACKWARD else _misfit
    return min(legal, key=lambda config: (*misfit(config, problem, device), str(config)), default=None)


def _misfit(config: Config, problem: Problem, device: Device) -> tuple[int, float]:
    """How far a config is from what the rule wants: the variant's rank first, then octaves of tile and bytes a thread."""
    params = config.params
    size = itemsize(problem.x_dtype)
    row_bytes = next_power_of_2(problem.cols) * size
    threads = int(params["num_warps"]) * device.warp_size
    filled = problem.rows * row_bytes >= 2**16 * device.sm_count  # every SM has as much as it can hold in registers
    if config.variant == "multi_row":
        tile = int(params["rows_per_program"]) * row_bytes
        share = problem.rows * row_bytes / (2 * device.sm_count)  # a program for each SM comes before full tiles
        wanted = row_bytes <= NARROW_ROW_BYTES and problem.rows > device.sm_count
        return (0 if wanted else 2, _octaves(tile / min(TILE_BYTES, max(share, 2**10))) + _octaves(tile / threads / 32))
    if config.variant == "whole_row":
        wanted = row_bytes <= WHOLE_ROW_BYTES or (filled and row_bytes <= 2 * WHOLE_ROW_BYTES)
        busy = problem.rows > device.sm_count and row_bytes > 2**13  # several programs an SM: registers are scarce
        misfit = _octaves(row_bytes / threads / (64 if busy else 32)) + 0.1 * (bool(params["weight_first"]) is busy)
        return (1 if wanted else 4, misfit)
    if config.variant == "split_row":
        chunk = int(params["block_cols"]) * int(params["max_pieces"]) * size
        wanted_chunk = 2**13 if problem.rows * row_bytes > 2**20 else 2**12
        misfit = _octaves(chunk / wanted_chunk) + _octaves(chunk / threads / (64 if filled else 32))
        return (1 if row_bytes > WHOLE_ROW_BYTES else 5, misfit + 0.1 * (bool(params["weight_first"]) is filled))
    if config.variant == "cluster_row":
        wanted = problem.rows <= 32 and WHOLE_ROW_BYTES <= row_bytes <= 2 * WHOLE_ROW_BYTES
        return (0 if wanted else 5, _octaves(int(params["cluster"]) / 8) + _octaves(int(params["num_warps"]) / 4))
    if config.variant == "looped":
        block = int(params["block_cols"]) * size
        return (3, _octaves(block / 2**14) + _octaves(block / threads / 32))
    # strided_axis: rows side by side for whole sectors, then as tall a tile as there is.
    inner, tall = int(params["block_inner"]), min(int(params["block_cols"]), problem.cols)
    return (0, _octaves(inner * size / 64) + _octaves(tall / 512))


def _octaves(ratio: float) -> float:
    return abs(math.log2(ratio))
