"""From the gradients of both results of add_rmsnorm to those of its inputs: what serves one kind of backward, decided once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from kernels.allocation import packed
from kernels.backward import MAX_PLANS, readable, remembered, rows_geometry
from kernels.calls import dtype_name
from kernels.numerics import PLAIN, Numerics
from kernels.reference import rmsnorm_backward_torch
from tuning_db.model import NO_WEIGHT, Config

AddGradients: TypeAlias = tuple["torch.Tensor | None", "torch.Tensor | None", "torch.Tensor | None"]
AddBackwardCall: TypeAlias = Callable[["torch.Tensor | None", torch.Tensor, torch.Tensor, "torch.Tensor | None", float], AddGradients]
"""call(dsum, dy, total, weight, eps) -> (gradient of both addends in total's dtype, the same in dy's dtype, dw) for one kind of arguments.

total is the sum, dsum the gradient that arrives there, or None. None where a gradient is not wanted. dsum and dy are never written to."""


class AddBackwardPlans:
    """The backwards prepared so far for sums of one shape and device, in one numerics mode; `config` overrides the ladder."""

    __slots__ = ("_config", "_plans", "numerics")

    def __init__(self, config: Config | None, numerics: Numerics) -> None:
        self.numerics = numerics
        self._config = config
        self._plans: dict[Any, AddBackwardCall] = {}

    def call(
        self, dsum: torch.Tensor | None, dy: torch.Tensor, total: torch.Tensor, weight: torch.Tensor | None, wants: tuple[bool, bool]
    ) -> AddBackwardCall:
        """What computes the gradients of addends and weight that are wanted. Saved-tensor hooks may have given both other strides."""
        key = (
            dy.stride(), dy.dtype, dy.is_neg(), dsum is None, total.stride(), total.dtype, total.is_neg(), wants,
            None if weight is None else (weight.stride(), weight.dtype, weight.is_neg()),
        )  # fmt: skip
        call = self._plans.get(key)
        if call is None:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            call = prepare_add_backward(
                dy,
                total,
                weight,
                self._config,
                has_dsum=dsum is not None,
                wants_dx=wants[0],
                wants_dw=wants[1],
                numerics=self.numerics,
            )
            self._plans[key] = call
        return call


def add_backward_plans(total: torch.Tensor, numerics: Numerics) -> AddBackwardPlans:
    """The AddBackwardPlans of the operators, which know nothing of the forward that gave their sum."""
    key = AddBackwardPlans, total.shape, total.get_device(), numerics
    return remembered(key, lambda: AddBackwardPlans(None, numerics))


def prepare_add_backward(
    dy: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor | None,
    config: Config | None,
    *,
    has_dsum: bool,
    wants_dx: bool,
    wants_dw: bool,
    numerics: Numerics = PLAIN,
) -> AddBackwardCall:
    """Decide what computes the gradients of `add_rmsnorm` for tensors like these; `config` overrides the ladder.

    A weight offset counts; a rounding within the forward counts as none.

    Of total and dy the same is read in place as `kernels.backward.prepare_backward` reads of x and dy; dsum where it is packed.
    """
    from kernels import dispatch

    last = total.dim() - 1
    total_ready, dy_ready = readable(total, last), readable(dy, last)
    adds = has_dsum and wants_dx
    choice = dispatch.choose_and_prepare_backward(
        rows_geometry(total_ready(total), dy_ready(dy)),
        (dtype_name(total.dtype), NO_WEIGHT if weight is None else dtype_name(weight.dtype), dtype_name(dy.dtype)),
        total.get_device(),
        config,
        wants_dx=wants_dx,
        wants_dw=wants_dw,
        adds=adds,
        numerics=numerics,
    )
    launch = choice.launch
    if launch is None:
        return _packed_torch_backward(numerics)
    wants_dw = wants_dw and weight is not None
    copies_weight = weight is not None and (weight.stride(0) != 1 or weight.is_neg())
    new_dx = packed(total.shape, total.dtype, total.device) if wants_dx else None
    new_daddend = packed(total.shape, dy.dtype, total.device) if adds and dy.dtype != total.dtype else None
    new_dw = packed(weight.shape, weight.dtype, total.device) if weight is not None and wants_dw else None

    def call(dsum: torch.Tensor | None, dy: torch.Tensor, total: torch.Tensor, weight: torch.Tensor | None, eps: float) -> AddGradients:
        total, dy = total_ready(total), dy_ready(dy)
        if weight is not None and copies_weight:
            weight = weight.resolve_neg().contiguous()
        dx = None if new_dx is None else new_dx()
        daddend = None if new_daddend is None else new_daddend()
        dw = None if new_dw is None else new_dw()
        dsum = dsum.to(total.dtype).resolve_neg().contiguous() if dsum is not None and adds else None
        launch(dx, dw, dy, total, weight, eps, dsum, daddend)
        if dx is not None and daddend is None:
            daddend = dx.to(dy.dtype)
        return dx, daddend, dw

    return call


def add_backward_torch(
    dsum: torch.Tensor | None, dy: torch.Tensor, total: torch.Tensor, weight: torch.Tensor | None, eps: float, numerics: Numerics
) -> AddGradients:
    """PyTorch's operations, differentiable once more."""
    dx, dw = rmsnorm_backward_torch(dy, total, weight, eps, -1, numerics, dsum)
    return dx, dx.to(dy.dtype), dw


def _packed_torch_backward(numerics: Numerics) -> AddBackwardCall:
    def call(dsum: torch.Tensor | None, dy: torch.Tensor, total: torch.Tensor, weight: torch.Tensor | None, eps: float) -> AddGradients:
        dx, daddend, dw = add_backward_torch(dsum, dy, total, weight, eps, numerics)
        assert dx is not None
        assert daddend is not None
        return dx.contiguous(), daddend.contiguous(), dw

    return call
