"""Several programs share one row in one launch: each keeps its chunk in registers while they add up their partial sums.

Every program loads its chunk once, in pieces of one or two vectors a thread, stores the chunk's sum of squares in the row's slot of a
workspace, adds one to the row's counter and waits until all programs of the row have. Then each sums the partial sums in the same
order, scales its chunk and stores it.

Replays need no reset: a counter only grows, by exactly `split` a launch, so the count to wait for follows from the count seen on
arrival. It is 64 bits wide and never wraps. Results are deterministic: who arrives when decides nothing.

No deadlock, whatever else runs on the GPU: the wait is bounded. A program that has polled `max_polls` times in vain (programs of its
row can't start because others hold the GPU) reads the whole row itself and forms the same partial sums in the same way and order.
Its result has the same bits, so nothing but time depends on which way a program went. That second read of the row is why the result
may not overwrite the input (`IN_PLACE`): another program may have stored its part already.

The workspace belongs to one stream at a time (`kernels/workspace.py` sees to it), so that no two launches use a slot at once.
"""

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
    keep_packed,
    next_power_of_2,
    prune_configs,
    row_start,
    scaled,
)
from tuning_db.model import FORWARD, NO_WEIGHT, Device, Problem, itemsize

OP = FORWARD
REVISION = 1
LAYOUTS = ("contiguous", "two_stride")
IN_PLACE = False

MAX_SPLIT = 256
MAX_COLS = 2**30  # offsets within a row are 32-bit
MAX_ROWS = 32768  # rows are the grid's second axis, which ends at 65535; a bucket stands for up to 1.23 times its rows
MAX_POLLS = 20_000
"""Some 20 ms on sm_90 at 1 µs a poll: far beyond any wait for programs that are running, short against a watchdog."""


