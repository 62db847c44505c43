"""Backward, one program holds whole rows: it walks them with its part of dw in registers, and reads x and dy once.

Bytes: x and dy in, dx out, and 4 · cols a program for dw's partial rows (2 % of the rest at 4096 rows, bf16, one program an SM of 132).
The loop is pipelined: the next rows travel to shared memory while this one is summed, which hides the two reductions and their barriers;
with one program an SM that takes STAGES rows of x and dy in shared memory.
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
from kernels.variants.common import both_sums, elements_per_thread_fit, keep_packed, prune_configs, row_block
from tuning_db.model import ADD_BACKWARD, BACKWARD, Device, Problem, itemsize

OPS = (BACKWARD, ADD_BACKWARD)
REVISION = 1
LAYOUTS = ("contiguous",)
IN_PLACE = False


def is_valid(params: Mapping[str, Any], problem: Problem, device: Device) -> bool:
    num_warps = params["num_warps"]
    if problem.layout not in LAYOUTS or problem.rows > MAX_ROWS:
        return False
    block = row_block(problem.cols)
    if not elements_per_thread_fit(block, itemsize(problem.x_dtype), num_warps, device.warp_size):
        return False
    if not registers_fit(block, problem, num_warps, device.warp_size, params["programs_per_sm"]):
        return False
    row_bytes = block * element_bytes_read(problem)
    return (params["stages"] - 1) * row_bytes * params["programs_per_sm"] <= device.shared_bytes


@triton.autotune(
    configs=[
        triton.Config({"PROGRAMS_PER_SM": programs_per_sm, "STAGES": stages}, num_warps=num_warps)
        for num_warps, programs in ((1, (8, 16)), (2, (8, 16)), (4, (2, 4, 8)), (8, (1, 2, 4)), (16, (1, 2)), (32, (1,)))
        for programs_per_sm in programs
        for stages in (1, 2, 3)
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
def backward_whole_row_kernel(
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
    col = tl.arange(0, BLOCK_COLS)
    mask = None if EXACT else col < cols // ALIGN * ALIGN
    other = None if EXACT else 0.0
    HAS_WEIGHT: tl.constexpr = w_ptr is not None
    x_stride, dy_stride = x_row_stride // ALIGN * ALIGN, y_row_stride // ALIGN * ALIGN  # as in row_start
    dx_stride = (cols // ALIGN * ALIGN).to(tl.int64)
    inverse_cols = 1.0 / cols
    w = col
    if HAS_WEIGHT:
        w = tl.load(w_ptr + col, mask=mask, other=other)
    dw = tl.zeros([BLOCK_COLS], dtype=tl.float32)
    for row in tl.range(program, rows.to(tl.int32), tl.num_programs(0), num_stages=STAGES):
        x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=other)
        dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=other)
        dsum = None
        if dsum_ptr is not None:
            dsum = tl.load(dsum_ptr + row * dx_stride + col, mask=mask, other=other)
        x_f32 = x.to(tl.float32)
        squares, products = both_sums(x_f32 * x_f32, weighted(dy, w, HAS_WEIGHT, WEIGHT_OFFSET) * x_f32, 0, False, PTX)
        rstd = tl.rsqrt(squares * inverse_cols + eps)
        projection = products * rstd * inverse_cols
        x_hat = keep_packed(x, PTX).to(tl.float32) * rstd
        dy = keep_packed(dy, PTX)
        if partials_ptr is not None:
            dw = tl.fma(dy.to(tl.float32), x_hat, dw)
        if dx_ptr is not None:
            gradient = input_gradient(x_hat, weighted(dy, w, HAS_WEIGHT, WEIGHT_OFFSET), rstd, projection, dsum)
            dx = gradient.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + row * dx_stride + col, dx, mask=mask)
            if daddend_ptr is not None:
                tl.store(daddend_ptr + row * dx_stride + col, gradient.to(daddend_ptr.dtype.element_ty), mask=mask)
    if partials_ptr is not None:
        tl.store(partials_ptr + program * dx_stride + col, dw, mask=mask)


kernel = backward_whole_row_kernel


def grid(args: Mapping[str, Any]) -> tuple[int, int, int]:
    return (partial_rows(args), 1, 1)


def partial_rows(args: Mapping[str, Any]) -> int:
    return walkers(args, 1, args["sm_count"] * args["PROGRAMS_PER_SM"])
