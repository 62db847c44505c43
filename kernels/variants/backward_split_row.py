"""Backward of wide rows: each program owns a chunk of columns, with its part of dw in registers, and walks rows in step with the others.

The programs of a group own the chunks of the same rows. For each row a program publishes the sums of x² and g · x over its chunk, adds
one to the row's counter and waits until all have. The counter only grows, by the number of chunks a launch, so that a replay needs no
reset. The wait is bounded, as in `split_row`: whoever waits in vain forms the sums itself, with the same bits. Each row has a slot of its
own in the workspace, so that a program that did not wait may run ahead. dx must not overwrite x or dy, which others may still have to
read.

A program publishes a row ahead: what it waits for at a row was published by the others a turn ago, so that the two microseconds that an
arrival takes to be seen are spent at work. Between the two a row's chunk is given up, not held: registers are what limits how many
columns an SM owns, and the second read of a few KB, a turn or two after the first, is meant to hit L1 or else L2. The chunk after the
next is on its way to registers meanwhile.

Bytes: x and dy once, dx once, partial rows of dw one a group: with 16 groups and 512 rows 2 % of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from kernels.variants.backward_common import (
    INTEGERS,
    REGISTERS_PER_SM,
    align_elements,
    input_gradient,
    problem_of_call,
    walkers,
    weighted,
)
from kernels.variants.common import elements_per_thread_fit, next_power_of_2, prune_configs
from tuning_db.model import ADD_BACKWARD, BACKWARD, Device, Problem, itemsize

OPS = (BACKWARD, ADD_BACKWARD)
REVISION = 1
LAYOUTS = ("contiguous",)
IN_PLACE = False

MAX_SPLIT = 256
MAX_ROWS = 2**22
"""Slots of the workspace are counted in 32 bits. A slot takes 8 bytes a chunk and 8 more, some 1 % of what the row takes at most."""


def is_valid(params: Mapping[str, Any], problem: Problem, device: Device) -> bool:
    block_cols, num_warps = params["block_cols"], params["num_warps"]
    if problem.layout not in LAYOUTS or problem.rows > MAX_ROWS:
        return False
    split = -(-problem.cols // block_cols)
    # The programs of a row wait for each other: all of them must run at once.
    if not 2 <= split <= min(MAX_SPLIT, device.sm_count * params["programs_per_sm"]):
        return False
    return elements_per_thread_fit(block_cols, itemsize(problem.x_dtype), num_warps, device.warp_size)


def split_of(args: Mapping[str, Any]) -> int:
    """Programs a row."""
    return -(-args["cols"] // args["BLOCK_COLS"])


@triton.jit
def load_chunk(ptr, row, row_stride, col, mask):
    return tl.load(ptr + row * row_stride + col, mask=mask, other=0.0)


@triton.jit
def chunk_sums(x, dy, w, HAS_WEIGHT: tl.constexpr):
    """Σ x² and Σ g · x of a chunk: the one way to form them, so that whoever does gets the same bits."""
    x_f32 = x.to(tl.float32)
    zeros = tl.zeros_like(x_f32)
    # Written out: the compiler may not choose where to round.
    return tl.sum(tl.fma(x_f32, x_f32, zeros)), tl.sum(tl.fma(weighted(dy, w, HAS_WEIGHT), x_f32, zeros))


@triton.jit
def publish(slot_ptr, part, x, dy, w, HAS_WEIGHT: tl.constexpr):
    """Store a chunk's sums in its row's slot, a counter and then two fp32 sums a part; the counter's value before this arrival."""
    sums_ptr = (slot_ptr + 1).to(tl.pointer_type(tl.float32), bitcast=True)
    squares, products = chunk_sums(x, dy, w, HAS_WEIGHT)
    tl.store(sums_ptr + 2 * part, squares)
    tl.store(sums_ptr + 2 * part + 1, products)
    return tl.atomic_add(slot_ptr, 1, sem="acq_rel")


