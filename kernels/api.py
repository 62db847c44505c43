"""The public function `rmsnorm`: one C call tells whether this kind of call is known, then an allocation and a launch."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import torch
from torch import is_grad_enabled
from torch.autograd import forward_ad

from kernels import backward, plans, residual
from kernels.numerics import FP32, NO_OFFSET, PLAIN, Numerics
from kernels.overrides import active_override
from kernels.plans import MAX_PLANS, Plan
from kernels.reference import rmsnorm_torch
from kernels.shortcuts import Shortcuts
from kernels.validation import check_arguments, checked_eps, checked_numerics, overlap_offset

LAST_AXIS = -1
"""CPython keeps one object for it, so that `is` suffices; another one that is equal would take the slower path."""

_plans: dict[Any, Plan] = {}
_shortcuts: defaultdict[Numerics, Shortcuts] = defaultdict(Shortcuts)  # the check of a call's tensors sees nothing of its numerics
_plain_shortcuts = _shortcuts[PLAIN]
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_transform = torch._C._functorch.peek_interpreter_stack  # the innermost torch.func transform (vmap, grad, …), or None


def rmsnorm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    axis: int = -1,
    *,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    batch_invariant: bool = False,
    weight_offset: float = NO_OFFSET,
    casting: str = FP32,
) -> torch.Tensor:
    """Root mean square layer normalization: y = x / sqrt(mean(x², axis) + eps) * (weight + weight_offset).

    Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4, with eps inside the root. Arithmetic is fp32 whatever
    the dtypes (fp64 for fp64 x), the result is rounded once to x's dtype; but see `casting`.

    Args:
        x: tensor of any shape with at least one dimension and no size 0; fp16, bf16, fp32 (kernels) or fp64 (PyTorch). Any strides:
            rows at up to two strides are read in place (a q or k slice of a packed qkv); what needs more is copied once.
        weight: None, or a vector of length x.shape[axis] on x's device, of any of these dtypes.
        eps: added to the mean square; not negative.
        axis: the dimension to normalise over.
        out: where to write the result: x's shape, dtype and device. May be x itself.
        backend: "auto", "triton" (an error where no kernel serves the call) or "torch" (any device, any float dtype, empty x).
            RMSNORM_BACKEND in the environment replaces "auto".
        batch_invariant: choose the config by x.shape[axis] alone, so that a row's bits don't depend on how many rows come with it,
            or where it is among them (for tensors whose pointers and strides are multiples of 16 bytes). Rows whose elements are not
            adjacent are copied once. It says nothing of the gradients.
        weight_offset: added to the weight in fp32; finite, and 0 without a weight. Gemma's norms want 1.0.
        casting: where is rounded, and nothing else. "fp32": the result, once. "llama": x / sqrt(…) is rounded to x's dtype before it is
            multiplied by the weight, as transformers' LlamaRMSNorm does; in the gradients that rounding counts as none. "gemma": as
            "fp32", for that is how GemmaRMSNorm rounds; its 1 + weight is weight_offset=1.0.

    Returns:
        A tensor of x's shape and dtype, strides as `torch.empty_like(x)` gives them; `out` if that was given. Differentiable: the
        gradients come from tuned kernels too (`kernels.backward.prepare_backward` says which strides are read in place), are the same
        bits in every run, and can be differentiated once more (create_graph=True), by PyTorch's operations.

    Raises:
        InvalidInput: a ValueError and an AssertionError, with the value seen and the way out.
    """
    if eps.__class__ is not float or not eps >= 0.0:
        eps = checked_eps(eps)
    numerics = PLAIN
    if casting is not FP32 or weight_offset is not NO_OFFSET:  # not the defaults themselves
        numerics = checked_numerics(weight_offset, casting)
    if _is_dynamo_compiling():
        from kernels.operators import traced

        return traced(x, weight, eps, axis, out, backend, batch_invariant, numerics)
    usual = backend == "auto" and axis is LAST_AXIS and batch_invariant is False and x.__class__ is torch.Tensor
    usual = usual and active_override() is None and forward_ad._current_level < 0
    call = node = None
    if usual:
        shortcuts = _plain_shortcuts if numerics is PLAIN else _shortcuts[numerics]
        try:
            if out is not None:
                call = shortcuts.find_into(out, x, weight)
            else:
                check, call, node, node_eps, recording, weightless = shortcuts.latest
                is_latest = recording is is_grad_enabled() and weightless is (weight is None) and not x.is_nested
                if not (is_latest and (check(x) if weight is None else check(x, weight))):
                    call, node = shortcuts.find(x, weight, eps), None
        except (AttributeError, RuntimeError):  # no tensor, or one without sizes: the checks say which
            call = None
        if call is not None:
            return call(out, x, weight, eps) if node is None or eps != node_eps else node(x, weight)
    if torch.compiler.is_compiling() and x.__class__ is not torch.Tensor:  # torch.export runs this code on fake tensors
        from kernels.operators import traced

        return traced(x, weight, eps, axis, out, backend, batch_invariant, numerics)
    if _transform() is not None or forward_ad._current_level >= 0:
        # Under a torch.func transform or forward-mode AD: PyTorch's operations know what to do.
        check_arguments(x, weight, axis, out, backend, numerics)
        return plans.into(out, rmsnorm_torch(x, weight, eps, axis, numerics))
    plan, is_remembered = _plan(x, weight, axis, out, backend, batch_invariant, numerics)
    if usual and is_remembered:
        shortcuts.add(plan.call, plan.node_of, x, weight, out)
    return plan.call(out, x, weight, eps)


def by_shortcut(x: torch.Tensor, weight: torch.Tensor | None, eps: float, weight_offset: float, casting: str) -> torch.Tensor | None:
    """`rmsnorm(x, weight, eps, weight_offset=…, casting=…)` if such a call was made before. Not for traced code.

    None where none was, under an override or forward-mode AD, and for what is no plain tensor.
    """
    if x.__class__ is not torch.Tensor or eps.__class__ is not float or not eps >= 0.0:
        return None
    if active_override() is not None or forward_ad._current_level >= 0:
        return None
    is_plain = casting is FP32 and weight_offset is NO_OFFSET
    shortcuts = _plain_shortcuts if is_plain else _shortcuts[checked_numerics(weight_offset, casting)]
    check, call, node, node_eps, recording, weightless = shortcuts.latest
    is_latest = recording is is_grad_enabled() and weightless is (weight is None) and not x.is_nested
    if is_latest and (check(x) if weight is None else check(x, weight)):
        return call(None, x, weight, eps) if node is None or eps != node_eps else node(x, weight)
    found = shortcuts.find(x, weight, eps)
    return None if found is None else found(None, x, weight, eps)


def _plan(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    axis: int,
    out: torch.Tensor | None,
    backend: str,
    batch_invariant: bool,
    numerics: Numerics,
) -> tuple[Plan, bool]:
    """What serves this kind of call, prepared now if it is new, and whether that is remembered."""
    try:
        key = (
            x.shape, x.stride(), x.dtype, x.get_device(), x.__class__, axis, axis.__class__, backend, batch_invariant, numerics,
            active_override(),
            None if weight is None else (weight.shape, weight.stride(), weight.dtype, weight.get_device(), weight.__class__),
            None if out is None else (out.shape, out.stride(), out.dtype, out.get_device(), overlap_offset(x, out), out.requires_grad),
            torch.is_grad_enabled(), x.requires_grad or (weight is not None and weight.requires_grad),
        )  # fmt: skip
        plan = _plans.get(key)
    except (AttributeError, TypeError, RuntimeError):
        # No tensor, an unhashable argument, or a tensor without strides: the checks say which.
        return plans.prepare(x, weight, axis, out, backend, batch_invariant, numerics), False
    if plan is None:
        plan = plans.prepare(x, weight, axis, out, backend, batch_invariant, numerics)
        if len(_plans) >= MAX_PLANS:
            _clear()
        _plans[key] = plan
    return plan, True


def stats() -> dict[str, int]:
    """How many distinct kinds of calls (function, shape, strides, dtypes, device, …) each tier of the ladder serves in this process.

    Keys are tier names in lower case: `exact`, `nearest_rows`, `nearest_cols`, `nearest_device`, `modelled`, `heuristic`, `torch`,
    `override`; besides, `torch_requested` counts those that went to PyTorch without a lookup (fp64, backend="torch"). Backwards
    are not counted.
    """
    return dict(Counter([*(plan.served_by for plan in list(_plans.values())), *residual.served_by()]))


def forget_plans() -> None:
    """Drop all prepared plans and what was read from the databases, so that the next call looks again."""
    _clear()
    residual.forget_plans()
    backward.forget_backwards()
    if plans.has_triton():
        from kernels import dispatch

        dispatch.forget_records()


def _clear() -> None:
    _plans.clear()
    for shortcuts in list(_shortcuts.values()):
        shortcuts.clear()
