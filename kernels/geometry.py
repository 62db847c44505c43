"""From the shapes and strides of one call to the loop nest a kernel runs: which rows, how far apart, how long."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tuning_db.model import FORWARD, Problem, bucket_rows


@dataclass(frozen=True)
class Geometry:
    """Rows of `cols` elements in x and y, or in x and dy, for which y's strides stand in a backward. Strides in elements.

    Row r starts at (r // inner_rows) * outer_stride + (r % inner_rows) * row_stride. With one stride from row to row inner_rows is 0
    and the outer strides are 0. In layout `strided_axis` inner_rows is at least 1 and the elements of a row are col_stride apart.
    """

    layout: str
    rows: int
    cols: int
    inner_rows: int
    x_outer_stride: int
    x_row_stride: int
    x_col_stride: int
    y_outer_stride: int
    y_row_stride: int
    y_col_stride: int

    def problem(self, x_dtype: str, w_dtype: str, y_dtype: str, op: str = FORWARD) -> Problem:
        """The Problem of this call: rows and inner rows bucketed, strides forgotten."""
        return problem_of(self.layout, self.rows, self.cols, self.inner_rows, (x_dtype, w_dtype, y_dtype), op)

    def arguments(self) -> dict[str, str | int]:
        """The fields by name, and what kernels of rows with adjacent elements take instead of some of them.

        Row r starts at r * row_stride + (r // inner_rows) * skip: `x_skip` and `y_skip` may be negative, and `row_divisor` is
        `divisor_of` inner_rows, 0 with one stride from row to row.
        """
        return {
            **vars(self),
            "row_divisor": divisor_of(self.inner_rows) if self.inner_rows else 0,
            "x_skip": self.x_outer_stride - self.inner_rows * self.x_row_stride,
            "y_skip": self.y_outer_stride - self.inner_rows * self.y_row_stride,
        }


def divisor_of(count: int) -> int:
    """What a kernel divides row numbers below 2^31 by `count` with: a multiplication and a shift, a tenth of a division's time.

    With b bits in count - 1 and the multiplier m = ⌈2^(31+b) / count⌉, which takes 32 bits, r // count is (r * m) >> (31 + b) for every
    r < 2^31: Granlund & Montgomery, "Division by Invariant Integers using Multiplication", 1994, theorem 4.2. One 64-bit integer holds
    both, the shift in its upper half. count is at least 1.
    """
    shift = 31 + (count - 1).bit_length()
    return shift << 32 | -(-(1 << shift) // count)


def problem_of(layout: str, rows: int, cols: int, inner_rows: int, dtypes: tuple[str, str, str], op: str = FORWARD) -> Problem:
    """The one place that makes a Problem of a call's numbers. dtypes are those of x, w (or `none`) and y (or dy)."""
    interleaved = bucket_rows(inner_rows) if layout == "strided_axis" else 1
    return Problem(op, *dtypes, bucket_rows(rows), cols, layout, interleaved)


def geometry_of(shape: Sequence[int], x_strides: Sequence[int], y_strides: Sequence[int], axis: int) -> Geometry | None:
    """The loop nest that normalises `shape` over `axis` (0 ≤ axis < dims), or None where the rows need more than two strides.

    The dimensions other than axis are merged as far as both x and y allow. No size may be 0.
    """
    cols, x_col_stride, y_col_stride = shape[axis], x_strides[axis], y_strides[axis]
    if cols == 1:
        x_col_stride = y_col_stride = 1
    outer = _merged([(shape[d], x_strides[d], y_strides[d]) for d in range(len(shape)) if d != axis and shape[d] != 1])
    if len(outer) > 2:
        return None
    adjacent = x_col_stride == 1 and y_col_stride == 1
    if len(outer) == 2:
        (outer_rows, x_outer, y_outer), (inner_rows, x_row, y_row) = outer
    else:
        inner_rows, x_row, y_row = outer[0] if outer else (1, cols, cols)
        outer_rows, x_outer, y_outer = 1, 0, 0
        if adjacent:
            return Geometry("contiguous", inner_rows, cols, 0, 0, x_row, 1, 0, y_row, 1)
    return Geometry(
        layout="two_stride" if adjacent else "strided_axis",
        rows=outer_rows * inner_rows,
        cols=cols,
        inner_rows=inner_rows,
        x_outer_stride=x_outer,
        x_row_stride=x_row,
        x_col_stride=x_col_stride,
        y_outer_stride=y_outer,
        y_row_stride=y_row,
        y_col_stride=y_col_stride,
    )


def geometry_of_problem(problem: Problem) -> Geometry:
    """A representative call for a Problem, the one that the tuner times: packed tensors, for `two_stride` q of a packed qkv.

    For `two_stride`, rows are token × head with 8 heads (or fewer rows) of a tensor that also holds k and v.
    """
    rows, cols = problem.rows, problem.cols
    if problem.layout == "contiguous":
        return Geometry("contiguous", rows, cols, 0, 0, cols, 1, 0, cols, 1)
    if problem.layout == "two_stride":
        heads = math.gcd(rows, 8)
        return Geometry("two_stride", rows, cols, heads, 3 * heads * cols, cols, 1, heads * cols, cols, 1)
    inner = problem.inner_rows
    outer = max(1, rows // inner)
    return Geometry("strided_axis", outer * inner, cols, inner, cols * inner, 1, inner, cols * inner, 1, inner)


def _merged(dims: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """(size, x stride, y stride) sorted outermost first, neighbours joined where one stride serves both tensors."""
    merged: list[tuple[int, int, int]] = []
    for size, x_stride, y_stride in sorted(dims, key=lambda dim: (dim[2], dim[1]), reverse=True):
        if merged:
            outer_size, outer_x, outer_y = merged[-1]
            if outer_x == size * x_stride and outer_y == size * y_stride:
                merged[-1] = (outer_size * size, x_stride, y_stride)
                continue
        merged.append((size, x_stride, y_stride))
    return merged
