"""The implementations that are compared: this project's and PyTorch's. Each says what exactly it calls."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from kernels import override, rmsnorm
from kernels.heuristic import heuristic_config
from kernels.reference import rmsnorm_torch
from tuner.cases import EPS, Case, Tensors
from tuning_db.model import FORWARD, Device

Launch: TypeAlias = Callable[[Tensors], Any]
"""One call on a set of tensors. It returns its result, or a tuple of them in the order of `Tensors.results`, which the clock keeps alive;
whoever was given where to write returns that."""

Preparer: TypeAlias = Callable[[Case, Device], Launch]


class Refusal(Exception):
    """A provider does not serve a case; the message says why."""


@dataclass(frozen=True)
class Provider:
    """A named implementation: what it calls, of which distribution, and how to prepare it for a case (which raises Refusal).

    module is imported only to see whether the provider is there. Where `prepare`'s launch writes to tensors.y, prepare_allocating's is
    the call that makes its result. roundings counts the roundings to y's dtype on the way to the result
    (`tuner.verify.relative_tolerance`). foreign marks code of others, whose errors on a case are refusals. All this is of the plain
    forward; `others` has a Provider for each other op.
    """

    calls: str
    distribution: str
    module: str
    prepare: Preparer
    prepare_allocating: Preparer | None = None
    roundings: int = 1
    foreign: bool = False
    others: Mapping[str, Provider] = field(default_factory=dict)

    def serving(self, op: str) -> Provider:
        """The provider of an op. Raises Refusal where it has none."""
        if op == FORWARD:
            return self
        if op not in self.others:
            raise Refusal(f"has no {op} here")
        return self.others[op]

    def calls_of(self, ops: Iterable[str]) -> str:
        """What is called for these ops, and in which version."""
        calls = [self.calls if op == FORWARD else self.others[op].calls for op in ops if op == FORWARD or op in self.others]
        return f"{'; '.join(calls) or 'nothing for this'}, {self.distribution} {self.version()}"

    def also(self, others: Mapping[str, tuple[str, Preparer, int]]) -> Provider:
        """With other ops: what is called, how it is prepared, and how often it rounds."""
        made = {
            op: replace(self, calls=calls, prepare=prepare, prepare_allocating=None, roundings=roundings)
            for op, (calls, prepare, roundings) in others.items()
        }
        return replace(self, others=made)

    def absence(self) -> str:
        """Why the provider can't be asked here; empty if it can."""
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            return f"{self.distribution} is not installed" if error.name == self.module.partition(".")[0] else f"does not import: {error}"
        return ""

    def version(self) -> str:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "without a version"


def _tuned(case: Case, _: Device) -> Launch:
    return lambda tensors: rmsnorm(tensors.x, tensors.weight, EPS, case.axis, out=tensors.y)


def _tuned_allocating(case: Case, _: Device) -> Launch:
    return lambda tensors: rmsnorm(tensors.x, tensors.weight, EPS, case.axis)


def _heuristic(case: Case, device: Device) -> Launch:
    return heuristic_override(case, device, _tuned(case, device))


def heuristic_override(case: Case, device: Device, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` with the config that the heuristic picks for a case. Raises Refusal where there is none."""
    config = heuristic_config(case.problem, device)
    if config is None:
        raise Refusal("no variant serves this problem")

    def overridden(*arguments: Any) -> Any:
        with override(config):
            return call(*arguments)

    return overridden


def rms_norm_of(case: Case) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """What a PyTorch user writes for this case: over the last axis F.rms_norm, over another the formula."""
    if case.axis != -1:
        return lambda x, weight: rmsnorm_torch(x, weight, EPS, case.axis)
    cols = case.problem.cols
    if case.problem.w_dtype in ("none", case.problem.x_dtype):
        return lambda x, weight: F.rms_norm(x, (cols,), weight, EPS)
    return lambda x, weight: F.rms_norm(x, (cols,), weight, EPS).to(x.dtype)


def _eager(case: Case, _: Device) -> Launch:
    function = rms_norm_of(case)
    return lambda tensors: function(tensors.x, tensors.weight)


def _compiled(case: Case, _: Device) -> Launch:
    torch._dynamo.reset()  # a shape's code is not reused for the next: each is compiled for what it is
    function = torch.compile(rms_norm_of(case), dynamic=False)
    return lambda tensors: function(tensors.x, tensors.weight)


OURS = {
    "tuned": Provider("kernels.rmsnorm(x, weight, out=y)", "tuned-rmsnorm", "kernels", _tuned, _tuned_allocating),
    "heuristic": Provider("the same with the heuristic's config", "tuned-rmsnorm", "kernels", _heuristic),
}
PYTORCH = {
    "eager": Provider("torch.nn.functional.rms_norm(x, (cols,), weight)", "torch", "torch", _eager),
    "compile": Provider("torch.compile of the same, dynamic=False", "torch", "torch", _compiled),
}
