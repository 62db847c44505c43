"""Backward, one program holds whole rows: it walks them with its part of dw in registers, and reads x and dy once.

Bytes: x and dy in, dx out, and 4 · cols a program for dw's partial rows (2 % of the rest at 4096 rows, bf16, one program an SM of 132).
The loop is pipelined: the next rows travel to shared memory while this one is summed, which hides the two reductions and their barriers;
with one program an SM that takes STAGES rows of x and dy in shared memory.

A row is held in equal pieces of a power of two columns each, so that little is masked: 5120 columns are five of 1024, not 8192 with three
eighths in vain.
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
from kernels.variants.common import both_sums, elements_per_thread_fit, keep_packed, load_piece, prune_configs, row_block, store_piece
from tuning_db.model import ADD_BACKWARD, BACKWARD, Device, Problem, itemsize

OPS = (BACKWARD, ADD_BACKWARD)
REVISION = 1
LAYOUTS = ("contiguous",)
IN_PLACE = False


THREAD_COLS = 8
"""The least that a thread holds of a piece: 16 bytes of 16-bit data. Pieces of half as much cost 6 % at 7168 columns (H100)."""


def is_valid(params: Mapping[str, Any], problem: Problem, device: Device) -> bool:
    num_warps = params["num_warps"]
    if problem.layout not in LAYOUTS or problem.rows > MAX_ROWS:
        return False
    block = pieces(problem.cols, num_warps) * piece_cols(problem.cols, num_warps)
    if not elements_per_thread_fit(block, itemsize(problem.x_dtype), num_warps, device.warp_size):
        return False
    if not registers_fit(block, problem, num_warps, device.warp_size, params["programs_per_sm"]):
        return False
    row_bytes = block * element_bytes_read(problem)
    return (params["stages"] - 1) * row_bytes * params["programs_per_sm"] <= device.shared_bytes


def piece_cols(cols: int, num_warps: int) -> int:
    """Columns of a piece: the largest power of two with the fewest columns in all pieces, of those that give 32 lanes THREAD_COLS each."""
    sizes = [row_block(cols)]
    while sizes[-1] // 2 >= num_warps * 32 * THREAD_COLS:
        sizes.append(sizes[-1] // 2)
    return min(sizes, key=lambda size: (-(-cols // size) * size, -size))


def pieces(cols: int, num_warps: int) -> int:
    return -(-cols // piece_cols(cols, num_warps))


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
        "PIECE_COLS": lambda args: piece_cols(args["cols"], args["num_warps"]),
        "PIECES": lambda args: pieces(args["cols"], args["num_warps"]),
        "FULL_PIECES": lambda args: args["cols"] // args["PIECE_COLS"],
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
    PIECE_COLS: tl.constexpr,
    PIECES: tl.constexpr,
    FULL_PIECES: tl.constexpr,
    ALIGN: tl.constexpr,
    dsum_ptr=None,
    daddend_ptr=None,
):
    if PDL and partials_ptr is not None:
        gdc_launch_dependents()
    program = tl.program_id(0)
    HAS_WEIGHT: tl.constexpr = w_ptr is not None
    x_stride, dy_stride = x_row_stride // ALIGN * ALIGN, y_row_stride // ALIGN * ALIGN  # as in row_start
    end = cols // ALIGN * ALIGN
    dx_stride = end.to(tl.int64)
    inverse_cols = 1.0 / cols
    w, dw = (), ()
    for i in tl.static_range(PIECES):
        dw = dw + (tl.zeros([PIECE_COLS], dtype=tl.float32),)
        if HAS_WEIGHT:
            w = w + (load_piece(w_ptr, i * PIECE_COLS, end, PIECE_COLS, i >= FULL_PIECES),)
        else:
            w = w + (dw[i],)  # stands for what is not read
    for row in tl.range(program, rows.to(tl.int32), tl.num_programs(0), num_stages=STAGES):
        x, dy, dsum = (), (), ()
        squares, products = tl.zeros([PIECE_COLS], dtype=tl.float32), tl.zeros([PIECE_COLS], dtype=tl.float32)
        for i in tl.static_range(PIECES):
            piece = load_piece(x_ptr + row * x_stride, i * PIECE_COLS, end, PIECE_COLS, i >= FULL_PIECES)
            dy_piece = load_piece(dy_ptr + row * dy_stride, i * PIECE_COLS, end, PIECE_COLS, i >= FULL_PIECES)
            if dsum_ptr is not None:
                dsum = dsum + (load_piece(dsum_ptr + row * dx_stride, i * PIECE_COLS, end, PIECE_COLS, i >= FULL_PIECES),)
            x_f32 = piece.to(tl.float32)
            squares = tl.fma(x_f32, x_f32, squares)
            products = tl.fma(weighted(dy_piece, w[i], HAS_WEIGHT, WEIGHT_OFFSET), x_f32, products)
            x, dy = x + (piece,), dy + (dy_piece,)
        squares, products = both_sums(squares, products, 0, False, PTX)
        rstd = tl.rsqrt(squares * inverse_cols + eps)
        projection = products * rstd * inverse_cols
        former, dw = dw, ()
        for i in tl.static_range(PIECES):
            x_hat = keep_packed(x[i], PTX).to(tl.float32) * rstd
            packed_dy = keep_packed(dy[i], PTX)
            if partials_ptr is not None:
                dw = dw + (tl.fma(packed_dy.to(tl.float32), x_hat, former[i]),)
            else:
                dw = dw + (former[i],)
            if dx_ptr is not None:
                g = weighted(packed_dy, w[i], HAS_WEIGHT, WEIGHT_OFFSET)
                if dsum_ptr is not None:
                    gradient = input_gradient(x_hat, g, rstd, projection, dsum[i])
                else:
                    gradient = input_gradient(x_hat, g, rstd, projection, None)
                dx_row_ptr = dx_ptr + row * dx_stride
                store_piece(dx_row_ptr, gradient.to(dx_ptr.dtype.element_ty), i * PIECE_COLS, end, PIECE_COLS, i >= FULL_PIECES)
                if daddend_ptr is not None:
                    daddend = gradient.to(daddend_ptr.dtype.element_ty)
                    store_piece(daddend_ptr + row * dx_stride, daddend, i * PIECE_COLS, end, PIECE_COLS, i >= FULL_PIECES)
    if partials_ptr is not None:
        for i in tl.static_range(PIECES):
            store_piece(partials_ptr + program * dx_stride, dw[i], i * PIECE_COLS, end, PIECE_COLS, i >= FULL_PIECES)


kernel = backward_whole_row_kernel


def grid(args: Mapping[str, Any]) -> tuple[int, int, int]:
    return (partial_rows(args), 1, 1)


def partial_rows(args: Mapping[str, Any]) -> int:
    return walkers(args, 1, args["sm_count"] * args["PROGRAMS_PER_SM"])
