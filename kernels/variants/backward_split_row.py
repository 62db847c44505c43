"""Backward of wide rows: each program owns a chunk of columns, with its part of dw in registers, and walks rows in step with the others.

The programs of a group own the chunks of the same rows. For each row a program publishes the sums of x² and g · x over its chunk and
waits for those of the others, by the same exchange as `split_row`.
All rows of a launch carry one mark, one more than the program's own slot of its first row held: a workspace serves one number of groups
alone, so that every launch writes this slot, and no other slot of the group can be ahead of it. The wait is bounded, as in `split_row`:
whoever waits in vain forms the sums itself, with the same bits. dx must not overwrite x or dy, which others may still have to read.

A program publishes a row ahead, holding the chunk before it, packed, in registers: what it waits for at a row was published by the
others a turn ago, so that the exchange costs nothing (H100, 512x131072: 155 µs against 169 with the wait in line, and 209 where the
chunk is read twice instead of held). The chunks after that travel to shared memory meanwhile: the loop is pipelined. A thread owns 16
columns of 16-bit data in 128 registers, so an SM owns 8192.

Bytes: x and dy once, dx once, partial rows of dw one a group: with 8 groups and 512 rows 1 % of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from kernels.variants.backward_common import (
    INTEGERS,
    REGISTERS_PER_SM,
    align_elements,
    input_gradient,
    problem_of_call,
    walkers,
    weighted,
)
from kernels.variants.common import both_sums, elements_per_thread_fit, keep_packed, next_power_of_2, prune_configs
from kernels.variants.exchange import find, publish
from tuning_db.model import ADD_BACKWARD, BACKWARD, NO_WEIGHT, Device, Problem, itemsize

OPS = (BACKWARD, ADD_BACKWARD)
REVISION = 2
LAYOUTS = ("contiguous",)
IN_PLACE = False

MAX_SPLIT = 256
DW_BYTES = 4  # fp32
MAX_ROWS = 2**22
"""Slots of the workspace are counted in 32 bits. A slot takes 16 bytes a chunk, some 1 % of what the row takes at most."""
WORKING_REGISTERS = 72
"""Beside what a thread holds from row to row. Seen with Triton 3.6 and 3.9 for sm_90: more than the rest of 128 or 170 spills."""
RELAYOUT_REGISTERS = 16
"""More than that where a sum's gradient is wider than dy or narrower, and one is brought to the layout of the other."""


