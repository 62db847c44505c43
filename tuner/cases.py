"""Real tensors for a Problem: inputs, outputs between guard zones, and enough sets of them that no launch finds its data in L2."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kernels.add_launch import build_add_launcher
from kernels.backward_launch import build_backward_launcher
from kernels.geometry import Geometry, geometry_of_problem
from kernels.launch import build_launcher
from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, BACKWARD, FORWARD, NO_WEIGHT, Config, Problem, itemsize

EPS = 1e-6
GUARD_ELEMENTS = 1024
"""Elements of NaN before and after each output; a kernel that writes there is wrong."""

ALIGNMENT_ELEMENTS = 128
"""Every tensor starts at a multiple of this, as the caching allocator's do (at least 256 bytes)."""


LAUNCHER_OF: dict[str, Callable[..., Callable[..., object]]] = {
    FORWARD: build_launcher,
    BACKWARD: build_backward_launcher,
    ADD_FORWARD: build_add_launcher,
    ADD_BACKWARD: functools.partial(build_backward_launcher, adds=True),
}


@dataclass(frozen=True)
class Tensors:
    """One set of arguments: `rmsnorm(x, weight, EPS, axis, out=y)`, or its backward, where y is dx, and there are dy and dw.

    Or `add_rmsnorm(x, residual, weight, EPS, out=y, residual_out=new_residual)`. In its backward x is what new_residual was, dsum the
    gradient that arrives there, and y the gradient of both addends; daddend is that of the forward's x where it has a dtype of its own.
    """

    x: torch.Tensor
    weight: torch.Tensor | None
    y: torch.Tensor
    dy: torch.Tensor | None = None
    dw: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    new_residual: torch.Tensor | None = None
    dsum: torch.Tensor | None = None
    daddend: torch.Tensor | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the launcher of their op takes."""
        if self.dy is not None:
            of_a_sum = () if self.dsum is None else (self.dsum, self.daddend)
            return self.y, self.dw, self.dy, self.x, self.weight, EPS, *of_a_sum
        if self.residual is not None:
            return self.y, self.new_residual, self.x, self.residual, self.weight, EPS
        return self.y, self.x, self.weight, EPS

    @property
    def results(self) -> tuple[torch.Tensor | None, ...]:
        """What the op gives: y; dx and dw; y and new_residual; the sum's gradient, that in daddend's dtype, dw."""
        if self.dsum is not None:
            return self.y, self.daddend, self.dw
        if self.dy is not None:
            return self.y, self.dw
        return (self.y,) if self.residual is None else (self.y, self.new_residual)


@dataclass(frozen=True)
class Place:
    """The dtype of one tensor of a Case, and whose strides it has: x's or y's."""

    dtype: str
    strides_of: str


class Case:
    """A Problem with its representative geometry, and the ways to make tensors for it."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem = problem
        self.device = device
        self.geometry = geometry_of_problem(problem)
        self.dtypes = (problem.x_dtype, problem.w_dtype, problem.y_dtype)
        self.axis = 1 if problem.layout == "strided_axis" else -1
        self.x_shape, x_strides = _view(self.geometry, "x")
        self._strides = {"x": x_strides, "y": _view(self.geometry, "y")[1]}
        self.inputs, self.results = _places(problem)

    @property
    def set_bytes(self) -> int:
        """Bytes of the rows' tensors that one launch touches."""
        return math.prod(self.x_shape) * self.problem.element_bytes

    @property
    def copies(self) -> float:
        """How many times the reference copy's bytes a launch moves.

        The copy reads what is normalised once and writes as much. A backward reads two tensors for each that it writes, add_rmsnorm two
        for two, its backward three for one.
        """
        return self.problem.element_bytes / (2 * itemsize(self.problem.x_dtype))

    def launcher(self, config: Config) -> Callable[..., object]:
        """The launch of a legal config, as the runtime builds it; it takes `Tensors.arguments`."""
        build = LAUNCHER_OF[self.problem.op]
        return build(config, self.geometry, self.dtypes, -1 if self.device.index is None else self.device.index)

    def weight(self, seed: int) -> torch.Tensor | None:
        if self.problem.w_dtype == NO_WEIGHT:
            return None
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.rand(self.problem.cols, generator=generator, device=self.device) + 0.5
        return values.to(getattr(torch, self.problem.w_dtype))

    def sets(self, count: int, seed: int) -> list[Tensors]:
        """`count` sets in memory of their own, inputs random, results NaN. The weight is shared, as it is between a model's calls."""
        generator = torch.Generator(self.device).manual_seed(seed)
        weight = self.weight(seed)
        views = {name: self._views(place, count, generator) for name, place in self.inputs.items()}
        views |= {name: self._views(place, count, None) for name, place in self.results.items()}
        has_dw = weight is not None and self.problem.is_backward
        return [
            Tensors(
                weight=weight,
                dw=torch.full_like(weight, math.nan) if weight is not None and has_dw else None,
                **{name: own[i] for name, own in views.items()},
            )
            for i in range(count)
        ]

    def _views(self, place: Place, count: int, generator: torch.Generator | None) -> list[torch.Tensor]:
        """`count` tensors one after another in one memory: normal values of a generator, NaN without one."""
        strides = self._strides[place.strides_of]
        step = _padded(_span(self.x_shape, strides))
        memory = torch.empty(count * step, dtype=getattr(torch, place.dtype), device=self.device)
        for part in memory.split(1 << 28):
            if generator is None:
                part.fill_(math.nan)
            else:
                part.normal_(generator=generator)
        return [memory.as_strided(self.x_shape, strides, i * step) for i in range(count)]

    def guarded(self, seed: int) -> tuple[Tensors, list[torch.Tensor]]:
        """One set with hard values (a zero row, rows scaled by 1e-3 and 1e3), its results inside larger tensors of NaN, also returned."""
        tensors = self.sets(1, seed)[0]
        for name in ("x", "residual"):
            if name in self.inputs:
                rows_first = getattr(tensors, name).movedim(self.axis, -1)
                for row, scale in ((1, 1e3), (2, 1e-3), (3, 0.0)):
                    if row < rows_first.shape[0]:
                        rows_first[row] *= scale
        names = [*self.results, *(["dw"] if tensors.dw is not None else [])]
        memories = [_guarded_memory(getattr(tensors, name)) for name in names]
        views = {
            name: memory.as_strided(getattr(tensors, name).shape, getattr(tensors, name).stride(), GUARD_ELEMENTS)
            for name, memory in zip(names, memories, strict=True)
        }
        return replace(tensors, **views), memories


def _places(problem: Problem) -> tuple[dict[str, Place], dict[str, Place]]:
    """The tensors of rows that the op reads, and those that it gives, by the names of Tensors."""
    x, y = Place(problem.x_dtype, "x"), Place(problem.y_dtype, "y")
    gradient = Place(problem.x_dtype, "y")
    if problem.op == ADD_FORWARD:
        return {"x": y, "residual": x}, {"y": y, "new_residual": x}
    if problem.op == ADD_BACKWARD:
        results = {"y": gradient} | ({"daddend": y} if problem.y_dtype != problem.x_dtype else {})
        return {"x": x, "dy": y, "dsum": gradient}, results
    return ({"x": x, "dy": y}, {"y": gradient}) if problem.is_backward else ({"x": x}, {"y": y})


def _guarded_memory(result: torch.Tensor) -> torch.Tensor:
    elements = _span(result.shape, result.stride()) + 2 * GUARD_ELEMENTS
    return torch.full((elements,), math.nan, dtype=result.dtype, device=result.device)


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


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _padded(elements: int) -> int:
    return -(-elements // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS
