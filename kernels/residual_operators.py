"""`add_rmsnorm` and its gradients as operators of PyTorch, as `kernels.operators` has those of `rmsnorm`.

A graph holds `add_rmsnorm_forward`, `add_rmsnorm_backward` and `add_rmsnorm_out`; `add_rmsnorm` consists of them.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kernels import plans, residual_plans
from kernels.calls import Sums
from kernels.numerics import Numerics
from kernels.operator_library import NUMERICS, mode_arguments, operators, register, register_composite
from kernels.reference import add_rmsnorm_torch
from kernels.residual import add_rmsnorm
from kernels.residual_backward import AddGradients, add_backward_plans, add_backward_torch
from kernels.validation import check_add_arguments

Weight: TypeAlias = "torch.Tensor | None"


def traced(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: Weight,
    eps: float,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    backend: str,
    batch_invariant: bool,
    numerics: Numerics,
) -> Sums:
    """What a call of `add_rmsnorm` puts into a graph: one operator, or under a torch.func transform PyTorch's operations.

    The operator that writes to given results writes both: one that was not given is allocated before.
    """
    if torch._C._are_functorch_transforms_active():
        check_add_arguments(x, residual, weight, out, residual_out, backend, numerics)
        return residual_plans.into(out, residual_out, add_rmsnorm_torch(x, residual, weight, eps, numerics))
    if out is None and residual_out is None:
        sums: Sums = operators.add_rmsnorm.default(x, residual, weight, eps, *numerics, batch_invariant, backend)
        return sums
    y = torch.empty_like(x) if out is None else out
    new_residual = torch.empty_like(residual) if residual_out is None else residual_out
    operators.add_rmsnorm_out.default(x, residual, weight, eps, *numerics, batch_invariant, backend, y, new_residual)
    return y, new_residual


def _add_rmsnorm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: Weight,
    eps: float,
    weight_offset: float,
    round_normalized: bool,
    batch_invariant: bool,
    backend: str,
) -> Sums:
    """Runs while a graph is made, and leaves in it what it calls."""
    numerics = Numerics(weight_offset, round_normalized)
    check_add_arguments(x, residual, weight, None, None, backend, numerics)
    backend = plans.requested_backend(backend)
    subclass = any(tensor is not None and is_traceable_wrapper_subclass(tensor) for tensor in (x, residual, weight))
    if backend == "torch" or subclass or not plans.kernels_serve(x, weight, backend, plans.why_no_kernel(residual)):
        return add_rmsnorm_torch(x, residual, weight, eps, numerics)
    arguments = x, residual, weight, eps, *numerics, batch_invariant, backend
    if plans.needs_grad(x, residual, weight):
        sums: Sums = _Differentiable.apply(*arguments)
        return sums
    return operators.add_rmsnorm_forward.default(*arguments)


class _Differentiable(torch.autograd.Function):
    """Saves the sum and weight, and nothing else, as the eager node does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor, weight: Weight, eps: float, *rest: Any) -> Sums:
        y, total = operators.add_rmsnorm_forward.default(x, residual, weight, eps, *rest)
        ctx.save_for_backward(total, weight)
        ctx.set_materialize_grads(False)  # of a result that nobody used no zeros are made and added
        ctx.x_dtype = x.dtype
        ctx.eps = eps
        ctx.numerics = Numerics(*rest[:2])
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, dsum: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        wants_x, wants_residual, wants_dw, *others = ctx.needs_input_grad
        if dy is None:
            assert dsum is not None
            gradients: AddGradients = dsum, dsum.to(ctx.x_dtype), None
        elif torch.is_grad_enabled():  # create_graph=True
            gradients = add_backward_torch(dsum, dy, total, weight, ctx.eps, ctx.numerics)
        else:
            wants = wants_x or wants_residual, wants_dw
            found = iter(operators.add_rmsnorm_backward.default(dsum, dy, total, weight, ctx.eps, *ctx.numerics, *wants))
            of_residual = next(found) if wants[0] else None
            of_x = next(found) if wants[0] and ctx.x_dtype != total.dtype else of_residual
            gradients = of_residual, of_x, next(found) if wants_dw else None
        dresidual, dx, dw = gradients
        wanted = dx if wants_x else None, dresidual if wants_residual else None, dw if wants_dw else None
        return *wanted, *(None for _ in others)


