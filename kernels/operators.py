"""`rmsnorm` and its gradients as operators of PyTorch, for the graphs that torch.compile and torch.export make.

A graph holds `rmsnorm_forward`, `rmsnorm_backward` and `rmsnorm_out`; `rmsnorm` consists of them. `kernels.operator_library` says why. Who
loads an exported program imports this module, which brings the operators of `add_rmsnorm` along.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import kernels.residual_operators  # noqa: F401 - registers the operators of add_rmsnorm
from kernels import api, plans
from kernels.backward import backward_plans, empty_dx
from kernels.numerics import Numerics
from kernels.operator_library import NUMERICS, mode_arguments, operators, register, register_composite
from kernels.reference import rmsnorm_backward_torch, rmsnorm_torch
from kernels.validation import check_arguments

Weight: TypeAlias = "torch.Tensor | None"


def traced(
    x: torch.Tensor,
    weight: Weight,
    eps: float,
    axis: int,
    out: torch.Tensor | None,
    backend: str,
    batch_invariant: bool,
    numerics: Numerics,
) -> torch.Tensor:
    """What a call of `rmsnorm` puts into a graph: one operator, or under a torch.func transform PyTorch's operations."""
    if torch._C._are_functorch_transforms_active():
        check_arguments(x, weight, axis, out, backend, numerics)
        return plans.into(out, rmsnorm_torch(x, weight, eps, axis, numerics))
    if out is None:
        return operators.rmsnorm.default(x, weight, eps, axis, *numerics, batch_invariant, backend)
    operators.rmsnorm_out.default(x, weight, eps, axis, *numerics, batch_invariant, backend, out)
    return out


def _rmsnorm(
    x: torch.Tensor,
    weight: Weight,
    eps: float,
    axis: int,
    weight_offset: float,
    round_normalized: bool,
    batch_invariant: bool,
    backend: str,
) -> torch.Tensor:
    """Runs while a graph is made, and leaves in it what it calls."""
    numerics = Numerics(weight_offset, round_normalized)
    check_arguments(x, weight, axis, None, backend, numerics)
    backend = plans.requested_backend(backend)
    subclass = is_traceable_wrapper_subclass(x) or (weight is not None and is_traceable_wrapper_subclass(weight))
    if backend == "torch" or subclass or not plans.kernels_serve(x, weight, backend):
        return rmsnorm_torch(x, weight, eps, axis, numerics)
    arguments = x, weight, eps, axis if axis < 0 else axis - x.dim(), *numerics, batch_invariant, backend
    if plans.needs_grad(x, weight):
        y: torch.Tensor = _Differentiable.apply(*arguments)
        return y
    return operators.rmsnorm_forward.default(*arguments)


class _Differentiable(torch.autograd.Function):
    """Saves x and weight, as they are and nothing else, as the eager node does."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Weight, eps: float, axis: int, weight_offset: float, round_normalized: bool, *rest: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.arguments = eps, axis, weight_offset, round_normalized
        return operators.rmsnorm_forward.default(x, weight, *ctx.arguments, *rest)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_dx, wants_dw, *others = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            eps, axis, *numerics = ctx.arguments
            dx, dw = rmsnorm_backward_torch(dy, x, weight, eps, axis, Numerics(*numerics))
            return dx if wants_dx else None, dw if wants_dw else None, *(None for _ in others)
        wanted = iter(operators.rmsnorm_backward.default(dy, x, weight, *ctx.arguments, wants_dx, wants_dw))
        return next(wanted) if wants_dx else None, next(wanted) if wants_dw else None, *(None for _ in others)


def _forward(
    x: torch.Tensor,
    weight: Weight,
    eps: float,
    axis: int,
    weight_offset: float,
    round_normalized: bool,
    batch_invariant: bool,
    backend: str,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The eager call: checks, lookup, plan and launch are its."""
    return api.rmsnorm(
        x,
        weight,
        eps,
        axis,
        out=out,
        backend=backend,
        batch_invariant=batch_invariant,
        **mode_arguments(weight_offset, round_normalized),
    )


def _forward_fake(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _out(*arguments: Any) -> None:
    """As `_forward`, into the last argument."""
    _forward(*arguments)


def _out_fake(
    x: torch.Tensor,
    weight: Weight,
    eps: float,
    axis: int,
    weight_offset: float,
    round_normalized: bool,
    batch_invariant: bool,
    backend: str,
    out: torch.Tensor,
) -> None:
    del eps, batch_invariant
    check_arguments(x, weight, axis, out, backend, Numerics(weight_offset, round_normalized))
    plans.check_out_needs_no_grad(x, weight, out)


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: Weight,
    eps: float,
    axis: int,
    weight_offset: float,
    round_normalized: bool,
    wants_dx: bool,
    wants_dw: bool,
) -> list[torch.Tensor]:
    """dx and dw, those that are wanted."""
    wants = wants_dx, wants_dw
    gradients = backward_plans(x, axis, Numerics(weight_offset, round_normalized)).call(dy, x, weight, wants)(dy, x, weight, eps)
    return [gradient for gradient, wanted in zip(gradients, wants, strict=True) if wanted and gradient is not None]


def _backward_fake(dy: torch.Tensor, x: torch.Tensor, weight: Weight, eps: float, axis: int, *rest: Any) -> list[torch.Tensor]:
    del dy, eps
    *_, wants_dx, wants_dw = rest
    dw = [weight.new_empty(weight.shape)] if wants_dw and weight is not None else []
    return [empty_dx(x, axis), *dw] if wants_dx else dw


_ARGUMENTS = f"Tensor x, Tensor? weight, float eps, int axis, {NUMERICS}, bool batch_invariant, str backend"
_OF_BACKWARD = f"Tensor dy, Tensor x, Tensor? weight, float eps, int axis, {NUMERICS}, bool wants_dx, bool wants_dw"
register_composite(f"rmsnorm({_ARGUMENTS}) -> Tensor", _rmsnorm)
register(f"rmsnorm_forward({_ARGUMENTS}) -> Tensor", _forward, _forward_fake)
register(f"rmsnorm_out({_ARGUMENTS}, Tensor(a!) out) -> ()", _out, _out_fake)
register(f"rmsnorm_backward({_OF_BACKWARD}) -> Tensor[]", _backward, _backward_fake)
