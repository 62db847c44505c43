"""One program normalises one row: one read, one write. The row waits in registers while its mean square is summed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from kernels.variants.common import (
    ROW_INTEGERS,
    WHOLE_ROWS,
    elements_per_thread_fit,
    keep_packed,
    next_power_of_2,
    prune_configs,
    row_start,
    scaled,
    sum_of,
)
from tuning_db.model import ADD_FORWARD, FORWARD, NO_WEIGHT, Device, Problem, itemsize

OPS = (FORWARD, ADD_FORWARD)
REVISION = 1
LAYOUTS = ("contiguous", "two_stride")
IN_PLACE = True

MAX_COLS = 32768
"""65536 would be 64 elements a thread in 32 warps, which leaves 64 registers: it spills with Triton 3.9 and gains nothing with 3.6."""
MAX_ROWS = 2**30  # one program a row; a grid has less than 2**31


def is_valid(params: Mapping[str, Any], problem: Problem, device: Device) -> bool:
    if problem.layout not in LAYOUTS or problem.cols > MAX_COLS or problem.rows > MAX_ROWS:
        return False
    if problem.w_dtype == NO_WEIGHT and params["weight_first"]:
        return False  # the same binary as weight_first=False
    if params["weight_first"] and not _x_and_weight_fit(problem, params["num_warps"], device):
        return False
    return elements_per_thread_fit(next_power_of_2(problem.cols), itemsize(problem.x_dtype), params["num_warps"], device.warp_size)


def _x_and_weight_fit(problem: Problem, num_warps: int, device: Device) -> bool:
    """Whether x and weight together take at most two thirds of the registers that a thread can have; with more it spills.

    On NVIDIA and AMD alike 2048 registers a lane are there for all warps of a program.
    """
    per_thread = next_power_of_2(problem.cols) // (num_warps * device.warp_size)
    registers = per_thread * (itemsize(problem.x_dtype) + itemsize(problem.w_dtype)) / 4
    return registers <= 2048 / num_warps * 2 / 3


@triton.autotune(
    configs=[
        triton.Config({"WEIGHT_FIRST": weight_first}, num_warps=num_warps)
        for num_warps in (1, 2, 4, 8, 16, 32)
        for weight_first in (True, False)
    ],
    key=["cols", "rows"],
    prune_configs_by=prune_configs(is_valid),
)
@triton.heuristics(WHOLE_ROWS)
@triton.jit(do_not_specialize=[*ROW_INTEGERS])
def whole_row_kernel(
    y_ptr,
    x_ptr,
    w_ptr,
    eps: tl.float32,
    rows: tl.int64,
    cols: tl.int32,
    row_divisor: tl.int64,
    x_skip: tl.int64,
    x_row_stride: tl.int64,
    y_skip: tl.int64,
    y_row_stride: tl.int64,
    PTX: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    ROUND_NORMALIZED: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    EXACT: tl.constexpr,
    ALIGN: tl.constexpr,
    TWO_STRIDE: tl.constexpr,
    addend_ptr=None,
    sum_ptr=None,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 elements
    x_row_ptr = row_start(x_ptr, row, row_divisor, x_skip, x_row_stride, ALIGN, TWO_STRIDE)
    y_row_ptr = row_start(y_ptr, row, row_divisor, y_skip, y_row_stride, ALIGN, TWO_STRIDE)
    col = tl.arange(0, BLOCK_COLS)
    mask = None if EXACT else col < cols // ALIGN * ALIGN
    HAS_WEIGHT: tl.constexpr = w_ptr is not None
    inverse_cols = 1.0 / cols  # while the loads are under way: a division behind the reduction costs 0.05 µs of 2 (H100)

    x = tl.load(x_row_ptr + col, mask=mask, other=None if EXACT else 0.0)
    addend = x
    if addend_ptr is not None:
        addend_row_ptr = row_start(addend_ptr, row, row_divisor, y_skip, y_row_stride, ALIGN, TWO_STRIDE)
        addend = tl.load(addend_row_ptr + col, mask=mask, other=None if EXACT else 0.0)
    w = x
    if HAS_WEIGHT and WEIGHT_FIRST:
        w = tl.load(w_ptr + col, mask=mask)
    if addend_ptr is not None:
        x = sum_of(x, addend)
        tl.store(row_start(sum_ptr, row, row_divisor, x_skip, x_row_stride, ALIGN, TWO_STRIDE) + col, x, mask=mask)
    x_f32 = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x_f32 * x_f32) * inverse_cols + eps)
    if HAS_WEIGHT and not WEIGHT_FIRST:
        w = tl.load(w_ptr + col, mask=mask)
    tl.store(
        y_row_ptr + col,
        scaled(keep_packed(x, PTX), w, rstd, HAS_WEIGHT, WEIGHT_OFFSET, ROUND_NORMALIZED, y_ptr.dtype.element_ty),
        mask=mask,
    )


kernel = whole_row_kernel


def grid(args: Mapping[str, Any]) -> tuple[int, int, int]:
    return (args["rows"], 1, 1)
