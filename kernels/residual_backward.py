"""From the gradients of both results of add_rmsnorm to those of its inputs: what serves one kind of backward, decided once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from kernels.backward import readable, rows_geometry
from kernels.plans import dtype_name
from kernels.reference import rmsnorm_backward_torch
from tuning_db.model import NO_WEIGHT, Config

AddGradients: TypeAlias = tuple["torch.Tensor | None", "torch.Tensor | None", "torch.Tensor | None"]
AddBackwardCall: TypeAlias = Callable[["torch.Tensor | None", torch.Tensor, torch.Tensor, "torch.Tensor | None", float], AddGradients]
"""call(dsum, dy, total, weight, eps) -> (gradient of both addends in total's dtype, the same in dy's dtype, dw) for one kind of arguments.

total is the sum, dsum the gradient that arrives there, or None. None where a gradient is not wanted. dsum and dy are never written to."""


def prepare_add_backward(
    dy: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor | None,
    config: Config | None,
    *,
    has_dsum: bool,
    wants_dx: bool,
    wants_dw: bool,
) -> AddBackwardCall:
    """Decide what computes the gradients of `add_rmsnorm` for tensors like these; `config` overrides the ladder.

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
    )
    launch = choice.launch
    if launch is None:
        return add_backward_torch
    wants_dw = wants_dw and weight is not None
    stores_both = adds and dy.dtype != total.dtype

    def call(dsum: torch.Tensor | None, dy: torch.Tensor, total: torch.Tensor, weight: torch.Tensor | None, eps: float) -> AddGradients:
        total, dy = total_ready(total), dy_ready(dy)
        if weight is not None:
            weight = weight.resolve_neg().contiguous()
        dx = torch.empty(total.shape, dtype=total.dtype, device=total.device) if wants_dx else None
        daddend = torch.empty(total.shape, dtype=dy.dtype, device=total.device) if stores_both else None
        dw = torch.empty_like(weight) if weight is not None and wants_dw else None
        dsum = dsum.to(total.dtype).resolve_neg().contiguous() if dsum is not None and adds else None
        launch(dx, dw, dy, total, weight, eps, dsum, daddend)
        if dx is not None and daddend is None:
            daddend = dx.to(dy.dtype)
        return dx, daddend, dw

    return call


def add_backward_torch(
    dsum: torch.Tensor | None, dy: torch.Tensor, total: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> AddGradients:
    """PyTorch's operations, differentiable once more."""
    dx, dw = rmsnorm_backward_torch(dy, total, weight, eps, -1, dsum=dsum)
    return dx, dx.to(dy.dtype), dw
