"""`add_rmsnorm` as a node of autograd's graph: the tuned forward, then the tuned backward."""

from __future__ import annotations

from typing import Any

import torch

from kernels.autograd import needs_operations, quick_apply
from kernels.calls import AddCall, Sums
from kernels.numerics import Numerics
from kernels.residual_backward import AddBackwardPlans, AddGradients, add_backward_torch
from tuning_db.model import Config


def differentiable(forward: AddCall, config: Config | None, numerics: Numerics) -> AddCall:
    """`forward` for inputs that require grad; it is given no results: those and gradients exclude each other.

    `config` is the override of the forward: the backward may run in a thread that knows of none.
    """
    backwards = AddBackwardPlans(config, numerics)
    return lambda out, residual_out, x, residual, weight, eps: _apply((forward, backwards, eps, x.dtype), x, residual, weight)


class _AddRMSNorm(torch.autograd.Function):
    """Saves the sum, which is given back anyway, and weight. A backward to be differentiated itself runs PyTorch's operations."""

    @staticmethod
    def forward(
        ctx: Any,
        how: tuple[AddCall, AddBackwardPlans, float, torch.dtype],
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
    ) -> Sums:
        forward, _, eps, _ = how
        y, new_residual = forward(None, None, x, residual, weight, eps)
        ctx.to_save = new_residual, weight  # what save_for_backward does
        ctx.set_materialize_grads(False)  # of a result that nobody used no zeros are made and added
        ctx.how = how
        return y, new_residual

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, dsum: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        _, wants_x, wants_residual, wants_dw = ctx.needs_input_grad
        _, backwards, eps, x_dtype = ctx.how
        total, weight = ctx.saved_tensors
        if dy is None:
            assert dsum is not None
            gradients: AddGradients = dsum, dsum.to(x_dtype), None
        elif needs_operations(dy) or (dsum is not None and needs_operations(dsum)):
            gradients = add_backward_torch(dsum, dy, total, weight, eps, backwards.numerics)
        else:
            call = backwards.call(dsum, dy, total, weight, (wants_x or wants_residual, wants_dw))
            gradients = call(dsum, dy, total, weight, eps)
        dresidual, dx, dw = gradients
        wanted = dx if wants_x else None, dresidual if wants_residual else None, dw if wants_dw else None
        return None, *wanted


_apply = quick_apply(_AddRMSNorm)
