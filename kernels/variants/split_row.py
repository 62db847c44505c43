"""Several programs share one row in one launch: each keeps its chunk in registers while they exchange their partial sums.

Every program loads its chunk once, in pieces of one or two vectors a thread, and publishes the chunk's sum of squares in its slot of a
workspace (`exchange`). It reads all slots of the row until each carries the mark, adds the sums up in the order of the slots, scales its
chunk and stores it. One write and about one read through L2 lie between load and store.

Replays need no reset: the mark is one more than the one that the program finds in its slot, and all slots of a row carry the same,
because every launch that touches a row writes each of its slots once. Results are deterministic: who arrives when decides nothing.

No deadlock, whatever else runs on the GPU: the wait is bounded. A program that has looked `max_polls` times in vain (programs of its
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
    both_sums,
    full_pieces,
    has_two_strides,
    held_bytes_fit,
    keep_packed,
    load_chunk,
    load_piece,
    load_summed_piece,
    next_power_of_2,
    prune_configs,
    row_start,
    scaled,
    store_piece,
    sums_of_all_chunks,
)
from kernels.variants.exchange import find, publish
from tuning_db.model import ADD_FORWARD, FORWARD, NO_WEIGHT, Device, Problem

OPS = (FORWARD, ADD_FORWARD)
REVISION = 2
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
    return held_bytes_fit(chunk, problem, weight_first=params["weight_first"], num_warps=params["num_warps"], warp_size=device.warp_size)


def split_of(args: Mapping[str, Any]) -> int:
    """Programs a row: as few as the largest chunk allows. Fewer would need larger chunks, so the last part is never empty."""
    return -(-args["cols"] // (args["BLOCK_COLS"] * args["MAX_PIECES"]))


def slots_at_once(args: Mapping[str, Any]) -> int:
    """A power of two that holds a row's slots and gives every warp some: then all warps see the one result of a reduction."""
    return max(next_power_of_2(split_of(args)), args["num_warps"] * (32 if args["PTX"] else 64))


@triton.jit
def add_up(is_here, values, PTX: tl.constexpr):
    """How many are here, and the sum of their values."""
    return both_sums(is_here.to(tl.int32), tl.where(is_here, values, 0.0), 0, False, PTX)


@triton.jit
def look(row_slots_ptr, split, mark, SLOTS: tl.constexpr, PTX: tl.constexpr):
    """How many of a row's slots carry the mark, and the sum of what they hold."""
    is_here, values = find(row_slots_ptr, split, mark, SLOTS)
    return add_up(is_here, values, PTX)