@triton.autotune(
    configs=[
        triton.Config(
            {"BLOCK_COLS": block_cols, "PROGRAMS_PER_SM": programs_per_sm},
            num_warps=num_warps,
            maxnreg=min(255, REGISTERS_PER_SM // (programs_per_sm * num_warps * 32)),  # so that as many run at once, and keep in step
        )
        for block_cols, num_warps, programs_per_sm in (
            *((1024, 4, 4), (1024, 4, 5), (2048, 4, 4), (2048, 8, 1), (2048, 8, 2)),
            *((4096, 8, 1), (4096, 8, 2), (4096, 16, 1), (8192, 16, 1)),
        )
    ],
    key=["cols", "rows"],
    prune_configs_by=prune_configs(is_valid, problem_of_call),
)
@triton.heuristics(
    {
        "PARTS": lambda args: next_power_of_2(split_of(args)),
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
    BLOCK_COLS: tl.constexpr,
    PROGRAMS_PER_SM: tl.constexpr,
    PARTS: tl.constexpr,
    EXACT: tl.constexpr,
    ALIGN: tl.constexpr,
    dsum_ptr=None,
    daddend_ptr=None,
):
    part, group = tl.program_id(0), tl.program_id(1)  # the parts of a row are neighbours in launch order
    split, groups = tl.num_programs(0), tl.num_programs(1)
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
    index = tl.arange(0, PARTS)
    w = col
    if HAS_WEIGHT:
        w = tl.load(w_ptr + col, mask=mask, other=None if EXACT else 0.0)
    dw = tl.zeros([BLOCK_COLS], dtype=tl.float32)
    # Ahead by one turn: this row's sums are published, the chunk of the row after it is loaded.
    x = load_chunk(x_ptr, group, x_stride, col, col < end)
    dy = load_chunk(dy_ptr, group, dy_stride, col, col < end)
    before = publish(workspace_ptr + group * (1 + PARTS), part, x, dy, w, HAS_WEIGHT)
    in_row = col < tl.where(group + groups < rows, end, 0)
    x = load_chunk(x_ptr, group + groups, x_stride, col, in_row)
    dy = load_chunk(dy_ptr, group + groups, dy_stride, col, in_row)
    for row in range(group, rows.to(tl.int32), groups):
        following = row + groups
        in_row = col < tl.where(following + groups < rows, end, 0)
        next_x = load_chunk(x_ptr, following + groups, x_stride, col, in_row)
        next_dy = load_chunk(dy_ptr, following + groups, dy_stride, col, in_row)
        before_following = before
        if following < rows:
            before_following = publish(workspace_ptr + following * (1 + PARTS), part, x, dy, w, HAS_WEIGHT)
        x, dy = next_x, next_dy

        slot_ptr = workspace_ptr + row * (1 + PARTS)
        target = before - before % split + split
        before = before_following
        arrived = tl.atomic_add(slot_ptr, 0, sem="acquire")
        polls = max_polls
        while (arrived < target) & (polls > 0):
            arrived = tl.atomic_add(slot_ptr, 0, sem="acquire")
            polls -= 1
        if arrived >= target:
            sums_ptr = (slot_ptr + 1).to(tl.pointer_type(tl.float32), bitcast=True)
            squares = tl.load(sums_ptr + 2 * index, mask=index < split, other=0.0, cache_modifier=".cg")
            products = tl.load(sums_ptr + 2 * index + 1, mask=index < split, other=0.0, cache_modifier=".cg")
        else:
            squares = tl.zeros([PARTS], dtype=tl.float32)
            products = tl.zeros([PARTS], dtype=tl.float32)
            for other in range(split):
                other_col = other * chunk + tl.arange(0, BLOCK_COLS)
                other_mask = other_col < tl.minimum((other + 1) * chunk, aligned_cols) // ALIGN * ALIGN
                other_w = other_col
                if HAS_WEIGHT:
                    other_w = tl.load(w_ptr + other_col, mask=other_mask, other=0.0)
                other_x = load_chunk(x_ptr, row, x_stride, other_col, other_mask)
                other_dy = load_chunk(dy_ptr, row, dy_stride, other_col, other_mask)
                other_squares, other_products = chunk_sums(other_x, other_dy, other_w, HAS_WEIGHT)
                squares = tl.where(index == other, other_squares, squares)
                products = tl.where(index == other, other_products, products)

        rstd = tl.rsqrt(tl.sum(squares) / cols + eps)
        projection = tl.sum(products) * rstd / cols
        x_hat = load_chunk(x_ptr, row, x_stride, col, col < end).to(tl.float32) * rstd
        row_dy = load_chunk(dy_ptr, row, dy_stride, col, col < end)
        if partials_ptr is not None:
            dw = tl.fma(row_dy.to(tl.float32), x_hat, dw)
        if dx_ptr is not None:
            dsum = None
            if dsum_ptr is not None:
                dsum = load_chunk(dsum_ptr, row, dx_stride, col, col < end)
            gradient = input_gradient(x_hat, weighted(row_dy, w, HAS_WEIGHT), rstd, projection, dsum)
            dx = gradient.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + row * dx_stride + col, dx, mask=mask)
            if daddend_ptr is not None:
                tl.store(daddend_ptr + row * dx_stride + col, gradient.to(daddend_ptr.dtype.element_ty), mask=mask)
    if partials_ptr is not None:
        tl.store(partials_ptr + group * dx_stride + col, dw, mask=mask)


kernel = backward_split_row_kernel


def grid(args: Mapping[str, Any]) -> tuple[int, int, int]:
    return (split_of(args), partial_rows(args), 1)


def partial_rows(args: Mapping[str, Any]) -> int:
    return walkers(args, 1, args["sm_count"] * args["PROGRAMS_PER_SM"] // split_of(args))


def workspace_words(args: Mapping[str, Any]) -> int:
    """64-bit words of zeroed workspace that a launch needs: per row a counter and two sums a part, one part a word."""
    return args["rows"] * (1 + args["PARTS"])