def is_valid(params: Mapping[str, Any], problem: Problem, device: Device) -> bool:
    block_cols, num_warps, programs_per_sm = params["block_cols"], params["num_warps"], params["programs_per_sm"]
    if problem.layout not in LAYOUTS or problem.rows > MAX_ROWS:
        return False
    split = -(-problem.cols // block_cols)
    # The programs of a row wait for each other: all of them must run at once.
    if not 2 <= split <= min(MAX_SPLIT, device.sm_count * programs_per_sm):
        return False
    column_bytes = itemsize(problem.x_dtype) + itemsize(problem.y_dtype)
    dsum_bytes = itemsize(problem.x_dtype) if problem.adds else 0
    if params["stages"] * block_cols * (column_bytes + dsum_bytes) * programs_per_sm > device.shared_bytes:
        return False
    w_bytes = 0 if problem.w_dtype == NO_WEIGHT else itemsize(problem.w_dtype)
    held_bytes = block_cols // (num_warps * device.warp_size) * (2 * column_bytes + dsum_bytes + w_bytes + DW_BYTES)
    relayouts = problem.adds and itemsize(problem.x_dtype) != itemsize(problem.y_dtype)
    if held_bytes > 4 * (params["maxnreg"] - WORKING_REGISTERS - (RELAYOUT_REGISTERS if relayouts else 0)):
        return False
    return elements_per_thread_fit(block_cols, itemsize(problem.x_dtype), num_warps, device.warp_size)


def split_of(args: Mapping[str, Any]) -> int:
    """Programs a row."""
    return -(-args["cols"] // args["BLOCK_COLS"])


def slots_at_once(args: Mapping[str, Any]) -> int:
    """A power of two that holds a row's slots and gives every warp some, as in `split_row`."""
    return max(next_power_of_2(2 * split_of(args)), args["num_warps"] * (32 if args["PTX"] else 64))


@triton.jit
def load_chunk(ptr, row, row_stride, col, mask):
    if mask is None:
        return tl.load(ptr + row * row_stride + col)
    else:
        return tl.load(ptr + row * row_stride + col, mask=mask, other=0.0)


@triton.jit
def chunk_sums(x, dy, w, PTX: tl.constexpr, HAS_WEIGHT: tl.constexpr, WEIGHT_OFFSET: tl.constexpr):
    """Σ x² and Σ g · x of a chunk: the one way to form them, so that whoever does gets the same bits."""
    x_f32 = x.to(tl.float32)
    zeros = tl.zeros_like(x_f32)
    g = weighted(dy, keep_packed(w, PTX) if HAS_WEIGHT else w, HAS_WEIGHT, WEIGHT_OFFSET)
    # Written out: the compiler may not choose where to round.
    return both_sums(tl.fma(x_f32, x_f32, zeros), tl.fma(g, x_f32, zeros), 0, False, PTX)


@triton.jit
def add_triples(a, b, c, other_a, other_b, other_c):
    return a + other_a, b + other_b, c + other_c


@triton.jit
def add_up(is_here, values, SLOTS: tl.constexpr, PTX: tl.constexpr):
    """How many words are here, and the sums of the first and of the second of each two of their values."""
    values = tl.where(is_here, values, 0.0)
    is_first = tl.arange(0, SLOTS) % 2 == 0
    count, first, second = is_here.to(tl.int32), tl.where(is_first, values, 0.0), tl.where(is_first, 0.0, values)
    if PTX:
        return tl.reduce((count, first, second), 0, add_triples)
    else:
        return tl.sum(count), tl.sum(first), tl.sum(second)


@triton.jit
def look(slots_ptr, words, mark, SLOTS: tl.constexpr, PTX: tl.constexpr):
    """How many of a row's words carry the mark, and the sums of x² and g · x that they hold."""
    is_here, values = find(slots_ptr, words, mark, SLOTS)
    return add_up(is_here, values, SLOTS, PTX)


@triton.autotune(
    configs=[
        triton.Config(
            {"BLOCK_COLS": block_cols, "PROGRAMS_PER_SM": programs_per_sm, "STAGES": stages},
            num_warps=num_warps,
            maxnreg=min(255, REGISTERS_PER_SM // (programs_per_sm * num_warps * 32)),  # so that as many run at once, and keep in step
        )
        for block_cols, num_warps, programs_per_sm in ((1024, 4, 3), (1024, 4, 4), (2048, 4, 3), (2048, 4, 4), (2048, 8, 2), (4096, 8, 2))
        for stages in (2, 3)
    ],
    key=["cols", "rows"],
    prune_configs_by=prune_configs(is_valid, problem_of_call),
)
@triton.heuristics(
    {
        "SLOTS": slots_at_once,
        "EXACT": lambda args: args["cols"] % args["BLOCK_COLS"] == 0,
        "ALIGN": align_elements,
    }
)
@triton.jit(do_not_specialize=[*INTEGERS, "max_polls"])
def backward_split_row_kernel(
    dx_ptr,
    partials_ptr,
    dy_ptr,
    x_ptr,
    w_ptr,
    workspace_ptr,
    eps: tl.float32,
    rows: tl.int64,
    cols: tl.int32,
    x_row_stride: tl.int64,
    y_row_stride: tl.int64,
    max_polls: tl.int32,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PROGRAMS_PER_SM: tl.constexpr,
    STAGES: tl.constexpr,
    SLOTS: tl.constexpr,
    EXACT: tl.constexpr,
    ALIGN: tl.constexpr,
    dsum_ptr=None,
    daddend_ptr=None,
):
    if PDL and partials_ptr is not None:
        gdc_launch_dependents()
    part, group = tl.program_id(0), tl.program_id(1)  # the parts of a row are neighbours in launch order
    split, groups = tl.num_programs(0), tl.num_programs(1)
    words = 2 * split
    aligned_cols = cols // ALIGN * ALIGN
    chunk = BLOCK_COLS
    if not EXACT:  # near-equal chunks, each starting on an aligned column; the last is the shortest, and never empty, as in split_row
        chunk = tl.cdiv(tl.cdiv(cols, split), ALIGN) * ALIGN
    col = part * chunk + tl.arange(0, BLOCK_COLS)
    end = tl.minimum((part + 1) * chunk, aligned_cols) // ALIGN * ALIGN
    mask = None if EXACT else col < end
    HAS_WEIGHT: tl.constexpr = w_ptr is not None
    x_stride, dy_stride = x_row_stride // ALIGN * ALIGN, y_row_stride // ALIGN * ALIGN  # as in row_start
    dx_stride = aligned_cols.to(tl.int64)
    inverse_cols = 1.0 / cols
    mark = ((tl.load(workspace_ptr + group * words + 2 * part, volatile=True) >> 32) + 1) & 0xFFFFFFFF
    w = col
    if HAS_WEIGHT:
        w = load_chunk(w_ptr, 0, 0, col, mask)
    dw = tl.zeros([BLOCK_COLS], dtype=tl.float32)
    x, dy = tl.zeros([BLOCK_COLS], dtype=x_ptr.dtype.element_ty), tl.zeros([BLOCK_COLS], dtype=dy_ptr.dtype.element_ty)
    for following in tl.range(group, rows.to(tl.int32) + groups, groups, num_stages=STAGES):
        in_row = col < tl.where(following < rows, end, 0)
        next_x = load_chunk(x_ptr, following, x_stride, col, in_row)
        next_dy = load_chunk(dy_ptr, following, dy_stride, col, in_row)
        if following < rows:
            squares, products = chunk_sums(next_x, next_dy, w, PTX, HAS_WEIGHT, WEIGHT_OFFSET)
            slots_ptr = workspace_ptr + following * words + 2 * part
            publish(slots_ptr, mark, squares)
            publish(slots_ptr + 1, mark, products)
        row = following - groups
        dsum = None
        if dsum_ptr is not None:
            dsum = load_chunk(dsum_ptr, row, dx_stride, col, col < tl.where(row >= 0, end, 0))
        if row >= 0:
            slots_ptr = workspace_ptr + row * words
            arrived, squares, products = look(slots_ptr, words, mark, SLOTS, PTX)
            polls = max_polls
            while (arrived < words) & (polls > 0):
                arrived, squares, products = look(slots_ptr, words, mark, SLOTS, PTX)
                polls -= 1
            if arrived < words:
                index = tl.arange(0, SLOTS)
                sums = tl.zeros([SLOTS], dtype=tl.float32)
                for other in range(split):
                    other_col = other * chunk + tl.arange(0, BLOCK_COLS)
                    other_mask = other_col < tl.minimum((other + 1) * chunk, aligned_cols) // ALIGN * ALIGN
                    other_w = other_col
                    if HAS_WEIGHT:
                        other_w = load_chunk(w_ptr, 0, 0, other_col, other_mask)
                    other_x = load_chunk(x_ptr, row, x_stride, other_col, other_mask)
                    other_dy = load_chunk(dy_ptr, row, dy_stride, other_col, other_mask)
                    other_squares, other_products = chunk_sums(other_x, other_dy, other_w, PTX, HAS_WEIGHT, WEIGHT_OFFSET)
                    sums = tl.where(index == 2 * other, other_squares, tl.where(index == 2 * other + 1, other_products, sums))
                _, squares, products = add_up(index < words, sums, SLOTS, PTX)
            rstd = tl.rsqrt(squares * inverse_cols + eps)
            projection = products * rstd * inverse_cols
            x_hat = keep_packed(x, PTX).to(tl.float32) * rstd
            row_dy = keep_packed(dy, PTX)
            if partials_ptr is not None:
                dw = tl.fma(row_dy.to(tl.float32), x_hat, dw)
            if dx_ptr is not None:
                g = weighted(row_dy, keep_packed(w, PTX) if HAS_WEIGHT else w, HAS_WEIGHT, WEIGHT_OFFSET)
                gradient = input_gradient(x_hat, g, rstd, projection, dsum)
                dx = gradient.to(dx_ptr.dtype.element_ty)
                tl.store(dx_ptr + row * dx_stride + col, dx, mask=mask)
                if daddend_ptr is not None:
                    tl.store(daddend_ptr + row * dx_stride + col, gradient.to(daddend_ptr.dtype.element_ty), mask=mask)
        x, dy = next_x, next_dy
    if partials_ptr is not None:
        tl.store(partials_ptr + group * dx_stride + col, dw, mask=mask)


kernel = backward_split_row_kernel


def grid(args: Mapping[str, Any]) -> tuple[int, int, int]:
    return (split_of(args), partial_rows(args), 1)


def partial_rows(args: Mapping[str, Any]) -> int:
    return walkers(args, 1, args["sm_count"] * args["PROGRAMS_PER_SM"] // split_of(args))


def workspace_words(args: Mapping[str, Any]) -> int:
    """64-bit words of zeroed workspace that a launch needs: two sums a part of each row."""
    return 2 * args["rows"] * split_of(args)