@triton.autotune(
    configs=[
        triton.Config({"BLOCK_COLS": block_cols, "MAX_PIECES": max_pieces, "WEIGHT_FIRST": weight_first}, num_warps=num_warps)
        for block_cols, num_warps in ((1024, 4), (2048, 8), (4096, 8))
        for max_pieces in (1, 2, 4, 8)
        for weight_first in ((True, False) if max_pieces < 8 else (False,))  # so much of x leaves no registers for the weight
    ],
    key=["cols", "rows"],
    prune_configs_by=prune_configs(is_valid),
)
@triton.heuristics(
    {
        "PIECES": lambda args: -(-args["cols"] // (split_of(args) * args["BLOCK_COLS"])),
        "SLOTS": slots_at_once,
        "ALIGN": align_elements,
        "FULL_PIECES": lambda args: full_pieces(args, split_of(args)),
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
    row_divisor: tl.int64,
    x_skip: tl.int64,
    x_row_stride: tl.int64,
    y_skip: tl.int64,
    y_row_stride: tl.int64,
    max_polls: tl.int32,
    PTX: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    ROUND_NORMALIZED: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    MAX_PIECES: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    PIECES: tl.constexpr,
    SLOTS: tl.constexpr,
    ALIGN: tl.constexpr,
    FULL_PIECES: tl.constexpr,
    TWO_STRIDE: tl.constexpr,
    addend_ptr=None,
    sum_ptr=None,
):
    part = tl.program_id(0)  # the parts of a row are neighbours in launch order
    split = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    x_row_ptr = row_start(x_ptr, row, row_divisor, x_skip, x_row_stride, ALIGN, TWO_STRIDE)
    y_row_ptr = row_start(y_ptr, row, row_divisor, y_skip, y_row_stride, ALIGN, TWO_STRIDE)
    addend_row_ptr = None
    if addend_ptr is not None:
        addend_row_ptr = row_start(addend_ptr, row, row_divisor, y_skip, y_row_stride, ALIGN, TWO_STRIDE)
    aligned_cols = cols // ALIGN * ALIGN
    chunk = PIECES * BLOCK_COLS
    if FULL_PIECES < PIECES:  # near-equal chunks, each starting on an aligned column, as in full_pieces
        chunk = tl.cdiv(tl.cdiv(cols, split), ALIGN) * ALIGN
    HAS_WEIGHT: tl.constexpr = w_ptr is not None
    row_slots_ptr = workspace_ptr + row * split
    mark = ((tl.load(row_slots_ptr + part, volatile=True) >> 32) + 1) & 0xFFFFFFFF

    start = part * chunk
    end = tl.minimum(start + chunk, aligned_cols) // ALIGN * ALIGN
    weights = ()
    if HAS_WEIGHT and WEIGHT_FIRST:
        for i in tl.static_range(PIECES):
            at = start + i * BLOCK_COLS
            weights = weights + (load_piece(w_ptr, at, end, BLOCK_COLS, i >= FULL_PIECES),)
    pieces, partial = load_chunk(x_row_ptr, addend_row_ptr, start, end, BLOCK_COLS, PIECES, FULL_PIECES)
    publish(row_slots_ptr + part, mark, partial)
    if addend_ptr is not None:
        sum_row_ptr = row_start(sum_ptr, row, row_divisor, x_skip, x_row_stride, ALIGN, TWO_STRIDE)
        for i in tl.static_range(PIECES):
            store_piece(sum_row_ptr, pieces[i], start + i * BLOCK_COLS, end, BLOCK_COLS, i >= FULL_PIECES)
    arrived, squares = look(row_slots_ptr, split, mark, SLOTS, PTX)
    polls = max_polls
    while (arrived < split) & (polls > 0):
        arrived, squares = look(row_slots_ptr, split, mark, SLOTS, PTX)
        polls -= 1

    inverse_cols = 1.0 / cols
    if arrived == split:
        rstd = tl.rsqrt(squares * inverse_cols + eps)
        for i in tl.static_range(PIECES):
            at = start + i * BLOCK_COLS
            w = pieces[i]
            if HAS_WEIGHT and WEIGHT_FIRST:
                w = weights[i]
            if HAS_WEIGHT and not WEIGHT_FIRST:
                w = load_piece(w_ptr, at, end, BLOCK_COLS, i >= FULL_PIECES)
            y = scaled(keep_packed(pieces[i], PTX), w, rstd, HAS_WEIGHT, WEIGHT_OFFSET, ROUND_NORMALIZED, y_ptr.dtype.element_ty)
            store_piece(y_row_ptr, y, at, end, BLOCK_COLS, i >= FULL_PIECES)
    else:
        sums = sums_of_all_chunks(x_row_ptr, addend_row_ptr, chunk, split, aligned_cols, SLOTS, ALIGN, BLOCK_COLS, PIECES, FULL_PIECES)
        _, squares = add_up(tl.arange(0, SLOTS) < split, sums, PTX)
        rstd = tl.rsqrt(squares * inverse_cols + eps)
        for at in range(start, end, BLOCK_COLS):
            x = load_summed_piece(x_row_ptr, addend_row_ptr, at, end, BLOCK_COLS, True)
            w = x
            if HAS_WEIGHT:
                w = load_piece(w_ptr, at, end, BLOCK_COLS, True)
            y = scaled(x, w, rstd, HAS_WEIGHT, WEIGHT_OFFSET, ROUND_NORMALIZED, y_ptr.dtype.element_ty)
            store_piece(y_row_ptr, y, at, end, BLOCK_COLS, True)


kernel = split_row_kernel


def grid(args: Mapping[str, Any]) -> tuple[int, int, int]:
    return (split_of(args), args["rows"], 1)


def workspace_words(args: Mapping[str, Any]) -> int:
    """64-bit words of zeroed workspace that a launch needs: a slot for every part of every row."""
    return args["rows"] * split_of(args)
