"""Real tensors for a Problem: inputs, outputs between guard zones, and enough sets of them that no launch finds its data in L2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.geometry import Geometry, geometry_of_problem
from tuning_db.model import NO_WEIGHT, Problem, itemsize

EPS = 1e-6
GUARD_ELEMENTS = 1024
"""Elements of NaN before and after each output; a kernel that writes there is wrong."""

ALIGNMENT_ELEMENTS = 128
"""Every tensor starts at a multiple of this, as the caching allocator's do (at least 256 bytes)."""


@dataclass(frozen=True)
class Tensors:
    """One set of arguments: `rmsnorm(x, weight, EPS, axis, out=y)`."""

    x: torch.Tensor
    weight: torch.Tensor | None
    y: torch.Tensor


class Case:
    """A Problem with its representative geometry, and the ways to make tensors for it."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem = problem
        self.device = device
        self.geometry = geometry_of_problem(problem)
        self.dtypes = (problem.x_dtype, problem.w_dtype, problem.y_dtype)
        self.axis = 1 if problem.layout == "strided_axis" else -1
        self.x_shape, self.x_strides = _view(self.geometry, "x")
        _, self.y_strides = _view(self.geometry, "y")
        self._x_span = _span(self.x_shape, self.x_strides)
        self._y_span = _span(self.x_shape, self.y_strides)

    @property
    def set_bytes(self) -> int:
        """Bytes of x and y that one launch touches."""
        elements = math.prod(self.x_shape)
        return elements * (itemsize(self.problem.x_dtype) + itemsize(self.problem.y_dtype))

    def weight(self, seed: int) -> torch.Tensor | None:
        if self.problem.w_dtype == NO_WEIGHT:
            return None
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.rand(self.problem.cols, generator=generator, device=self.device) + 0.5
        return values.to(getattr(torch, self.problem.w_dtype))

    def sets(self, count: int, seed: int) -> list[Tensors]:
        """`count` sets in memory of their own, x random, y NaN. The weight is shared, as it is between a model's calls."""
        generator = torch.Generator(self.device).manual_seed(seed)
        weight = self.weight(seed)
        x_step, y_step = _padded(self._x_span), _padded(self._y_span)
        x_memory = torch.empty(count * x_step, dtype=getattr(torch, self.problem.x_dtype), device=self.device)
        for part in x_memory.split(1 << 28):
            part.normal_(generator=generator)
        y_memory = torch.full((count * y_step,), math.nan, dtype=getattr(torch, self.problem.y_dtype), device=self.device)
        return [
            Tensors(
                x_memory.as_strided(self.x_shape, self.x_strides, i * x_step),
                weight,
                y_memory.as_strided(self.x_shape, self.y_strides, i * y_step),
            )
            for i in range(count)
        ]

    def guarded(self, seed: int) -> tuple[Tensors, torch.Tensor]:
        """One set with hard values (a zero row, rows scaled by 1e-3 and 1e3) whose y lies inside a larger tensor of NaN, also returned."""
        tensors = self.sets(1, seed)[0]
        for row, scale in ((1, 1e3), (2, 1e-3), (3, 0.0)):
            rows_first = tensors.x.movedim(self.axis, -1)
            if row < rows_first.shape[0]:
                rows_first[row] *= scale
        memory = torch.full((_padded(self._y_span) + 2 * GUARD_ELEMENTS,), math.nan, dtype=tensors.y.dtype, device=self.device)
        y = memory.as_strided(self.x_shape, self.y_strides, GUARD_ELEMENTS)
        return Tensors(tensors.x, tensors.weight, y), memory


def guards_of(memory: torch.Tensor) -> Iterator[torch.Tensor]:
    """The guard zones of the memory that `Case.guarded` returned."""
    yield memory[:GUARD_ELEMENTS]
    yield memory[-GUARD_ELEMENTS:]


def _view(geometry: Geometry, tensor: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides as a user would have them: (rows, cols), (outer, inner, cols) or (outer, cols, inner)."""
    outer_stride, row_stride, col_stride = (getattr(geometry, f"{tensor}_{part}_stride") for part in ("outer", "row", "col"))
    if geometry.layout == "contiguous":
        return (geometry.rows, geometry.cols), (row_stride, 1)
    outer = geometry.rows // geometry.inner_rows
    if geometry.layout == "two_stride":
        return (outer, geometry.inner_rows, geometry.cols), (outer_stride, row_stride, 1)
    return (outer, geometry.cols, geometry.inner_rows), (outer_stride, col_stride, row_stride)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _padded(elements: int) -> int:
    return -(-elements // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS
