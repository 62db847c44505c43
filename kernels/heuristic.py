"""The config to run when nothing was measured or modelled: tier 7 of the ladder, a rule of a few lines.

Its constants are fitted to an H100's sweep alone. On the forward of the default workload `python -m tuner regret` finds it 0.8 % slower
than the fastest config in the geometric mean and 4.0 % at p95 on an H100, 1.2 % and 4.6 % on an H200.
"""

from __future__ import annotations

from collections.abc import Callable

from kernels.backward_heuristic import backward_misfit
from kernels.variants import candidates
from kernels.variants.common import next_power_of_2, octaves
from tuning_db.model import NO_WEIGHT, Config, Device, Problem, itemsize

SM_BYTES = 2**15
"""What an SM's programs hold at once at 32 bytes a thread. With more to do a thread takes 64 (H100: 7 % at 1024 x 4096 bf16)."""

PROGRAMS_PER_SM = 16
"""With more rows to an SM, short ones go several to a program (H100: 26 % at 4096 x 128 fp32)."""

NARROW_ROW_BYTES = 2**12
"""A row up to here is short (H100: several to a program gain 1 to 5 % at 4096 x 1024 to 2048 bf16, at most 1 % beyond)."""

HALF_WARP_BYTES = 2**8
"""A row up to here leaves half of a warp idle, 16 bytes a lane: several go to a program in any case (H100: 11 % at 1024 x 64 bf16)."""

WHOLE_ROW_BYTES = 2**15
"""A row up to here is one program's: beyond, several programs a row keep more bytes in flight (H100: 34 % at 16 x 32768 bf16)."""

SHARED_ROW_BYTES = 3 * 2**13
"""From here on programs share a row as well, once whole rows no longer fit the GPU at once (H100: 6 % at 1024 x 12288 bf16)."""

CHUNK_BYTES = 2**13
"""A program's share of a longer row (H100: half or twice as much costs up to 12 %)."""

CLUSTER_BYTES = 2**17
"""A row up to here fits a cluster at that share (H100: 7 % at 1 x 40000 bf16; nothing once programs have no SM to themselves)."""

LINE_BYTES = 2**7
"""Of L2. Strided rows go by lines once that makes tiles for every SM, else by half lines (H100: 13 % at 65536 x 4096 bf16)."""


def heuristic_config(problem: Problem, device: Device, allowed: Callable[[Config], bool] | None = None) -> Config | None:
    """The legal (and allowed) config nearest to the rule's wishes, or None where no variant serves the problem."""
    legal = [config for config in candidates(problem, device) if allowed is None or allowed(config)]
    misfit = backward_misfit if problem.is_backward else _misfit
    return min(legal, key=lambda config: (*misfit(config, problem, device), str(config)), default=None)


def _misfit(config: Config, problem: Problem, device: Device) -> tuple[int, float]:
    """How far a config is from what the rule wants: the variant's rank first, then octaves of tile and bytes a thread."""
    params = config.params
    size = itemsize(problem.x_dtype)
    row_bytes = next_power_of_2(problem.cols) * size
    threads = int(params["num_warps"]) * device.warp_size
    sm_bytes = problem.rows * row_bytes / device.sm_count
    full = sm_bytes > SM_BYTES
    thread_bytes = 64 if full else 32
    if config.variant == "multi_row":
        tile = int(params["rows_per_program"]) * row_bytes
        many = problem.rows > PROGRAMS_PER_SM * device.sm_count
        wanted = problem.rows > 1 and row_bytes <= (NARROW_ROW_BYTES if many else HALF_WARP_BYTES)
        return (0 if wanted else 2, octaves(tile / (2**12 if many else 2**11)) + octaves(threads / 128))
    if config.variant == "whole_row":
        misfit = octaves(row_bytes / threads / thread_bytes)
        return (1 if row_bytes <= WHOLE_ROW_BYTES else 4, misfit + 0.1 * (not params["weight_first"]))
    if config.variant == "split_row":
        chunk = int(params["block_cols"]) * int(params["max_pieces"]) * size
        wanted = row_bytes > WHOLE_ROW_BYTES or (problem.cols * size >= SHARED_ROW_BYTES and sm_bytes > 2 * SM_BYTES)
        misfit = octaves(chunk / CHUNK_BYTES) + octaves(chunk / threads / thread_bytes)
        weight_late = full or (problem.w_dtype != NO_WEIGHT and itemsize(problem.w_dtype) > size)  # registers are scarce
        return (0 if wanted else 5, misfit + 0.1 * (bool(params["weight_first"]) is weight_late))
    if config.variant == "cluster_row":
        cluster = max(8, row_bytes / CHUNK_BYTES)
        wanted = WHOLE_ROW_BYTES <= row_bytes <= CLUSTER_BYTES and problem.rows * cluster <= device.sm_count
        return (-1 if wanted else 5, octaves(int(params["cluster"]) / cluster) + octaves(threads / 128))
    if config.variant == "looped":
        block = int(params["block_cols"]) * size
        return (3, octaves(block / 2**14) + octaves(block / threads / 32))
    if config.variant == "strided_axis":  # rows side by side for whole lines, then as tall a tile as there is
        inner, tall = int(params["block_inner"]), min(int(params["block_cols"]), problem.cols)
        wide = problem.rows * size > 4 * device.sm_count * LINE_BYTES
        return (0, octaves(inner * size / (LINE_BYTES if wide else LINE_BYTES / 2)) + octaves(tall / 512))
    return (6, 0.0)  # a variant that the rule has never heard of
