"""One program normalises several whole rows as a tile: for narrow rows, where one row does not fill a program's vector loads."""

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
from tuning_db.model import ADD_FORWARD, FORWARD, Device, Problem, itemsize

OPS = (FORWARD, ADD_FORWARD)
REVISION = 1
LAYOUTS = ("contiguous", "two_stride")
IN_PLACE = True

MAX_COLS = 4096
MAX_ROWS = 2**31  # rows / rows_per_program programs, at least two rows each
MAX_TWO_STRIDE_ROWS = 3 * 2**29
"""The largest bucket of rows that stands for less than 2^31, which `row_start` can divide."""


def is_valid(params: Mapping[str, Any], problem: Problem, device: Device) -> bool:
    rows_per_program, num_warps = params["rows_per_program"], params["num_warps"]
    if problem.layout not in LAYOUTS or problem.cols > MAX_COLS or problem.rows > MAX_ROWS:
        return False
    if problem.layout == "two_stride" and problem.rows > MAX_TWO_STRIDE_ROWS:
        return False
    if rows_per_program > max(2, next_power_of_2(problem.rows)):
        return False
    tile = rows_per_program * next_power_of_2(problem.cols)
    return elements_per_thread_fit(tile, itemsize(problem.x_dtype), num_warps, device.warp_size)


@triton.autotune(
    configs=[
        triton.Config({"ROWS_PER_PROGRAM": rows_per_program}, num_warps=num_warps)
        for rows_per_program in (2, 4, 8, 16, 32, 64, 128, 256)
        for num_warps in (1, 2, 4, 8)
    ],
    key=["cols", "rows"],
    prune_configs_by=prune_configs(is_valid),
)
@triton.heuristics(WHOLE_ROWS)
@triton.jit(do_not_specialize=[*ROW_INTEGERS])
def multi_row_kernel(
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
    ROWS_PER_PROGRAM: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    EXACT: tl.constexpr,
    ALIGN: tl.constexpr,
    TWO_STRIDE: tl.constexpr,
    addend_ptr=None,
    sum_ptr=None,
):
    row = tl.program_id(0).to(tl.int64) * ROWS_PER_PROGRAM + tl.arange(0, ROWS_PER_PROGRAM)[:, None]
    x_row_ptr = row_start(x_ptr, row, row_divisor, x_skip, x_row_stride, ALIGN, TWO_STRIDE)
    y_row_ptr = row_start(y_ptr, row, row_divisor, y_skip, y_row_stride, ALIGN, TWO_STRIDE)
    col = tl.arange(0, BLOCK_COLS)[None, :]
    col_mask = col < cols // ALIGN * ALIGN
    mask = row < rows
    if not EXACT:
        mask = mask & col_mask
    HAS_WEIGHT: tl.constexpr = w_ptr is not None
    inverse_cols = 1.0 / cols  # while the loads are under way: a division behind the reduction costs 0.05 µs of 2 (H100)

    x = tl.load(x_row_ptr + col, mask=mask, other=0.0)
    addend = x
    if addend_ptr is not None:
        addend_row_ptr = row_start(addend_ptr, row, row_divisor, y_skip, y_row_stride, ALIGN, TWO_STRIDE)
        addend = tl.load(addend_row_ptr + col, mask=mask, other=0.0)
    w = x
    if HAS_WEIGHT:
        w = tl.load(w_ptr + col, mask=None if EXACT else col_mask)
    if addend_ptr is not None:
        x = sum_of(x, addend)
        tl.store(row_start(sum_ptr, row, row_divisor, x_skip, x_row_stride, ALIGN, TWO_STRIDE) + col, x, mask=mask)
    x_f32 = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x_f32 * x_f32, axis=1, keep_dims=True) * inverse_cols + eps)
    tl.store(
        y_row_ptr + col,
        scaled(keep_packed(x, PTX), w, rstd, HAS_WEIGHT, WEIGHT_OFFSET, ROUND_NORMALIZED, y_ptr.dtype.element_ty),
        mask=mask,
    )


kernel = multi_row_kernel


def grid(args: Mapping[str, Any]) -> tuple[int, int, int]:
    return (-(-args["rows"] // args["ROWS_PER_PROGRAM"]), 1, 1)
