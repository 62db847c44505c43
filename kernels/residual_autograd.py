"""`add_rmsnorm` as a node of autograd's graph: the tuned forward, then the tuned backward."""

from __future__ import annotations

from typing import Any

import torch

from kernels.autograd import MAX_PLANS, needs_operations
from kernels.residual_backward import AddBackwardCall, AddGradients, add_backward_torch, prepare_add_backward
from kernels.residual_plans import AddCall, Sums
from tuning_db.model import Config


class DifferentiableAdd:
    """One kind of call with inputs that require grad: its forward, and the backwards prepared so far."""

    __slots__ = ("_config", "_forward", "_plans")

    def __init__(self, forward: AddCall, config: Config | None) -> None:
        self._forward = forward
        self._config = config  # the override of the forward: the backward may run in a thread that knows of none
        self._plans: dict[Any, AddBackwardCall] = {}

    def __call__(
        self,
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
    ) -> Sums:
        """`out` and `residual_out` are None: given results and gradients exclude each other."""
        y, new_residual = _AddRMSNorm.apply(x, residual, weight, eps, self)
        return y, new_residual

    def forward(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float) -> Sums:
        return self._forward(None, None, x, residual, weight, eps)

    def backward(
        self,
        dy: torch.Tensor,
        dsum: torch.Tensor | None,
        total: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        wants: tuple[bool, bool],
    ) -> AddGradients:
        """The gradients of residual, x and weight. total and weight as unpacked, which saved-tensor hooks may have given other strides."""
        key = (
            dy.stride(), dy.dtype, dy.is_neg(), dsum is None, total.stride(), total.dtype, total.is_neg(), wants,
            None if weight is None else (weight.stride(), weight.dtype, weight.is_neg()),
        )  # fmt: skip
        call = self._plans.get(key)
        if call is None:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            call = prepare_add_backward(dy, total, weight, self._config, has_dsum=dsum is not None, wants_dx=wants[0], wants_dw=wants[1])
            self._plans[key] = call
        return call(dsum, dy, total, weight, eps)


class _AddRMSNorm(torch.autograd.Function):
    """Saves the sum, which is given back anyway, and weight. A backward to be differentiated itself runs PyTorch's operations."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, kind: DifferentiableAdd
    ) -> Sums:
        y, new_residual = kind.forward(x, residual, weight, eps)
        ctx.save_for_backward(new_residual, weight)
        ctx.set_materialize_grads(False)  # of a result that nobody used no zeros are made and added
        ctx.x_dtype = x.dtype
        ctx.eps = eps
        ctx.kind = kind
        return y, new_residual

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, dsum: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        wants_x, wants_residual, wants_dw = ctx.needs_input_grad[:3]
        if dy is None:
            assert dsum is not None
            return dsum.to(ctx.x_dtype) if wants_x else None, dsum if wants_residual else None, None, None, None
        if needs_operations(dy) or (dsum is not None and needs_operations(dsum)):
            dresidual, dx, dw = add_backward_torch(dsum, dy, total, weight, ctx.eps)
        else:
            dresidual, dx, dw = ctx.kind.backward(dy, dsum, total, weight, ctx.eps, (wants_x or wants_residual, wants_dw))
        return dx if wants_x else None, dresidual if wants_residual else None, dw if wants_dw else None, None, None
