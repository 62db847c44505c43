"""The sum of dw's partial rows, in a fixed order: the second launch of a backward with weight.

A launch of its own, and not the last program to arrive: the partial rows are 2 MB at 4096 columns and 132 programs, some 20 µs for one
SM, but 2 µs for all of them; and nothing has to be ordered between programs. It is no variant: its block follows from cols, so that
there are enough programs. A thread adds up every BLOCK_ROWS-th partial row, then a tree adds up the threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from kernels.variants.common import next_power_of_2

NUM_WARPS = 4
TILE = 4096
"""Elements a turn of a program: 32 a thread, eight loads of 16 bytes in flight."""

MIN_BLOCK_COLS = 8
"""One 32-byte sector: less would read sectors twice."""
MAX_BLOCK_COLS = 128


@triton.jit(do_not_specialize=["partial_rows", "cols"])
def column_sum_kernel(
    dw_ptr, partials_ptr, partial_rows: tl.int32, cols: tl.int32,
    PDL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()  # until the launch before has ended, and what it stored can be seen
    col = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    col_mask = col < cols // ALIGN * ALIGN
    stride = (cols // ALIGN * ALIGN).to(tl.int64)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.float32)
    for start in range(0, partial_rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None]
        total += tl.load(partials_ptr + row * stride + col, mask=(row < partial_rows) & col_mask, other=0.0)
    tl.store(dw_ptr + col, tl.sum(total, axis=0, keep_dims=True).to(dw_ptr.dtype.element_ty), mask=col_mask)


kernel = column_sum_kernel


def arguments_for(partial_rows: int, cols: int, *, pdl: bool) -> dict[str, Any]:
    """Every argument of the kernel but pointers, by name."""
    block_cols = min(MAX_BLOCK_COLS, max(MIN_BLOCK_COLS, next_power_of_2(cols) // 128))
    return {
        "partial_rows": partial_rows,
        "cols": cols,
        "PDL": pdl,
        "BLOCK_ROWS": min(TILE // block_cols, max(16, next_power_of_2(partial_rows))),
        "BLOCK_COLS": block_cols,
        "ALIGN": math.gcd(16, cols),
    }


def grid(args: Mapping[str, Any]) -> tuple[int, int, int]:
    return (-(-args["cols"] // args["BLOCK_COLS"]), 1, 1)
