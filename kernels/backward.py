"""From dy, x and weight to dx and dw: what serves one kind of backward, decided once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch

from kernels.allocation import packed
from kernels.calls import dtype_name
from kernels.geometry import Geometry, geometry_of
from kernels.numerics import PLAIN, Numerics
from kernels.reference import rmsnorm_backward_torch
from tuning_db.model import NO_WEIGHT, Config

Gradients: TypeAlias = tuple["torch.Tensor | None", "torch.Tensor | None"]
BackwardCall: TypeAlias = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None", float], Gradients]
"""call(dy, x, weight, eps) -> (dx, dw) for one kind of arguments. None where a gradient is not wanted. dy is never written to."""

MAX_PLANS = 64
"""Kinds of backwards remembered for one kind of forward; they differ in dy's strides and in which gradients are wanted."""

MAX_FORWARDS = 16384
"""Kinds of forwards whose backwards are remembered for the operators."""


class BackwardPlans:
    """The backwards prepared so far for x of one shape, device and axis, in one numerics mode; `config` overrides the ladder."""

    __slots__ = ("_config", "_plans", "axis", "numerics")

    def __init__(self, axis: int, config: Config | None, numerics: Numerics) -> None:
        self.axis = axis
        self.numerics = numerics
        self._config = config
        self._plans: dict[Any, BackwardCall] = {}

    def call(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, wants: tuple[bool, bool]) -> BackwardCall:
        """What computes the gradients of x and weight that are wanted. Saved-tensor hooks may have given both other strides."""
        key = (
            dy.stride(), dy.dtype, dy.is_neg(), x.stride(), x.dtype, x.is_neg(), wants,
            None if weight is None else (weight.stride(), weight.dtype, weight.is_neg()),
        )  # fmt: skip
        call = self._plans.get(key)
        if call is None:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            call = prepare_backward(dy, x, weight, self.axis, self._config, wants_dx=wants[0], wants_dw=wants[1], numerics=self.numerics)
            self._plans[key] = call
        return call


_Plans = TypeVar("_Plans")
_of_operators: dict[Any, Any] = {}


def remembered(key: Any, make: Callable[[], _Plans]) -> _Plans:
    """What the operators remember by this key, made now if it is new."""
    known: _Plans | None = _of_operators.get(key)
    if known is None:
        if len(_of_operators) >= MAX_FORWARDS:
            _of_operators.clear()
        known = _of_operators[key] = make()
    return known


def backward_plans(x: torch.Tensor, axis: int, numerics: Numerics) -> BackwardPlans:
    """The BackwardPlans of the operators, which know nothing of the forward that their x was in."""
    key = BackwardPlans, x.shape, x.get_device(), axis, numerics
    return remembered(key, lambda: BackwardPlans(axis % x.dim(), None, numerics))


def forget_backwards() -> None:
    """Drop what the operators remember."""
    _of_operators.clear()


def prepare_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    axis: int,
    config: Config | None,
    *,
    wants_dx: bool,
    wants_dw: bool,
    numerics: Numerics = PLAIN,
) -> BackwardCall:
    """Decide what computes the gradients of `rmsnorm(x, weight, axis=axis)` for tensors like these; `config` overrides the ladder.

    A weight offset counts; a rounding within the forward counts as none.

    Read in place: x and dy whose normalised elements are adjacent and whose rows, in the order of x's shape, lie at one stride (0 for a dy
    expanded over rows). Of each that needs more (another axis than the last, several strides, dy expanded along the row) one
    contiguous copy is made, with the normalised axis last. dx is packed in that order, as `empty_dx` makes it.
    """
    from kernels import dispatch

    x_ready, dy_ready = readable(x, axis), readable(dy, axis)
    geometry = rows_geometry(x_ready(x), dy_ready(dy))
    choice = dispatch.choose_and_prepare_backward(
        geometry,
        (dtype_name(x.dtype), NO_WEIGHT if weight is None else dtype_name(weight.dtype), dtype_name(dy.dtype)),
        x.get_device(),
        config,
        wants_dx=wants_dx,
        wants_dw=wants_dw,
        numerics=numerics,
    )
    launch = choice.launch
    if launch is None:
        return _packed_torch_backward(axis, numerics)
    wants_dw = wants_dw and weight is not None
    copies_weight = weight is not None and (weight.stride(0) != 1 or weight.is_neg())
    is_last = axis == x.dim() - 1
    new_dx = packed(x.movedim(axis, -1).shape, x.dtype, x.device) if wants_dx else None
    new_dw = packed(weight.shape, weight.dtype, x.device) if weight is not None and wants_dw else None

    def call(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> Gradients:
        x, dy = x_ready(x), dy_ready(dy)
        if weight is not None and copies_weight:
            weight = weight.resolve_neg().contiguous()
        dx = None if new_dx is None else new_dx()
        dw = None if new_dw is None else new_dw()
        launch(dx, dw, dy, x, weight, eps)
        return dx if is_last or dx is None else dx.movedim(-1, axis), dw

    return call


def torch_backward(axis: int, numerics: Numerics) -> BackwardCall:
    """PyTorch's operations, differentiable once more."""
    return lambda dy, x, weight, eps: rmsnorm_backward_torch(dy, x, weight, eps, axis, numerics)


def empty_dx(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Memory for a gradient of x: packed in the order of x's shape with the normalised axis last."""
    rows = x.movedim(axis, -1)
    return torch.empty(rows.shape, dtype=x.dtype, device=x.device).movedim(-1, axis)


def _packed_torch_backward(axis: int, numerics: Numerics) -> BackwardCall:
    def call(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> Gradients:
        dx, dw = rmsnorm_backward_torch(dy, x, weight, eps, axis, numerics)
        return dx.movedim(axis, -1).contiguous().movedim(-1, axis), dw

    return call


def readable(tensor: torch.Tensor, axis: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes a tensor like this one readable to the kernels: nothing, or a copy with the axis last."""
    if axis == tensor.dim() - 1 and _row_stride(tensor) is not None:
        return lambda tensor: tensor
    return lambda tensor: tensor.movedim(axis, -1).resolve_neg().contiguous()


def _row_stride(tensor: torch.Tensor) -> int | None:
    """Elements from row to row of the last axis, in the order of the shape; None where the kernels can't read it as it lies."""
    if tensor.is_neg():
        return None
    packed_strides = torch.empty(tensor.shape, device="meta").stride()
    geometry = geometry_of(tensor.shape, tensor.stride(), packed_strides, tensor.dim() - 1)
    return geometry.x_row_stride if geometry is not None and geometry.layout == "contiguous" else None


def rows_geometry(x: torch.Tensor, dy: torch.Tensor) -> Geometry:
    """Of tensors that `readable` has made so."""
    x_row_stride, dy_row_stride = _row_stride(x), _row_stride(dy)
    assert x_row_stride is not None
    assert dy_row_stride is not None
    cols = x.shape[-1]
    return Geometry("contiguous", x.numel() // cols, cols, 0, 0, x_row_stride, 1, 0, dy_row_stride, 1)
