"""Backward of narrow rows: a program walks tiles of several rows, and dw has an accumulator for every element of the tile.

So a turn costs no reduction over the tile's rows, and an accumulator takes in only every rows_per_program-th row of its program: at
1179648×256, tiles of 16 and 528 programs that is 140 terms, then a tree over the tile's rows. Bytes as in `backward_whole_row`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from kernels.variants.backward_common import (
    INTEGERS,
    MAX_ROWS,
    align_elements,
    element_bytes_read,
    input_gradient,
    problem_of_call,
    registers_fit,
    walkers,
    weighted,
)
from kernels.variants.common import both_sums, elements_per_thread_fit, keep_packed, next_power_of_2, prune_configs, row_block
from tuning_db.model import ADD_BACKWARD, BACKWARD, Device, Problem, itemsize

OPS = (BACKWARD, ADD_BACKWARD)
REVISION = 1
LAYOUTS = ("contiguous",)
IN_PLACE = False

MAX_COLS = 2048

MAX_WIDE_ELEMENTS = 16
"""Of fp32 that a thread holds: twice as many spill a word on sm_100 (Triton 3.9)."""


def is_valid(params: Mapping[str, Any], problem: Problem, device: Device) -> bool:
    rows_per_program, num_warps = params["rows_per_program"], params["num_warps"]
    if problem.layout not in LAYOUTS or problem.cols > MAX_COLS or problem.rows > MAX_ROWS:
        return False
    if rows_per_program > max(2, next_power_of_2(problem.rows)):
        return False
    tile = rows_per_program * row_block(problem.cols)
    if not elements_per_thread_fit(tile, itemsize(problem.x_dtype), num_warps, device.warp_size):
        return False
    if not registers_fit(tile, problem, num_warps, device.warp_size, params["programs_per_sm"]):
        return False
    if itemsize(problem.x_dtype) > 2 and tile > MAX_WIDE_ELEMENTS * num_warps * device.warp_size:
        return False
    tile_bytes = tile * element_bytes_read(problem)
    return (params["stages"] - 1) * tile_bytes * params["programs_per_sm"] <= device.shared_bytes


@triton.autotune(
    configs=[
        triton.Config({"ROWS_PER_PROGRAM": rows, "PROGRAMS_PER_SM": programs_per_sm, "STAGES": stages}, num_warps=num_warps)
        for rows in (2, 4, 8, 16, 32, 64, 256)
        for num_warps, programs_per_sm in ((1, 8), (4, 2), (4, 4), (8, 2))
        for stages in (1, 3)
    ],
    key=["cols", "rows"],
    prune_configs_by=prune_configs(is_valid, problem_of_call),
)
@triton.heuristics(
    {
        "BLOCK_COLS": lambda args: row_block(args["cols"]),
        "EXACT": lambda args: row_block(args["cols"]) == args["cols"],
        "ALIGN": align_elements,
    }
)
@triton.jit(do_not_specialize=[*INTEGERS])
def backward_multi_row_kernel(
    dx_ptr,
    partials_ptr,
    dy_ptr,
    x_ptr,
    w_ptr,
    eps: tl.float32,
    rows: tl.int64,
    cols: tl.int32,
    x_row_stride: tl.int64,
    y_row_stride: tl.int64,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
    PROGRAMS_PER_SM: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    EXACT: tl.constexpr,
    ALIGN: tl.constexpr,
    dsum_ptr=None,
    daddend_ptr=None,
):
    if PDL and partials_ptr is not None:
        gdc_launch_dependents()
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_COLS)[None, :]
    col_mask = col < cols // ALIGN * ALIGN
    HAS_WEIGHT: tl.constexpr = w_ptr is not None
    x_stride, dy_stride = x_row_stride // ALIGN * ALIGN, y_row_stride // ALIGN * ALIGN  # as in row_start
    dx_stride = (cols // ALIGN * ALIGN).to(tl.int64)
    inverse_cols = 1.0 / cols
    w = col
    if HAS_WEIGHT:
        w = tl.load(w_ptr + col, mask=col_mask, other=0.0)
    dw = tl.zeros([ROWS_PER_PROGRAM, BLOCK_COLS], dtype=tl.float32)
    tiles = tl.cdiv(rows, ROWS_PER_PROGRAM).to(tl.int32)
    for tile in tl.range(program, tiles, tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS_PER_PROGRAM + tl.arange(0, ROWS_PER_PROGRAM)[:, None].to(tl.int64)
        mask = row < rows
        if not EXACT:
            mask = mask & col_mask
        x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0)
        dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0)
        dsum = None
        if dsum_ptr is not None:
            dsum = tl.load(dsum_ptr + row * dx_stride + col, mask=mask, other=0.0)
        x_f32 = x.to(tl.float32)
        squares, products = both_sums(x_f32 * x_f32, weighted(dy, w, HAS_WEIGHT, WEIGHT_OFFSET) * x_f32, 1, True, PTX)
        rstd = tl.rsqrt(squares * inverse_cols + eps)
        projection = products * rstd * inverse_cols
        x_hat = keep_packed(x, PTX).to(tl.float32) * rstd
        dy = keep_packed(dy, PTX)
        if partials_ptr is not None:
            # Rows past the end are zeros, which eps = 0 would make NaN.
            dw = tl.fma(dy.to(tl.float32), tl.where(row < rows, x_hat, 0.0), dw)
        if dx_ptr is not None:
            gradient = input_gradient(x_hat, weighted(dy, w, HAS_WEIGHT, WEIGHT_OFFSET), rstd, projection, dsum)
            dx = gradient.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + row * dx_stride + col, dx, mask=mask)
            if daddend_ptr is not None:
                tl.store(daddend_ptr + row * dx_stride + col, gradient.to(daddend_ptr.dtype.element_ty), mask=mask)
    if partials_ptr is not None:
        tl.store(partials_ptr + program * dx_stride + col, tl.sum(dw, axis=0, keep_dims=True), mask=col_mask)


kernel = backward_multi_row_kernel


def grid(args: Mapping[str, Any]) -> tuple[int, int, int]:
    return (partial_rows(args), 1, 1)


def partial_rows(args: Mapping[str, Any]) -> int:
    return walkers(args, args["ROWS_PER_PROGRAM"], args["sm_count"] * args["PROGRAMS_PER_SM"])
