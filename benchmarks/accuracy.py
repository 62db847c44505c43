"""Error against float64 of `rmsnorm` and of `F.rms_norm`, over the problems of a workload."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import click
import torch

from benchmarks.peers import PROVIDERS
from kernels.dispatch import device_of
from tuner.cases import EPS, Case
from tuner.verify import float64_rmsnorm
from tuning_db.model import FORWARD, Problem

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
    """Errors on random inputs, problem by problem; those over MAX_ELEMENTS, and other ops than the forward, are left out."""
    device = device_of(index)
    for problem in problems:
        if problem.op != FORWARD or problem.rows * problem.cols > MAX_ELEMENTS:
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


def print_errors(found: Iterable[Errors]) -> None:
    """The largest errors by dtypes of x and weight."""
    groups: dict[tuple[str, str], list[Errors]] = {}
    for one in found:
        groups.setdefault((one.problem.x_dtype, one.problem.w_dtype), []).append(one)
    click.echo(f"{'x':<10}{'weight':<10}{'problems':>9}{'rmsnorm':>12}{'F.rms_norm':>12}{'worst ratio':>13}{'same bits':>11}")
    for (x_dtype, w_dtype), group in groups.items():
        tuned, eager = max(one.tuned for one in group), max(one.eager for one in group)
        ratio, same = max(one.tuned / one.eager for one in group), sum(one.repeatable for one in group)
        click.echo(f"{x_dtype:<10}{w_dtype:<10}{len(group):>9}{tuned:>12.3e}{eager:>12.3e}{ratio:>13.4f}{same:>7}/{len(group)}")
