"""What the kernels share: row addressing, alignment facts, the packed-register trick, and the constexprs derived from a call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import triton
import triton.language as tl

from kernels.geometry import problem_of
from tuning_db.model import ADD_FORWARD, FORWARD, NO_WEIGHT, Device, ParamValue, Problem, itemsize

IsValid: TypeAlias = Callable[[Mapping[str, Any], Problem, Device], bool]
ProblemOf: TypeAlias = Callable[[Mapping[str, Any]], Problem]

ROW_INTEGERS = ("rows", "cols", "row_divisor", "x_skip", "x_row_stride", "y_skip", "y_row_stride")
"""Arguments of every kernel of rows with adjacent elements, `do_not_specialize`d: their values compile nothing."""

VECTOR_BYTES = 16
"""The widest load a thread issues on NVIDIA and AMD GPUs alike."""


@triton.jit
def row_start(ptr, row, row_divisor, skip, row_stride, ALIGN: tl.constexpr, TWO_STRIDE: tl.constexpr):
    """Pointer to the first element of a row. The strides are multiples of ALIGN elements, and the compiler is told so.

    With two strides, `skip` elements lie behind every group of rows beyond the stride of the next row, see `divisor_of`.
    """
    # x // ALIGN * ALIGN equals x here; written out, it is what lets loads be vectorised without specialising the stride's value.
    ptr += row * (row_stride // ALIGN * ALIGN)
    if TWO_STRIDE:
        product = row.to(tl.uint32).to(tl.uint64) * row_divisor.to(tl.uint32).to(tl.uint64)
        group = product >> (row_divisor.to(tl.uint64) >> 32)
        ptr += group.to(tl.int64) * (skip // ALIGN * ALIGN)
    return ptr


@triton.jit
def keep_packed(x, PTX: tl.constexpr):
    """x itself, in a form the compiler can't connect with the x before it.

    A 16-bit x is needed in fp32 twice: for the sum and for the result. The compiler would convert once and keep the fp32 copy alive
    across the reduction, twice the registers (88 instead of 64 at 64 elements a thread on sm_90). Behind an opaque move it converts
    twice and keeps the packed copy. PTX only: elsewhere x is returned as it is.
    """
    if PTX and x.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)
    else:
        return x


@triton.jit
def normalized(x, rstd, ROUND_NORMALIZED: tl.constexpr):
    """x * rstd in fp32; with ROUND_NORMALIZED rounded to x's dtype and back."""
    y = x.to(tl.float32) * rstd
    if ROUND_NORMALIZED:
        y = y.to(x.dtype).to(tl.float32)
    return y


@triton.jit
def effective_weight(w, WEIGHT_OFFSET: tl.constexpr):
    """w + WEIGHT_OFFSET in fp32."""
    w = w.to(tl.float32)
    if WEIGHT_OFFSET != 0.0:
        w = w + WEIGHT_OFFSET
    return w


@triton.jit
def scaled(
    x, w, rstd, HAS_WEIGHT: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, ROUND_NORMALIZED: tl.constexpr, out_dtype: tl.constexpr
):  # fmt: skip
    """x * rstd * (w + WEIGHT_OFFSET) in fp32, rounded to out_dtype at the end."""
    y = normalized(x, rstd, ROUND_NORMALIZED)
    if HAS_WEIGHT:
        y = y * effective_weight(w, WEIGHT_OFFSET)
    return y.to(out_dtype)


@triton.jit
def add_pairs(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit
def both_sums(a, b, AXIS: tl.constexpr, KEEP_DIMS: tl.constexpr, PTX: tl.constexpr):
    """The sums of a and of b along an axis, with the barriers of one reduction (H100: 1 to 5 % of a backward).

    Of two where a reduction of pairs costs more than that, as in Triton's interpreter: a Python loop over all elements.
    """
    if PTX:
        return tl.reduce((a, b), AXIS, add_pairs, keep_dims=KEEP_DIMS)
    else:
        return tl.sum(a, AXIS, keep_dims=KEEP_DIMS), tl.sum(b, AXIS, keep_dims=KEEP_DIMS)


@triton.jit
def sum_of(x, addend):
    """x + addend in fp32, rounded once to x's dtype."""
    return (x.to(tl.float32) + addend.to(tl.float32)).to(x.dtype)


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
def load_summed_piece(x_ptr, addend_ptr, start, end, BLOCK_COLS: tl.constexpr, MASKED: tl.constexpr):
    """A piece of what is normalised: of x, or of x + addend where there is one."""
    x = load_piece(x_ptr, start, end, BLOCK_COLS, MASKED)
    if addend_ptr is not None:
        x = sum_of(x, load_piece(addend_ptr, start, end, BLOCK_COLS, MASKED))
    return x


@triton.jit
def load_chunk(x_row_ptr, addend_row_ptr, start, end, BLOCK_COLS: tl.constexpr, PIECES: tl.constexpr, FULL_PIECES: tl.constexpr):
    """The pieces of a chunk as normalised, and its sum of squares: the one way to form it, so that whoever does gets the same bits."""
    pieces = ()
    squares = tl.zeros([BLOCK_COLS], dtype=tl.float32)
    for i in tl.static_range(PIECES):
        x = load_summed_piece(x_row_ptr, addend_row_ptr, start + i * BLOCK_COLS, end, BLOCK_COLS, i >= FULL_PIECES)
        pieces = pieces + (x,)
        x_f32 = x.to(tl.float32)
        squares = tl.fma(x_f32, x_f32, squares)  # written out: the compiler may not choose where to round
    return pieces, tl.sum(squares)


@triton.jit
def sums_of_all_chunks(
    x_row_ptr, addend_row_ptr, chunk, split, cols, SLOTS: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_COLS: tl.constexpr, PIECES: tl.constexpr, FULL_PIECES: tl.constexpr,
):  # fmt: skip
    """What load_chunk sums for each of the `split` chunks of a row, by a program that reads them all; zeros up to SLOTS."""
    sums = tl.zeros([SLOTS], dtype=tl.float32)
    for part in range(split):
        start = part * chunk
        end = tl.minimum(start + chunk, cols) // ALIGN * ALIGN
        _, partial = load_chunk(x_row_ptr, addend_row_ptr, start, end, BLOCK_COLS, PIECES, FULL_PIECES)
        sums = tl.where(tl.arange(0, SLOTS) == part, partial, sums)
    return sums


def align_elements(args: Mapping[str, Any]) -> int:
    """Largest power of two up to 16 elements that divides cols and every row stride."""
    strides = (args["x_row_stride"], args["y_row_stride"], args["x_skip"], args["y_skip"])
    return math.gcd(16, args["cols"], *strides)


def has_two_strides(args: Mapping[str, Any]) -> bool:
    return args["row_divisor"] > 0


def full_pieces(args: Mapping[str, Any], split: int) -> int:
    """How many pieces of a chunk no program has cut short, of a row in `split` near-equal chunks: they carry no mask.

    A chunk is cols / split, rounded up to ALIGN columns. The last one is the shortest.
    """
    chunk = -(-args["cols"] // split)
    chunk = -(-chunk // args["ALIGN"]) * args["ALIGN"]
    last = args["cols"] - (split - 1) * chunk
    return int(min(chunk, last) // args["BLOCK_COLS"])


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def octaves(ratio: float) -> float:
    """How far a ratio is from 1, whichever way: |log2 ratio|."""
    return abs(math.log2(ratio))


def row_block(cols: int) -> int:
    """Block of a program that holds whole rows. At least two columns: `keep_packed` moves pairs of 16-bit elements."""
    return max(2, next_power_of_2(cols))


WHOLE_ROWS = {
    "BLOCK_COLS": lambda args: row_block(args["cols"]),
    "EXACT": lambda args: row_block(args["cols"]) == args["cols"],
    "ALIGN": align_elements,
    "TWO_STRIDE": has_two_strides,
}
"""`triton.heuristics` of the kernels that hold whole rows."""


def elements_per_thread_fit(elements: int, itemsize: int, num_warps: int, warp_size: int) -> bool:
    """Whether a tile gives each thread at least one full vector (or is a single warp's) and at most 64 elements in registers."""
    per_thread = elements // (num_warps * warp_size)
    return per_thread <= 64 and (num_warps == 1 or per_thread * itemsize >= VECTOR_BYTES)


MAX_HELD_BYTES = 128
"""Of x and, if loaded first, weight that a thread holds while programs wait for each other: 64 registers do; twice as much spills, or
halves the programs of an SM."""


def held_bytes_fit(elements: int, problem: Problem, *, weight_first: bool, num_warps: int, warp_size: int) -> bool:
    """Whether a thread's share of `elements` of a row is at least a vector of x and at most MAX_HELD_BYTES."""
    per_thread = elements // (num_warps * warp_size)
    x_bytes = per_thread * itemsize(problem.x_dtype)
    w_bytes = per_thread * itemsize(problem.w_dtype) if weight_first and problem.w_dtype != NO_WEIGHT else 0
    return x_bytes >= VECTOR_BYTES and x_bytes + w_bytes <= MAX_HELD_BYTES


def prune_configs(is_valid: IsValid, problem_of_named: ProblemOf | None = None) -> dict[str, Any]:
    """`prune_configs_by` for `triton.autotune`: the configs of the space that `is_valid` accepts for the call's arguments.

    `problem_of_named` makes a Problem of those; by default `problem_of_call`.
    """

    def early_config_prune(configs: list[triton.Config], named_args: Mapping[str, Any], **_: Any) -> list[triton.Config]:
        from kernels.device import current_device  # asks the GPU, so not at import

        problem = (problem_of_named or problem_of_call)(named_args)
        device = current_device()
        return [config for config in configs if is_valid(config_params(config), problem, device)]

    return {"early_config_prune": early_config_prune}


def config_params(config: triton.Config) -> dict[str, ParamValue]:
    """A triton.Config as the params of a Config: constexprs in lower case, and the launch options that are tuned."""
    params = {name.lower(): value for name, value in config.kwargs.items()}
    params["num_warps"] = config.num_warps
    if config.maxnreg is not None:
        params["maxnreg"] = config.maxnreg
    return params


def problem_of_call(args: Mapping[str, Any]) -> Problem:
    """The Problem behind the named arguments of a kernel call."""
    if "x_col_stride" in args:
        layout = "strided_axis"
    else:
        layout = "two_stride" if has_two_strides(args) else "contiguous"
    x_dtype, y_dtype = (str(args[name].dtype).removeprefix("torch.") for name in ("x_ptr", "y_ptr"))
    w_dtype = NO_WEIGHT if args["w_ptr"] is None else str(args["w_ptr"].dtype).removeprefix("torch.")
    op = FORWARD if args.get("addend_ptr") is None else ADD_FORWARD
    return problem_of(layout, args["rows"], args["cols"], args.get("inner_rows", 0), (x_dtype, w_dtype, y_dtype), op)
