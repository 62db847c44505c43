"""One program walks one row block by block, twice: sum, then scale. Any width; the second read is meant to hit the caches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from kernels.variants.common import (
    ROW_INTEGERS,
    align_elements,
    elements_per_thread_fit,
    has_two_strides,
    prune_configs,
    row_start,
    scaled,
    sum_of,
)
from tuning_db.model import ADD_FORWARD, FORWARD, Device, Problem, itemsize

OPS = (FORWARD, ADD_FORWARD)
REVISION = 1
LAYOUTS = ("contiguous", "two_stride")
IN_PLACE = True  # the second pass reads a block right before it writes the same block

MIN_BLOCK_COLS = 2048
MAX_COLS = 2**30  # offsets within a row are 32-bit
MAX_ROWS = 2**30  # one program a row; a grid has less than 2**31


def is_valid(params: Mapping[str, Any], problem: Problem, device: Device) -> bool:
    block_cols, num_warps = params["block_cols"], params["num_warps"]
    if problem.layout not in LAYOUTS or problem.cols > MAX_COLS or problem.rows > MAX_ROWS:
        return False
    if problem.cols <= block_cols and block_cols > MIN_BLOCK_COLS:
        return False  # a row of one block is whole_row's, except that some config must serve every width
    return elements_per_thread_fit(block_cols, itemsize(problem.x_dtype), num_warps, device.warp_size)


@triton.autotune(
    configs=[
        triton.Config({"BLOCK_COLS": block_cols}, num_warps=num_warps)
        for block_cols, num_warps in ((MIN_BLOCK_COLS, 4), (MIN_BLOCK_COLS, 8), (4096, 8), (4096, 16), (8192, 32), (16384, 32))
    ],
    key=["cols", "rows"],
    prune_configs_by=prune_configs(is_valid),
)
@triton.heuristics(
    {
        "EXACT": lambda args: args["cols"] % args["BLOCK_COLS"] == 0,
        "ALIGN": align_elements,
        "TWO_STRIDE": has_two_strides,
    }
)
@triton.jit(do_not_specialize=[*ROW_INTEGERS])
def looped_kernel(
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
    aligned_cols = cols // ALIGN * ALIGN
    HAS_WEIGHT: tl.constexpr = w_ptr is not None

    addend_row_ptr, sum_row_ptr = x_row_ptr, x_row_ptr
    if addend_ptr is not None:
        addend_row_ptr = row_start(addend_ptr, row, row_divisor, y_skip, y_row_stride, ALIGN, TWO_STRIDE)
        sum_row_ptr = row_start(sum_ptr, row, row_divisor, x_skip, x_row_stride, ALIGN, TWO_STRIDE)
    squares = tl.zeros([BLOCK_COLS], dtype=tl.float32)
    for start in range(0, cols, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS)
        mask = None if EXACT else col < aligned_cols
        x = tl.load(x_row_ptr + col, mask=mask, other=None if EXACT else 0.0, eviction_policy="evict_last")
        if addend_ptr is not None:
            x = sum_of(x, tl.load(addend_row_ptr + col, mask=mask, other=None if EXACT else 0.0, eviction_policy="evict_first"))
            tl.store(sum_row_ptr + col, x, mask=mask)
        x = x.to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares) / cols + eps)

    if addend_ptr is not None:
        x_row_ptr = sum_row_ptr
        tl.debug_barrier()  # a thread may read what another one has written
    # From the end to the start: the blocks read last are the likeliest still in L2.
    for done in range(0, cols, BLOCK_COLS):
        col = (cols - 1) // BLOCK_COLS * BLOCK_COLS - done + tl.arange(0, BLOCK_COLS)
        mask = None if EXACT else col < aligned_cols
        x = tl.load(x_row_ptr + col, mask=mask, eviction_policy="evict_first")
        w = x
        if HAS_WEIGHT:
            w = tl.load(w_ptr + col, mask=mask)
        tl.store(y_row_ptr + col, scaled(x, w, rstd, HAS_WEIGHT, WEIGHT_OFFSET, ROUND_NORMALIZED, y_ptr.dtype.element_ty), mask=mask)


kernel = looped_kernel


def grid(args: Mapping[str, Any]) -> tuple[int, int, int]:
    return (args["rows"], 1, 1)
