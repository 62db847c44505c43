"""Error against float64 of `rmsnorm` and of `F.rms_norm`, over the problems of a workload."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.providers import PROVIDERS
from kernels.dispatch import device_of
from tuner.cases import EPS, Case
from tuner.verify import float64_rmsnorm
from tuning_db.model import Problem

MAX_ELEMENTS = 1 << 26
"""Larger problems are the same rows again; their float64 copies would fill the GPU."""


@dataclass(frozen=True)
class Errors:
    """‖y - float64‖ / ‖float64‖ of both, and whether two runs of `rmsnorm` gave the same bits."""

    problem: Problem
    tuned: float
    eager: float
    repeatable: bool


def errors(problems: Sequence[Problem], index: int = 0) -> Iterator[Errors]:
    """Errors on random inputs, problem by problem; those over MAX_ELEMENTS are left out."""
    device = device_of(index)
    for problem in problems:
        if problem.rows * problem.cols > MAX_ELEMENTS:
            continue
        case = Case(problem, torch.device("cuda", index))
        tensors = case.sets(1, seed=11)[0]
        expected = float64_rmsnorm(tensors.x, tensors.weight, EPS, case.axis)
        first = PROVIDERS["tuned"].prepare(case, device)(tensors).clone()
        again = PROVIDERS["tuned"].prepare(case, device)(tensors)
        eager = PROVIDERS["eager"].prepare(case, device)(tensors)
        norm = float(expected.norm())
        tuned_error, eager_error = (float((y.double() - expected).norm()) / norm for y in (first, eager))
        yield Errors(problem, tuned_error, eager_error, bool(torch.equal(first, again)))
