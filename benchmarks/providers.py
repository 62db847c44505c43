"""The implementations that are compared. Each says what exactly it calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F

from kernels import override, rmsnorm
from kernels.heuristic import heuristic_config
from kernels.reference import rmsnorm_torch
from tuner.cases import EPS, Case, Tensors
from tuning_db.model import Device

Launch: TypeAlias = Callable[[Tensors], torch.Tensor]
"""One call on a set of tensors. Providers that allocate return a new tensor, which the clock keeps alive; others write tensors.y."""


@dataclass(frozen=True)
class Provider:
    """A named implementation: what it calls, and how to prepare it for a case."""

    calls: str
    prepare: Callable[[Case, Device], Launch]


def _tuned(case: Case, _: Device) -> Launch:
    return lambda tensors: rmsnorm(tensors.x, tensors.weight, EPS, case.axis, out=tensors.y)


def _heuristic(case: Case, device: Device) -> Launch:
    config = heuristic_config(case.problem, device)
    if config is None:
        raise ValueError(f"no variant serves {case.problem}")

    def launch(tensors: Tensors) -> torch.Tensor:
        with override(config):
            return rmsnorm(tensors.x, tensors.weight, EPS, case.axis, out=tensors.y)

    return launch


def _rms_norm(case: Case) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """What a PyTorch user writes for this case: over the last axis F.rms_norm, over another the formula."""
    if case.axis == -1:
        cols = case.problem.cols
        return lambda x, weight: F.rms_norm(x, (cols,), weight, EPS).to(x.dtype)
    return lambda x, weight: rmsnorm_torch(x, weight, EPS, case.axis)


def _eager(case: Case, _: Device) -> Launch:
    function = _rms_norm(case)
    return lambda tensors: function(tensors.x, tensors.weight)


def _compiled(case: Case, _: Device) -> Launch:
    torch._dynamo.reset()  # a shape's code is not reused for the next: each is compiled for what it is
    function = torch.compile(_rms_norm(case), dynamic=False)
    return lambda tensors: function(tensors.x, tensors.weight)


PROVIDERS: dict[str, Provider] = {
    "tuned": Provider("kernels.rmsnorm(x, weight, out=y)", _tuned),
    "heuristic": Provider("the same with the heuristic's config", _heuristic),
    "eager": Provider("torch.nn.functional.rms_norm", _eager),
    "compile": Provider("torch.compile of the same", _compiled),
}
