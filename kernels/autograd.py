"""`rmsnorm` as a node of autograd's graph: the tuned forward, then the tuned backward."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from kernels.backward import BackwardCall, prepare_backward, torch_backward
from kernels.numerics import Numerics
from tuning_db.model import Config

MAX_PLANS = 64
"""Kinds of backwards remembered for one kind of forward; they differ in dy's strides and in which gradients are wanted."""

_is_batched = torch._C._functorch.is_legacy_batchedtensor  # whether a tensor stands for many, as under is_grads_batched
_transform = torch._C._functorch.peek_interpreter_stack  # the innermost torch.func transform, or None


class Differentiable:
    """One kind of call with inputs that require grad: its forward, and the backwards prepared so far."""

    __slots__ = ("_config", "_forward", "_plans", "axis", "numerics")

    def __init__(self, forward: Any, axis: int, config: Config | None, numerics: Numerics) -> None:
        self._forward = forward
        self._config = config  # the override of the forward: the backward may run in a thread that knows of none
        self._plans: dict[Any, BackwardCall] = {}
        self.axis = axis
        self.numerics = numerics

    def __call__(self, out: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        """`out` is None: an `out` and gradients exclude each other."""
        return _RMSNorm.apply(x, weight, eps, self)

    def forward(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        return self._forward(None, x, weight, eps)

    def backward(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, wants: tuple[bool, ...]) -> BackwardCall:
        """What computes the gradients. x and weight as unpacked, which saved-tensor hooks may have given other strides."""
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


class _RMSNorm(torch.autograd.Function):
    """Saves x and weight, as they are and nothing else. A backward that is itself to be differentiated runs PyTorch's operations."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float, kind: Differentiable) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        ctx.kind = kind
        return kind.forward(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        wants = ctx.needs_input_grad
        if _needs_operations(dy):
            dx, dw = torch_backward(ctx.kind.axis, ctx.kind.numerics)(dy, x, weight, ctx.eps)
        else:
            dx, dw = ctx.kind.backward(dy, x, weight, wants)(dy, x, weight, ctx.eps)
        return dx if wants[0] else None, dw if wants[1] else None, None, None


def _needs_operations(dy: torch.Tensor) -> bool:
    """Whether the backward is watched by something that must see PyTorch's operations.

    That is create_graph=True, a torch.func transform, forward-mode AD, `is_grads_batched`, and a dy that is no plain tensor.
    """
    transformed = torch.is_grad_enabled() or _transform() is not None or forward_ad._current_level >= 0
    return transformed or _is_batched(dy) or type(dy) is not torch.Tensor
