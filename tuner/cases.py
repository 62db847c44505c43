"""Real tensors for a Problem: inputs, outputs between guard zones, and enough sets of them that no launch finds its data in L2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from kernels.geometry import Geometry, geometry_of_problem
from tuning_db.model import BACKWARD, NO_WEIGHT, Problem, itemsize

EPS = 1e-6
GUARD_ELEMENTS = 1024
"""Elements of NaN before and after each output; a kernel that writes there is wrong."""

ALIGNMENT_ELEMENTS = 128
"""Every tensor starts at a multiple of this, as the caching allocator's do (at least 256 bytes)."""


@dataclass(frozen=True)
class Tensors:
    """One set of arguments: `rmsnorm(x, weight, EPS, axis, out=y)`, or its backward, where y is dx, and there are dy and dw."""

    x: torch.Tensor
    weight: torch.Tensor | None
    y: torch.Tensor
    dy: torch.Tensor | None = None
    dw: torch.Tensor | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What a Launcher, or a BackwardLauncher, takes."""
        if self.dy is None:
            return self.y, self.x, self.weight, EPS
        return self.y, self.dw, self.dy, self.x, self.weight, EPS


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
    def is_backward(self) -> bool:
        return self.problem.op == BACKWARD

    @property
    def set_bytes(self) -> int:
        """Bytes of x and y that one launch touches; of a backward those of x, dy and dx."""
        elements = math.prod(self.x_shape)
        return elements * (itemsize(self.problem.x_dtype) * (2 if self.is_backward else 1) + itemsize(self.problem.y_dtype))

    @property
    def copies(self) -> float:
        """How many times the reference copy's bytes a launch moves: a backward reads two tensors for each that it writes."""
        return 1.5 if self.is_backward else 1.0

    @property
    def result_dtype(self) -> str:
        """Of y, or of dx."""
        return self.problem.x_dtype if self.is_backward else self.problem.y_dtype

    def weight(self, seed: int) -> torch.Tensor | None:
        if self.problem.w_dtype == NO_WEIGHT:
            return None
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.rand(self.problem.cols, generator=generator, device=self.device) + 0.5
        return values.to(getattr(torch, self.problem.w_dtype))

    def sets(self, count: int, seed: int) -> list[Tensors]:
        """`count` sets in memory of their own, x and dy random, results NaN. The weight is shared, as it is between a model's calls."""
        generator = torch.Generator(self.device).manual_seed(seed)
        weight = self.weight(seed)
        x_step, y_step = _padded(self._x_span), _padded(self._y_span)
        x_memory = self._normal(count * x_step, self.problem.x_dtype, generator)
        dy_memory = self._normal(count * y_step, self.problem.y_dtype, generator) if self.is_backward else None
        y_memory = torch.full((count * y_step,), math.nan, dtype=getattr(torch, self.result_dtype), device=self.device)
        return [
            Tensors(
                x_memory.as_strided(self.x_shape, self.x_strides, i * x_step),
                weight,
                y_memory.as_strided(self.x_shape, self.y_strides, i * y_step),
                None if dy_memory is None else dy_memory.as_strided(self.x_shape, self.y_strides, i * y_step),
                torch.full_like(weight, math.nan) if weight is not None and self.is_backward else None,
            )
            for i in range(count)
        ]

    def _normal(self, elements: int, dtype: str, generator: torch.Generator) -> torch.Tensor:
        memory = torch.empty(elements, dtype=getattr(torch, dtype), device=self.device)
        for part in memory.split(1 << 28):
            part.normal_(generator=generator)
        return memory

    def guarded(self, seed: int) -> tuple[Tensors, list[torch.Tensor]]:
        """One set with hard values (a zero row, rows scaled by 1e-3 and 1e3), its results inside larger tensors of NaN, also returned."""
        tensors = self.sets(1, seed)[0]
        for row, scale in ((1, 1e3), (2, 1e-3), (3, 0.0)):
            rows_first = tensors.x.movedim(self.axis, -1)
            if row < rows_first.shape[0]:
                rows_first[row] *= scale
        memories = [torch.full((_padded(self._y_span) + 2 * GUARD_ELEMENTS,), math.nan, dtype=tensors.y.dtype, device=self.device)]
        guarded = replace(tensors, y=memories[0].as_strided(self.x_shape, self.y_strides, GUARD_ELEMENTS))
        if tensors.dw is not None:
            cols = self.problem.cols
            memories.append(torch.full((cols + 2 * GUARD_ELEMENTS,), math.nan, dtype=tensors.dw.dtype, device=self.device))
            guarded = replace(guarded, dw=memories[1][GUARD_ELEMENTS : GUARD_ELEMENTS + cols])
        return guarded, memories


def guards_of(memory: torch.Tensor) -> Iterator[torch.Tensor]:
    """The guard zones of a memory that `Case.guarded` returned."""
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
