"""The loop nest of a call addresses each element of x and y exactly once, and is given up only where three strides are needed."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels.geometry import Geometry, divisor_of, geometry_of, geometry_of_problem
from kernels.variants import VARIANTS, is_legal, space
from tuner.architectures import architectures
from tuning_db.model import FORWARD, LAYOUTS, Problem, bucket_rows

H100 = architectures()["sm_90"].device


@st.composite
def layouts(draw, shape: Sequence[int], expand: bool = False) -> tuple[int, ...]:
    """Strides for `shape`: the dimensions in any order in memory, with gaps, and with `expand` some of stride 0."""
    strides = [0] * len(shape)
    step = draw(st.integers(1, 3))
    for dim in draw(st.permutations(range(len(shape)))):
        strides[dim] = step
        step = step * shape[dim] + draw(st.sampled_from([0, 0, 0, 1, 5]))
    if expand:
        strides = [0 if draw(st.integers(0, 5)) == 0 else stride for stride in strides]
    return tuple(strides)


@st.composite
def calls(draw) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Shape, strides of x and of y, axis."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)))
    x_strides = draw(layouts(shape, expand=True))
    y_strides = draw(st.one_of(st.just(empty_like_strides(shape, x_strides)), layouts(shape)))
    return shape, x_strides, y_strides, draw(st.integers(0, len(shape) - 1))


def empty_like_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()


def offset(index: Sequence[int], strides: Sequence[int]) -> int:
    return sum(i * stride for i, stride in zip(index, strides, strict=True))


def rows_by_strides(shape: Sequence[int], x_strides: Sequence[int], y_strides: Sequence[int], axis: int) -> list[list[tuple[int, int]]]:
    """For each row the (offset in x, offset in y) of its elements in order of the axis, counted through all indices; rows sorted."""
    rows = []
    for others in itertools.product(*(range(size) for d, size in enumerate(shape) if d != axis)):
        row = [(*others[:axis], col, *others[axis:]) for col in range(shape[axis])]
        rows.append([(offset(at, x_strides), offset(at, y_strides)) for at in row])
    return sorted(rows)


def rows_by_geometry(nest: Geometry) -> list[list[tuple[int, int]]]:
    """The same, as the kernels walk the nest (docstring of Geometry)."""
    rows = []
    for row in range(nest.rows):
        outer, inner = divmod(row, nest.inner_rows) if nest.inner_rows else (0, row)
        x_start = outer * nest.x_outer_stride + inner * nest.x_row_stride
        y_start = outer * nest.y_outer_stride + inner * nest.y_row_stride
        rows.append([(x_start + col * nest.x_col_stride, y_start + col * nest.y_col_stride) for col in range(nest.cols)])
    return sorted(rows)


def fewest_strides(shape: Sequence[int], x_strides: Sequence[int], y_strides: Sequence[int], axis: int) -> int:
    """How many strides the rows need at least, over every order of the dimensions."""
    dims = [(shape[d], x_strides[d], y_strides[d]) for d in range(len(shape)) if d != axis and shape[d] > 1]
    fewest = len(dims)
    for order in itertools.permutations(dims):
        joined = sum(outer[1] == inner[0] * inner[1] and outer[2] == inner[0] * inner[2] for outer, inner in itertools.pairwise(order))
        fewest = min(fewest, len(dims) - joined)
    return fewest


@settings(max_examples=500, deadline=None)
@given(calls())
@example(((2, 3, 4), (0, 4, 1), (12, 4, 1), 2))  # one tensor for all of a batch
@example(((4, 3, 8), (72, 8, 1), (24, 8, 1), 2))  # q of a packed qkv
@example(((3, 4, 8), (8, 24, 1), (8, 24, 1), 2))  # heads first
@example(((5, 1), (1, 1), (1, 1), 1))
@example(((1,), (7,), (1,), 0))
def test_every_element_once(call):
    shape, x_strides, y_strides, axis = call
    nest = geometry_of(shape, x_strides, y_strides, axis)
    if nest is None:
        assert fewest_strides(*call) > 2
        return
    assert rows_by_geometry(nest) == rows_by_strides(*call)
    assert nest.layout in LAYOUTS
    if nest.layout != "strided_axis":
        assert nest.x_col_stride == nest.y_col_stride == 1
    assert (nest.inner_rows == 0) == (nest.layout == "contiguous")


@pytest.mark.parametrize(
    ("shape", "strides", "axis", "layout"),
    [
        ((64, 128), (128, 1), 1, "contiguous"),
        ((64, 128), (200, 1), 1, "contiguous"),
        ((2, 3, 4, 128), (1536, 512, 128, 1), 3, "contiguous"),
        ((128,), (1,), 0, "contiguous"),
        ((64, 1), (1, 1), 1, "contiguous"),
        ((5, 1), (3, 3), 1, "contiguous"),
        ((10, 4, 128), (1536, 128, 1), 2, "two_stride"),
        ((64, 128), (128, 1), 0, "strided_axis"),
        ((2, 64, 128), (8192, 128, 1), 1, "strided_axis"),
        ((128,), (2,), 0, "strided_axis"),
    ],
)
def test_layout_by_name(shape, strides, axis, layout):
    assert geometry_of(shape, strides, empty_like_strides(shape, strides), axis).layout == layout


def test_rows_at_three_strides():
    """q, with a window over the tokens of each batch: batch, token and head each at a stride of their own."""
    strides = (10_000, 1536, 128, 1)
    assert geometry_of((2, 5, 4, 128), strides, (2560, 512, 128, 1), 3) is None


@given(
    rows=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 48]),
    cols=st.integers(1, 9),
    layout=st.sampled_from(LAYOUTS),
    inner=st.sampled_from([1, 2, 3, 4, 6]),
)
def test_the_tuner_times_what_it_says(rows, cols, layout, inner):
    """The representative call of a Problem has that Problem, and writes each element of its y once."""
    inner_rows = inner if layout == "strided_axis" else 1
    rows = rows * inner_rows
    problem = Problem("rmsnorm", "bfloat16", "none", "bfloat16", rows, cols, layout, inner_rows)
    nest = geometry_of_problem(problem)
    assert nest.rows == rows
    assert nest.problem("bfloat16", "none", "bfloat16").layout == layout
    assert nest.problem("bfloat16", "none", "bfloat16").inner_rows == inner_rows
    written = [y for row in rows_by_geometry(nest) for _, y in row]
    assert sorted(written) == list(range(rows * cols))


@given(st.integers(1, 2**31 - 1) | st.integers(0, 30).map(lambda bits: 2**bits), st.integers(0, 2**31 - 1))
@example(1, 2**31 - 1)
@example(2**31 - 1, 2**31 - 1)
def test_a_divisor_divides_every_row_number(count: int, row: int) -> None:
    """At the row asked for, and on both sides of the last multiple of count, where a multiplier that is a little off errs first."""
    divisor = divisor_of(count)
    multiplier, shift = divisor & 0xFFFFFFFF, divisor >> 32
    assert divisor < 2**63
    last = (2**31 - 1) // count * count
    for number in (row, last, last - 1):
        assert number * multiplier >> shift == number // count


def test_two_strides_are_served_only_where_rows_can_be_divided() -> None:
    """A problem's rows stand for all that are bucketed to them."""
    buckets = [rows for octave in range(33) for rows in (2**octave, 3 * 2**octave)]
    for name, variant in VARIANTS.items():
        if "two_stride" in variant.LAYOUTS and FORWARD in variant.OPS:
            problems = (
                Problem(FORWARD, *("bfloat16",) * 3, rows, cols, "two_stride") for rows in buckets for cols in (128, 16_384, 131_072)
            )
            served = [p.rows for p in problems if any(is_legal(config, p, H100) for config in space(name))]
            assert served, name
            assert max(served) < bucket_rows(2**31 - 1), name