def is_valid(params: Mapping[str, Any], problem: Problem, device: Device) -> bool:
    chunk = params["block_cols"] * params["max_pieces"]
    if problem.layout not in LAYOUTS or problem.rows > MAX_ROWS or problem.cols > MAX_COLS:
        return False
    if problem.w_dtype == NO_WEIGHT and params["weight_first"]:
        return False  # the same binary as weight_first=False
    if not 2 <= -(-problem.cols // chunk) <= MAX_SPLIT:
        return False
    return elements_per_thread_fit(chunk, itemsize(problem.x_dtype), params["num_warps"], device.warp_size)


def split_of(args: Mapping[str, Any]) -> int:
    """Programs a row: as few as the largest chunk allows."""
    return -(-args["cols"] // (args["BLOCK_COLS"] * args["MAX_PIECES"]))


def full_pieces(args: Mapping[str, Any]) -> int:
    """How many pieces of a chunk no program has cut short: they carry no mask.

    The last part of a row is the shortest, and never empty: a chunk has at most MAX_PIECES * BLOCK_COLS columns, and split_of
    makes (split - 1) times that less than cols.
    """
    split = split_of(args)
    chunk = -(-args["cols"] // split)
    chunk = -(-chunk // args["ALIGN"]) * args["ALIGN"]
    last = args["cols"] - (split - 1) * chunk
    return int(min(chunk, last) // args["BLOCK_COLS"])


@triton.jit
def load_piece(ptr, start, end, BLOCK_COLS: tl.constexpr, MASKED: tl.constexpr):
    col = start + tl.arange(0, BLOCK_COLS)
    if MASKED:
        return tl.load(ptr + col, mask=col < end, other=0.0)
    else:
        return tl.load(ptr + col)


@triton.jit
def store_piece(ptr, y, start, end, BLOCK_COLS: tl.constexpr, MASKED: tl.constexpr):
    col = start + tl.arange(0, BLOCK_COLS)
    if MASKED:
        tl.store(ptr + col, y, mask=col < end)
    else:
        tl.store(ptr + col, y)


@triton.jit
def load_chunk(x_row_ptr, start, end, BLOCK_COLS: tl.constexpr, PIECES: tl.constexpr, FULL_PIECES: tl.constexpr):
    """The pieces of a chunk as loaded, and its sum of squares: the one way to form it, so that whoever does gets the same bits."""
    pieces = ()
    squares = tl.zeros([BLOCK_COLS], dtype=tl.float32)
    for i in tl.static_range(PIECES):
        x = load_piece(x_row_ptr, start + i * BLOCK_COLS, end, BLOCK_COLS, i >= FULL_PIECES)
        pieces = pieces + (x,)
        x_f32 = x.to(tl.float32)
        squares = tl.fma(x_f32, x_f32, squares)  # written out: the compiler may not choose where to round
    return pieces, tl.sum(squares)


@triton.autotune(
    configs=[
        triton.Config({"BLOCK_COLS": block_cols, "MAX_PIECES": max_pieces, "WEIGHT_FIRST": weight_first}, num_warps=num_warps)
        for block_cols, num_warps in ((1024, 4), (2048, 8), (4096, 8), (4096, 16))
        for max_pieces in (1, 2, 4, 8)
        for weight_first in (True, False)
    ],
    key=["cols", "rows"],
    prune_configs_by=prune_configs(is_valid),
)
@triton.heuristics(
    {
        "PIECES": lambda args: -(-args["cols"] // (split_of(args) * args["BLOCK_COLS"])),
        "PARTS": lambda args: max(2, next_power_of_2(split_of(args))),
        "ALIGN": align_elements,
        "FULL_PIECES": full_pieces,
        "TWO_STRIDE": has_two_strides,
    }
)
@triton.jit(do_not_specialize=[*ROW_INTEGERS, "max_polls"])
def split_row_kernel(
    y_ptr,
    x_ptr,
    w_ptr,
    workspace_ptr,
    eps: tl.float32,
    rows: tl.int64,
    cols: tl.int32,
    inner_rows: tl.int64,
    x_outer_stride: tl.int64,
    x_row_stride: tl.int64,
    y_outer_stride: tl.int64,
    y_row_stride: tl.int64,
    max_polls: tl.int32,
    PTX: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    MAX_PIECES: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    PIECES: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGN: tl.constexpr,
    FULL_PIECES: tl.constexpr,
    TWO_STRIDE: tl.constexpr,
):
    part = tl.program_id(0)  # the parts of a row are neighbours in launch order
    split = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    x_row_ptr = row_start(x_ptr, row, inner_rows, x_outer_stride, x_row_stride, ALIGN, TWO_STRIDE)
    y_row_ptr = row_start(y_ptr, row, inner_rows, y_outer_stride, y_row_stride, ALIGN, TWO_STRIDE)
    aligned_cols = cols // ALIGN * ALIGN
    chunk = PIECES * BLOCK_COLS
    if FULL_PIECES < PIECES:  # near-equal chunks, each starting on an aligned column, as in full_pieces
        chunk = tl.cdiv(tl.cdiv(cols, split), ALIGN) * ALIGN
    HAS_WEIGHT: tl.constexpr = w_ptr is not None
    # A row's slot: the counter, then one fp32 partial sum a part.
    counter_ptr = workspace_ptr + row * (1 + PARTS // 2)
    partial_ptr = (counter_ptr + 1).to(tl.pointer_type(tl.float32), bitcast=True)

    start = part * chunk
    end = tl.minimum(start + chunk, aligned_cols) // ALIGN * ALIGN
    pieces, partial = load_chunk(x_row_ptr, start, end, BLOCK_COLS, PIECES, FULL_PIECES)
    weights = ()
    if HAS_WEIGHT and WEIGHT_FIRST:
        for i in tl.static_range(PIECES):
            at = start + i * BLOCK_COLS
            weights = weights + (load_piece(w_ptr, at, end, BLOCK_COLS, i >= FULL_PIECES),)
    tl.store(partial_ptr + part, partial)
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    target = before - before % split + split
    arrived = before + 1
    polls = max_polls
    while (arrived < target) & (polls > 0):
        arrived = tl.atomic_add(counter_ptr, 0, sem="acquire")
        polls -= 1

    index = tl.arange(0, PARTS)
    if arrived >= target:
        parts = tl.load(partial_ptr + index, mask=index < split, other=0.0, cache_modifier=".cg")
        rstd = tl.rsqrt(tl.sum(parts) / cols + eps)
        for i in tl.static_range(PIECES):
            at = start + i * BLOCK_COLS
            w = pieces[i]
            if HAS_WEIGHT and WEIGHT_FIRST:
                w = weights[i]
            if HAS_WEIGHT and not WEIGHT_FIRST:
                w = load_piece(w_ptr, at, end, BLOCK_COLS, i >= FULL_PIECES)
            y = scaled(keep_packed(pieces[i], PTX), w, rstd, HAS_WEIGHT, y_ptr.dtype.element_ty)
            store_piece(y_row_ptr, y, at, end, BLOCK_COLS, i >= FULL_PIECES)
    else:
        parts = tl.zeros([PARTS], dtype=tl.float32)
        for other in range(split):
            other_start = other * chunk
            other_end = tl.minimum(other_start + chunk, aligned_cols) // ALIGN * ALIGN
            _, partial = load_chunk(x_row_ptr, other_start, other_end, BLOCK_COLS, PIECES, FULL_PIECES)
            parts = tl.where(index == other, partial, parts)
        rstd = tl.rsqrt(tl.sum(parts) / cols + eps)
        for at in range(start, end, BLOCK_COLS):
            x = load_piece(x_row_ptr, at, end, BLOCK_COLS, True)
            w = x
            if HAS_WEIGHT:
                w = load_piece(w_ptr, at, end, BLOCK_COLS, True)
            store_piece(y_row_ptr, scaled(x, w, rstd, HAS_WEIGHT, y_ptr.dtype.element_ty), at, end, BLOCK_COLS, True)


kernel = split_row_kernel


def grid(args: Mapping[str, Any]) -> tuple[int, int, int]:
    return (split_of(args), args["rows"], 1)


def workspace_words(args: Mapping[str, Any]) -> int:
    """64-bit words of zeroed workspace that a launch needs: per row a counter and the partial sums, two a word."""
    return args["rows"] * (1 + args["PARTS"] // 2)
