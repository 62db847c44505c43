"""The providers of the other ops than the plain forward: add_rmsnorm, and the backward of both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from benchmarks.backward import Backward
from benchmarks.providers import Launch, Provider, Refusal, heuristic_override, rms_norm_of
from kernels import add_rmsnorm, rmsnorm
from tuner.cases import EPS, Case
from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, BACKWARD, NO_WEIGHT, Device

Function: TypeAlias = Callable[..., Any]
"""(x, weight) -> y, or (x, residual, weight) -> (y, new_residual); differentiable."""

Maker: TypeAlias = Callable[[Case, Device], Function]
"""Makes a Function for a case. Raises Refusal."""

TERMS_ROUNDED = 2
"""Roundings of a gradient that others may form of g = dy · w and x̂ in the dtype of y."""

SUM_NOT_ROUNDED = 3
"""Roundings of y where it is the norm of the sum before that was rounded: of y, of the sum, and at worst as much of its norm."""


@dataclass(frozen=True)
class Functions:
    """A provider's norm and its norm of a sum, what they call, and how often y of the sum and gradients are rounded."""

    norm: Maker
    norm_calls: str
    add: Maker
    add_calls: str
    add_roundings: int = 1
    gradient_roundings: int = TERMS_ROUNDED


def _tuned(case: Case, _: Device) -> Function:
    return lambda x, weight: rmsnorm(x, weight, EPS, case.axis)


def _tuned_add(_case: Case, _: Device) -> Function:
    return lambda x, residual, weight: add_rmsnorm(x, residual, weight, EPS)


def _overridden(make: Maker) -> Maker:
    """With the heuristic's config, which a backward takes from the call that it belongs to."""

    def made(case: Case, device: Device) -> Function:
        return heuristic_override(case, device, make(case, device))

    return made


def _eager(case: Case, _: Device) -> Function:
    return rms_norm_of(case)


def _eager_add(case: Case, _: Device) -> Function:
    cols, y_dtype = case.problem.cols, getattr(torch, case.problem.y_dtype)

    def call(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        new_residual = residual + x
        return F.rms_norm(new_residual, (cols,), weight, EPS).to(y_dtype), new_residual

    return call


def _compiled(make: Maker) -> Maker:
    def made(case: Case, device: Device) -> Function:
        torch._dynamo.reset()  # a shape's code is not reused for the next: each is compiled for what it is
        torch._functorch.config.donated_buffer = False  # a backward that is run again must keep what it was given
        return torch.compile(make(case, device), dynamic=False)

    return made


def _liger(case: Case, _: Device) -> Function:
    if case.problem.w_dtype == NO_WEIGHT:
        raise Refusal("needs a weight")
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


def _liger_add(case: Case, _: Device) -> Function:
    if case.problem.w_dtype == NO_WEIGHT:
        raise Refusal("needs a weight")
    if case.problem.x_dtype != case.problem.y_dtype:
        raise Refusal("has the residual in x's dtype only")
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda x, residual, weight: LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)


def _quack(_case: Case, _: Device) -> Function:
    from quack.rmsnorm import rmsnorm as norm

    return lambda x, weight: norm(x, weight, eps=EPS)


def _quack_add(_case: Case, _: Device) -> Function:
    from quack.rmsnorm import rmsnorm as norm

    return lambda x, residual, weight: norm(x, weight, residual=residual, eps=EPS, prenorm=True)


SAME_BY_HEURISTIC = "the same with the heuristic's config"
SAME_COMPILED = "torch.compile of the same, dynamic=False"

FUNCTIONS = {
    "tuned": Functions(
        norm=_tuned,
        norm_calls="kernels.rmsnorm(x, weight)",
        add=_tuned_add,
        add_calls="kernels.add_rmsnorm(x, residual, weight)",
        gradient_roundings=1,
    ),
    "heuristic": Functions(
        norm=_overridden(_tuned),
        norm_calls=SAME_BY_HEURISTIC,
        add=_overridden(_tuned_add),
        add_calls=SAME_BY_HEURISTIC,
        gradient_roundings=1,
    ),
    "eager": Functions(
        norm=_eager,
        norm_calls="torch.nn.functional.rms_norm(x, (cols,), weight)",
        add=_eager_add,
        add_calls="torch.nn.functional.rms_norm(residual + x, (cols,), weight)",
    ),
    "compile": Functions(
        norm=_compiled(_eager),
        norm_calls=SAME_COMPILED,
        add=_compiled(_eager_add),
        add_calls=SAME_COMPILED,
        add_roundings=SUM_NOT_ROUNDED,
    ),
    "liger": Functions(
        norm=_liger,
        norm_calls="liger_kernel.ops.rms_norm.LigerRMSNormFunction.apply(x, weight, eps, in_place=False)",
        add=_liger_add,
        add_calls="liger_kernel.ops.fused_add_rms_norm.LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps)",
        add_roundings=2,
    ),
    "quack": Functions(
        norm=_quack,
        norm_calls="quack.rmsnorm.rmsnorm(x, weight, eps=eps)",
        add=_quack_add,
        add_calls="quack.rmsnorm.rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True)",
        add_roundings=SUM_NOT_ROUNDED,
    ),
}


def with_other_ops(name: str, provider: Provider) -> Provider:
    """The provider, with what it has for the other ops than the plain forward."""
    own = FUNCTIONS.get(name)
    return provider if own is None else with_functions(provider, own)


def with_functions(
    provider: Provider, own: Functions, gradients_within: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Provider:
    """The provider with these functions for the other ops; their gradients are computed within a context."""
    return provider.also(
        {
            BACKWARD: (f"autograd's backward of {own.norm_calls}", _backward(own.norm, gradients_within), own.gradient_roundings),
            ADD_FORWARD: (own.add_calls, _sums(own.add), own.add_roundings),
            ADD_BACKWARD: (f"autograd's backward of {own.add_calls}", _backward(own.add, gradients_within), own.gradient_roundings),
        }
    )


def _backward(make: Maker, within: Callable[[], AbstractContextManager[None]]) -> Callable[[Case, Device], Launch]:
    return lambda case, device: Backward(case.problem, make(case, device), within)


def _sums(make: Maker) -> Callable[[Case, Device], Launch]:
    def prepare(case: Case, device: Device) -> Launch:
        function = make(case, device)
        return lambda tensors: function(tensors.x, tensors.residual, tensors.weight)

    return prepare
