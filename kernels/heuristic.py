"""The config to run when nothing was measured or modelled: tier 7 of the ladder, a rule of a few lines."""

from __future__ import annotations

from collections.abc import Callable

from kernels.variants import candidates
from tuning_db.model import Config, Device, Problem

TILE_ELEMENTS = 4096
"""Elements a program of `multi_row` takes: 32 a thread in 4 warps, four 16-byte loads of a 16-bit dtype in flight."""

ELEMENTS_PER_THREAD = 32
SPLIT_FROM_COLS = 32768
"""From here one program per row keeps too few bytes in flight (H100: 0.85 of copy at 65536 columns, looped; split 0.98)."""


def heuristic_config(problem: Problem, device: Device, allowed: Callable[[Config], bool] = lambda config: True) -> Config | None:
    """The legal config nearest to the rule's wishes, or None where no variant serves the problem."""
    legal = [config for config in candidates(problem, device) if allowed(config)]
    return min(legal, key=lambda config: (_misfit(config, problem, device), str(config)), default=None)


def _misfit(config: Config, problem: Problem, device: Device) -> tuple[int, float]:
    """How far a config is from what the rule wants: variant first, then tile and threads."""
    params, cols = config.params, problem.cols
    threads = int(params["num_warps"]) * device.warp_size
    if config.variant == "multi_row":
        tile = int(params["rows_per_program"]) * cols
        fits = cols <= 1024 and problem.rows * cols >= TILE_ELEMENTS * device.sm_count
        return (0 if fits else 2, abs(tile / TILE_ELEMENTS - 1) + abs(tile / threads / ELEMENTS_PER_THREAD - 1))
    if config.variant == "whole_row":
        fits = cols <= SPLIT_FROM_COLS
        return (1 if fits else 3, abs(cols / threads / ELEMENTS_PER_THREAD - 1) - 0.01 * bool(params["weight_first"]))
    if config.variant == "split_row":
        block = int(params["block_cols"])
        wanted = 16384 if problem.rows * cols >= 16384 * 2 * device.sm_count else 4096
        fits = cols > SPLIT_FROM_COLS
        return (0 if fits else 4, abs(block / wanted - 1) + abs(cols % block > 0) + abs(block / threads / 64 - 1))
    if config.variant == "looped":
        block = int(params["block_cols"])
        return (2, abs(block / 8192 - 1) + abs(block / threads / ELEMENTS_PER_THREAD - 1))
    # strided_axis: enough programs to fill the GPU, rows side by side for whole sectors, then a tall tile.
    inner, block_cols = int(params["block_inner"]), int(params["block_cols"])
    return (0, abs(inner / 32 - 1) + abs(min(block_cols, cols) * inner / threads / ELEMENTS_PER_THREAD - 1))
