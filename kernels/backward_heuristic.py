"""What tier 7 of the ladder wants of a backward's config: a rule of a few lines.

Its constants are fitted to an H100's sweep of bf16, where `python -m tuner regret` finds it 0.7 % slower than the fastest config in the
geometric mean and 5.8 % at p95; on an H200, which the fit never saw, 1.8 % and 12.1 % (at 32768x2048).
"""

from __future__ import annotations

import math

from kernels.variants.common import next_power_of_2, octaves
from tuning_db.model import Config, Device, Problem, itemsize

NARROW_ROW_BYTES = 2**11
"""Rows up to here go several to a program (H100: up to 3 % at 1024 columns of bf16)."""

ROWS_BYTES_PER_SM = 2**13
"""Of whole rows in work, with as many again under way in each stage (H100: half as much costs 23 % at 1024 and 31 % at 2048 columns)."""

PROGRAM_WARPS = 4
"""Of a program that holds one row: more have too little each between two sums (H100: 8 or 16 cost 1 to 2 % at 4096 columns)."""

MOST_THREAD_ELEMENTS = 32
"""Of one row, rounded up to a power of two: beyond there are more warps (H100: four cost 6 % at 5120 columns)."""

TILE_WARPS_PER_SM = 8
"""Of programs that hold several rows (H100: 16 cost 17 % at 256 columns)."""

SHARING_WARPS_PER_SM = 16
"""Of programs that share rows, several to an SM: one waits while another works (H100: one of 16 warps costs 24 %)."""

TILE_THREAD_ELEMENTS = 32
"""Of the several rows that one program holds."""

STAGES = 3
"""Rows under way and in work (H100: fewer cost 4 to 41 % from 4096 to 8192 columns)."""

CHUNK_BYTES = 2**12
"""Of a row that programs share, at 32 bytes a thread (H100: twice as much costs 4 to 7 % from 16384 columns)."""

SHARED_STAGES = 2
"""Chunks under way and in work, besides the one held (H100: one more costs 1 to 4 %)."""


def backward_misfit(config: Config, problem: Problem, device: Device) -> tuple[int, float]:
    """How far a config is from what the rule wants: the variant's rank first, then octaves of what an SM, a program and a thread have."""
    params = config.params
    row = next_power_of_2(problem.cols)
    num_warps = int(params["num_warps"])
    threads = num_warps * device.warp_size
    warps = num_warps * int(params["programs_per_sm"])
    if config.variant == "backward_split_row":
        chunk = int(params["block_cols"]) * itemsize(problem.x_dtype)
        stages = abs(int(params["stages"]) - SHARED_STAGES) / 2
        return (3, stages + octaves(warps / SHARING_WARPS_PER_SM) + octaves(chunk / CHUNK_BYTES) + octaves(chunk / threads / 32))
    stages = abs(int(params["stages"]) - STAGES) / 2
    if config.variant == "backward_multi_row":
        wanted = row * itemsize(problem.x_dtype) <= NARROW_ROW_BYTES and problem.rows > device.sm_count
        tile = int(params["rows_per_program"]) * row
        misfit = 2 * octaves(warps / TILE_WARPS_PER_SM) + octaves(tile / threads / TILE_THREAD_ELEMENTS)
        return (0 if wanted else 2, stages + misfit + 0.1 * math.log2(num_warps))
    rows_bytes = int(params["programs_per_sm"]) * row * itemsize(problem.x_dtype)
    program_warps = max(PROGRAM_WARPS, row // (MOST_THREAD_ELEMENTS * device.warp_size))
    return (1, stages + octaves(rows_bytes / ROWS_BYTES_PER_SM) + octaves(num_warps / program_warps) + 0.1 * math.log2(num_warps))
