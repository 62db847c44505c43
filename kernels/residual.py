"""The public function `add_rmsnorm`: a residual stream's addition and the RMSNorm of the sum in one kernel."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.autograd import forward_ad

from kernels import residual_plans
from kernels.calls import Sums
from kernels.numerics import FP32, NO_OFFSET, PLAIN, Numerics
from kernels.overrides import active_override
from kernels.plans import MAX_PLANS
from kernels.reference import add_rmsnorm_torch
from kernels.residual_plans import AddPlan
from kernels.shortcuts import AddShortcuts
from kernels.validation import check_add_arguments, checked_eps, checked_numerics, overlap_offset

_plans: dict[Any, AddPlan] = {}
_shortcuts: defaultdict[Numerics, AddShortcuts] = defaultdict(AddShortcuts)  # as those of rmsnorm
_plain_shortcuts = _shortcuts[PLAIN]
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_transform = torch._C._functorch.peek_interpreter_stack  # the innermost torch.func transform (vmap, grad, …), or None


def add_rmsnorm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    out: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    backend: str = "auto",
    batch_invariant: bool = False,
    weight_offset: float = NO_OFFSET,
    casting: str = FP32,
) -> Sums:
    """new_residual = x + residual and y = rmsnorm(new_residual, weight, eps) over the last axis, in one pass over memory.

    The sum is formed in fp32 and rounded once to the residual's dtype; y is the RMSNorm of that rounded sum, rounded once to x's dtype.
    So the two are what `h = x + residual; y = rmsnorm(h)` gives, and an fp32 residual stream beside bf16 x and y stays fp32.

    Args:
        x: what is added to the stream (a layer's output): fp16, bf16, fp32 (kernels) or fp64 (PyTorch), at least one dimension, no size 0.
        residual: the stream so far: x's shape, on x's device, of any of these dtypes.
        weight, eps, backend, batch_invariant, weight_offset: as `kernels.rmsnorm` has them.
        casting: as `kernels.rmsnorm` has it, whose x the rounded sum is: "llama" rounds new_residual / sqrt(…) to the residual's dtype.
        out: where to write y: x's shape, dtype and device. May be x itself.
        residual_out: where to write the sum: residual's shape, dtype and device. May be residual itself. With out=x and
            residual_out=residual nothing is allocated.

    Rows at up to two strides are read in place where the elements of a row are adjacent and out and residual_out (or what
    `torch.empty_like` makes of x and residual) have the strides of x and residual; otherwise all are copied once.

    Returns:
        y and new_residual, strides as `torch.empty_like` gives them for x and residual; `out` and `residual_out` if given. Differentiable
        in x, residual and weight, by kernels that add the gradient arriving at new_residual to that of the norm before they round; once
        more (create_graph=True) by PyTorch's operations.

    Raises:
        InvalidInput: a ValueError and an AssertionError, with the value seen and the way out.
    """
    if eps.__class__ is not float or not eps >= 0:
        eps = checked_eps(eps)
    numerics = PLAIN
    if casting is not FP32 or weight_offset is not NO_OFFSET:  # not the defaults themselves
        numerics = checked_numerics(weight_offset, casting)
    if _is_dynamo_compiling():
        from kernels.residual_operators import traced

        return traced(x, residual, weight, eps, out, residual_out, backend, batch_invariant, numerics)
    usual = backend == "auto" and batch_invariant is False and active_override() is None and forward_ad._current_level < 0
    try:
        shortcuts = _plain_shortcuts if numerics is PLAIN else _shortcuts[numerics]
        call = shortcuts.find(x, residual, weight, out, residual_out) if usual else None
    except (AttributeError, RuntimeError):  # no tensor, or one without sizes: the checks say which
        call = None
    if call is not None:
        return call(out, residual_out, x, residual, weight, eps)
    if torch.compiler.is_compiling() and x.__class__ is not torch.Tensor:  # torch.export runs this code on fake tensors
        from kernels.residual_operators import traced

        return traced(x, residual, weight, eps, out, residual_out, backend, batch_invariant, numerics)
    if _transform() is not None or forward_ad._current_level >= 0:
        # Under a torch.func transform or forward-mode AD: PyTorch's operations know what to do.
        check_add_arguments(x, residual, weight, out, residual_out, backend, numerics)
        return residual_plans.into(out, residual_out, add_rmsnorm_torch(x, residual, weight, eps, numerics))
    plan, is_remembered = _plan(x, residual, weight, out, residual_out, backend, batch_invariant, numerics)
    if usual and is_remembered:
        shortcuts.add(plan.call, x, residual, weight, out, residual_out)
    return plan.call(out, residual_out, x, residual, weight, eps)


def _plan(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    backend: str,
    batch_invariant: bool,
    numerics: Numerics,
) -> tuple[AddPlan, bool]:
    """What serves this kind of call, prepared now if it is new, and whether that is remembered."""
    tensors = (x, residual, weight, out, residual_out)
    try:
        key = (
            *(None if tensor is None else _kind(tensor) for tensor in tensors),
            _overlaps(x, residual, out, residual_out),
            (backend, batch_invariant, numerics, active_override(), torch.is_grad_enabled()),
        )
        plan = _plans.get(key)
    except (AttributeError, TypeError, RuntimeError):
        # No tensor, an unhashable argument, or a tensor without strides: the checks say which.
        return residual_plans.prepare(*tensors, backend, batch_invariant, numerics), False
    if plan is None:
        plan = residual_plans.prepare(*tensors, backend, batch_invariant, numerics)
        if len(_plans) >= MAX_PLANS:
            forget_plans()
        _plans[key] = plan
    return plan, True


def _kind(t: torch.Tensor) -> tuple[Any, ...]:
    return t.shape, t.stride(), t.dtype, t.device, t.__class__, t.requires_grad, t.is_neg()


def _overlaps(
    x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor | None, residual_out: torch.Tensor | None
) -> tuple[int | None, ...]:
    """How each result lies to what is read and to the other one; nothing to tell without results."""
    pairs = ((out, x), (out, residual), (residual_out, x), (residual_out, residual), (out, residual_out))
    return tuple(None if a is None or b is None else overlap_offset(a, b) for a, b in pairs)


def served_by() -> list[str]:
    """The tier of the ladder that each kind of call is served by."""
    return [plan.served_by for plan in list(_plans.values())]


def forget_plans() -> None:
    """Drop all prepared plans."""
    _plans.clear()
    for shortcuts in list(_shortcuts.values()):
        shortcuts.clear()