def _forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: Weight,
    eps: float,
    weight_offset: float,
    round_normalized: bool,
    batch_invariant: bool,
    backend: str,
    out: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
) -> Sums:
    """The eager call: checks, lookup, plan and launch are its."""
    return add_rmsnorm(
        x,
        residual,
        weight,
        eps,
        out=out,
        residual_out=residual_out,
        backend=backend,
        batch_invariant=batch_invariant,
        **mode_arguments(weight_offset, round_normalized),
    )


def _forward_fake(x: torch.Tensor, residual: torch.Tensor, *_: Any) -> Sums:
    return torch.empty_like(x), torch.empty_like(residual)


def _out(*arguments: Any) -> None:
    """As `_forward`, into the last two arguments."""
    _forward(*arguments)


def _out_fake(x: torch.Tensor, residual: torch.Tensor, weight: Weight, eps: float, *rest: Any) -> None:
    del eps
    weight_offset, round_normalized, _, backend, out, residual_out = rest
    check_add_arguments(x, residual, weight, out, residual_out, backend, Numerics(weight_offset, round_normalized))
    residual_plans.check_results_need_no_grad("out or residual_out", x, residual, weight, out, residual_out)


def _backward(
    dsum: torch.Tensor | None,
    dy: torch.Tensor,
    total: torch.Tensor,
    weight: Weight,
    eps: float,
    weight_offset: float,
    round_normalized: bool,
    wants_dx: bool,
    wants_dw: bool,
) -> list[torch.Tensor]:
    """The gradient of both addends in total's dtype, the same in dy's dtype if that is another, and dw: those that are wanted."""
    known = add_backward_plans(total, Numerics(weight_offset, round_normalized))
    dx, daddend, dw = known.call(dsum, dy, total, weight, (wants_dx, wants_dw))(dsum, dy, total, weight, eps)
    wanted = wants_dx, wants_dx and dy.dtype != total.dtype, wants_dw
    return [part for part, is_wanted in zip((dx, daddend, dw), wanted, strict=True) if is_wanted and part is not None]


def _backward_fake(
    dsum: torch.Tensor | None, dy: torch.Tensor, total: torch.Tensor, weight: Weight, eps: float, *rest: Any
) -> list[torch.Tensor]:
    del dsum, eps
    *_, wants_dx, wants_dw = rest
    gradients = []
    if wants_dx:
        dtypes = [total.dtype] if dy.dtype == total.dtype else [total.dtype, dy.dtype]
        gradients = [torch.empty(total.shape, dtype=dtype, device=total.device) for dtype in dtypes]
    return [*gradients, weight.new_empty(weight.shape)] if wants_dw and weight is not None else gradients


_ARGUMENTS = f"Tensor x, Tensor residual, Tensor? weight, float eps, {NUMERICS}, bool batch_invariant, str backend"
_OF_BACKWARD = f"Tensor? dsum, Tensor dy, Tensor total, Tensor? weight, float eps, {NUMERICS}, bool wants_dx, bool wants_dw"
register_composite(f"add_rmsnorm({_ARGUMENTS}) -> (Tensor, Tensor)", _add_rmsnorm)
register(f"add_rmsnorm_forward({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _forward_fake)
register(f"add_rmsnorm_out({_ARGUMENTS}, Tensor(a!) out, Tensor(b!) residual_out) -> ()", _out, _out_fake)
register(f"add_rmsnorm_backward({_OF_BACKWARD}) -> Tensor[]", _backward, _backward_fake)
