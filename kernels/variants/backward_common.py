"""What the backward kernels share: the gradient's formula, who walks which rows, and the Problem behind a call.

With rstd = 1 / sqrt(mean(x²) + eps), x̂ = x · rstd and g = dy · w, of y = x̂ · w:
    dx = rstd · (g − x̂ · mean(g · x̂)), a row at a time
    dw = Σ over rows of dy · x̂, in fp32
A weight offset counts as part of w; a rounding of x̂ before the multiplication by w counts as none.
Where x is the sum that add_rmsnorm also returned, dsum arrives there: dx + dsum is the gradient of both addends, stored once in each dtype.

rstd is formed anew from x: x must be read for dx and dw anyway, and the whole row is at hand when g · x is summed, so that the second
sum costs no memory traffic, while keeping rstd would cost the forward a store and the graph a tensor.

dw needs all rows of a column. A program keeps its part of dw in fp32 registers while it walks rows (every `programs`-th), and stores it
as one partial row at its end; `column_sum` adds those up. Nothing depends on who comes when: the bits are the same in every run.
With PDL (NVIDIA's programmatic dependent launch, see `kernels.device.has_pdl`) its programs start as soon as all of this launch run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from kernels.geometry import problem_of
from kernels.variants.common import effective_weight
from tuning_db.model import ADD_BACKWARD, BACKWARD, NO_WEIGHT, Problem, itemsize

INTEGERS = ("rows", "cols", "x_row_stride", "y_row_stride")
"""Arguments of every backward kernel, `do_not_specialize`d: their values compile nothing."""

MAX_ROWS = 2**30
"""Rows are counted in 32 bits within a kernel; a bucket stands for up to 1.23 times its rows."""

MAX_TURNS = 1024
"""Most terms that one fp32 accumulator of dw takes in one after the other; where rows are so many, there are more programs."""


REGISTERS_PER_SM = 65536
"""Of NVIDIA GPUs since sm_70."""


def registers_fit(elements: int, problem: Problem, num_warps: int, warp_size: int, programs_per_sm: int) -> bool:
    """Whether programs that hold so many elements each have the registers to run on an SM at once.

    A thread has at most 255. It needs some 12, and 5.8 an element: dw and w in fp32, x and dy packed and, at the worst point, in fp32. Seen
    with Triton 3.9 for sm_90 in `backward_whole_row`: 59 at 8 elements, 106 at 16, 197 at 32, in bf16 and fp32 alike. With a sum's
    gradient, and that or dy in fp32, it is 8: at 32 elements it spills, beside the other in 16 bits also 16 elements in 16 warps.
    """
    an_element = 8 if problem.adds and max(itemsize(problem.x_dtype), itemsize(problem.y_dtype)) > 2 else 5.8
    per_thread = 12 + an_element * (elements // (num_warps * warp_size))
    return per_thread <= min(255, REGISTERS_PER_SM // (num_warps * warp_size * programs_per_sm))


@triton.jit
def weighted(dy, w, HAS_WEIGHT: tl.constexpr, WEIGHT_OFFSET: tl.constexpr):
    """g = dy · (w + WEIGHT_OFFSET) in fp32."""
    g = dy.to(tl.float32)
    if HAS_WEIGHT:
        g = g * effective_weight(w, WEIGHT_OFFSET)
    return g


@triton.jit
def input_gradient(x_hat, g, rstd, projection, dsum):
    """rstd · (g − x̂ · mean(g · x̂)), and dsum if there is one, in fp32. In this order nothing overflows that x̂ and g don't."""
    dx = rstd * (g - x_hat * projection)
    if dsum is not None:
        dx = dx + dsum.to(tl.float32)
    return dx


def element_bytes_read(problem: Problem) -> int:
    """Of x, dy and, if there is one, dsum."""
    x_tensors = 2 if problem.adds else 1
    return x_tensors * itemsize(problem.x_dtype) + itemsize(problem.y_dtype)


def walkers(args: Mapping[str, Any], rows_per_turn: int, most: int) -> int:
    """Programs (or groups of them) that walk the rows: at most `most`, more where none may take more than MAX_TURNS turns.

    No more than needed for that many turns: 512 rows in turns of one by at most 132 are walked by 128, four turns each.
    """
    turns = -(-args["rows"] // rows_per_turn)
    return -(-turns // min(MAX_TURNS, -(-turns // max(1, most))))


def align_elements(args: Mapping[str, Any]) -> int:
    """Largest power of two up to 16 elements that divides cols and the row strides of x and dy; dx is packed."""
    return math.gcd(16, args["cols"], args["x_row_stride"], args["y_row_stride"])


def problem_of_call(args: Mapping[str, Any]) -> Problem:
    """The Problem behind the named arguments of a backward kernel's call."""
    x_dtype, dy_dtype = (str(args[name].dtype).removeprefix("torch.") for name in ("x_ptr", "dy_ptr"))
    w_dtype = NO_WEIGHT if args["w_ptr"] is None else str(args["w_ptr"].dtype).removeprefix("torch.")
    op = BACKWARD if args.get("dsum_ptr") is None else ADD_BACKWARD
    return problem_of("contiguous", args["rows"], args["cols"], 0, (x_dtype, w_dtype, dy_dtype), op=op)
