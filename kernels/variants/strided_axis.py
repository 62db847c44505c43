"""The normalised axis is not the innermost: a program takes adjacent rows side by side, so that its loads stay coalesced.

Element (outer, inner, col) lies at outer * outer_stride + inner * row_stride + col * col_stride. A tile spans block_cols elements of
the axis × block_inner rows that are adjacent in memory. An axis that fits one block is read once, a longer one twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from kernels.variants.common import effective_weight, next_power_of_2, normalized, prune_configs
from tuning_db.model import FORWARD, Device, Problem

OPS = (FORWARD,)
REVISION = 1
LAYOUTS = ("strided_axis",)
IN_PLACE = True

MAX_COLS = 2**30
MAX_ROWS = 2**30
MIN_BLOCK_COLS = 16
MIN_BLOCK_INNER = 1
INTEGERS = (
    "rows", "cols", "inner_rows", "x_outer_stride", "x_row_stride", "y_outer_stride", "y_row_stride", "x_col_stride", "y_col_stride",
)  # fmt: skip
"""Arguments of the kernel, `do_not_specialize`d: their values compile nothing."""

INNER_ALIGNED = ("inner_rows", "x_outer_stride", "y_outer_stride", "x_col_stride", "y_col_stride")


def is_valid(params: Mapping[str, Any], problem: Problem, device: Device) -> bool:
    block_cols, block_inner, num_warps = params["block_cols"], params["block_inner"], params["num_warps"]
    if problem.layout not in LAYOUTS or problem.rows > MAX_ROWS or problem.cols > MAX_COLS:
        return False
    if block_cols > max(MIN_BLOCK_COLS, next_power_of_2(problem.cols)):
        return False
    if block_inner > max(MIN_BLOCK_INNER, next_power_of_2(problem.inner_rows)):
        return False
    return block_cols * block_inner <= 64 * num_warps * device.warp_size


@triton.autotune(
    configs=[
        triton.Config({"BLOCK_COLS": block_cols, "BLOCK_INNER": block_inner}, num_warps=num_warps)
        for block_cols, block_inner, num_warps in (
            (16, 1, 1), (128, 1, 4), (1024, 1, 4), (4096, 1, 8),
            (16, 8, 1), (64, 8, 4), (256, 8, 4), (1024, 8, 8),
            (16, 32, 4), (64, 32, 4), (128, 32, 8), (256, 32, 8),
            (32, 64, 4), (64, 64, 4), (128, 64, 8),
            (16, 128, 4), (64, 128, 8), (32, 256, 8),
            (128, 16, 4), (256, 16, 8), (512, 16, 8), (512, 32, 16), (256, 64, 16),
        )
    ],
    key=["cols", "rows", "inner_rows"],
    prune_configs_by=prune_configs(is_valid),
)  # fmt: skip
@triton.heuristics(
    {
        "ONE_BLOCK": lambda args: args["cols"] <= args["BLOCK_COLS"],
        "UNIT_INNER": lambda args: args["x_row_stride"] == 1 and args["y_row_stride"] == 1,
        "ALIGN": lambda args: math.gcd(16, *(args[name] for name in INNER_ALIGNED)),
    }
)
@triton.jit(do_not_specialize=[*INTEGERS])
def strided_axis_kernel(
    y_ptr,
    x_ptr,
    w_ptr,
    eps: tl.float32,
    rows: tl.int64,
    cols: tl.int32,
    inner_rows: tl.int64,
    x_outer_stride: tl.int64,
    x_row_stride: tl.int64,
    y_outer_stride: tl.int64,
    y_row_stride: tl.int64,
    x_col_stride: tl.int64,
    y_col_stride: tl.int64,
    PTX: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    ROUND_NORMALIZED: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    UNIT_INNER: tl.constexpr,
    ALIGN: tl.constexpr,
):
    tiles = tl.cdiv(inner_rows, BLOCK_INNER)
    program = tl.program_id(0).to(tl.int64)
    outer = program // tiles
    inner = (program % tiles) * BLOCK_INNER + tl.arange(0, BLOCK_INNER)[None, :]
    if UNIT_INNER:
        # Rows adjacent in memory. x // ALIGN * ALIGN equals x; written out, it lets the compiler load whole vectors of rows.
        x_col_stride = x_col_stride // ALIGN * ALIGN
        y_col_stride = y_col_stride // ALIGN * ALIGN
        inner_mask = inner < inner_rows // ALIGN * ALIGN
        x_rows_ptr = x_ptr + outer * (x_outer_stride // ALIGN * ALIGN) + inner
        y_rows_ptr = y_ptr + outer * (y_outer_stride // ALIGN * ALIGN) + inner
    else:
        inner_mask = inner < inner_rows
        x_rows_ptr = x_ptr + outer * x_outer_stride + inner * x_row_stride
        y_rows_ptr = y_ptr + outer * y_outer_stride + inner * y_row_stride
    HAS_WEIGHT: tl.constexpr = w_ptr is not None
    block = tl.arange(0, BLOCK_COLS)[:, None]

    if ONE_BLOCK:
        mask = inner_mask & (block < cols)
        x = tl.load(x_rows_ptr + block * x_col_stride, mask=mask, other=0.0)
        x_f32 = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x_f32 * x_f32, axis=0, keep_dims=True) / cols + eps)
        y = normalized(x, rstd, ROUND_NORMALIZED)
        if HAS_WEIGHT:
            y = y * effective_weight(tl.load(w_ptr + block, mask=block < cols), WEIGHT_OFFSET)
        tl.store(y_rows_ptr + block * y_col_stride, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        squares = tl.zeros([BLOCK_COLS, BLOCK_INNER], dtype=tl.float32)
        for start in range(0, cols, BLOCK_COLS):
            col = start + block
            x = tl.load(x_rows_ptr + col * x_col_stride, mask=inner_mask & (col < cols), other=0.0).to(tl.float32)
            squares += x * x
        rstd = tl.rsqrt(tl.sum(squares, axis=0, keep_dims=True) / cols + eps)
        for start in range(0, cols, BLOCK_COLS):
            col = start + block
            mask = inner_mask & (col < cols)
            x = tl.load(x_rows_ptr + col * x_col_stride, mask=mask, eviction_policy="evict_first")
            y = normalized(x, rstd, ROUND_NORMALIZED)
            if HAS_WEIGHT:
                y = y * effective_weight(tl.load(w_ptr + col, mask=col < cols), WEIGHT_OFFSET)
            tl.store(y_rows_ptr + col * y_col_stride, y.to(y_ptr.dtype.element_ty), mask=mask)


kernel = strided_axis_kernel


def grid(args: Mapping[str, Any]) -> tuple[int, int, int]:
    return (args["rows"] // args["inner_rows"] * -(-args["inner_rows"] // args["BLOCK_INNER"]), 1, 1)
