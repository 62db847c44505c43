"""GPU time of providers on the tuner's clock: verified first, then all of them in the same rounds over rotated buffers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import triton

from benchmarks.providers import Launch, Provider, Refusal
from benchmarks.results import CaseResult, Timing
from kernels.dispatch import device_of, pick_config
from tuner.cases import Case, Tensors
from tuner.measure import Bench
from tuner.verify import Verifier
from tuning_db.model import Device, Problem

ROUNDS = 11
"""The interval of the median is then that of the third and the ninth sample, which holds it with 93 %."""

FOREIGN_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError, ImportError, triton.TritonError)
"""How other projects' code says that it does not serve a case."""


def compare(problems: Sequence[Problem], providers: Mapping[str, Provider], index: int = 0) -> Iterator[CaseResult]:
    """Measure the providers on each problem. Who refuses it or computes something else is not timed."""
    for problem in problems:
        with torch.no_grad(), torch.cuda.device(index):
            result = compare_on(Case(problem, torch.device("cuda", index)), device_of(index), providers)
        yield result


def compare_on(case: Case, device: Device, providers: Mapping[str, Provider]) -> CaseResult:
    """One case's result."""
    verifier = Verifier(case)
    launches: dict[str, Launch] = {}
    refused, wrong = {}, {}
    for name, provider in providers.items():
        try:
            launch, fault = prepared(provider, case, device, verifier)
        except Refusal as refusal:
            refused[name] = str(refusal)
            continue
        if fault:
            wrong[name] = fault
        else:
            launches[name] = launch
    del verifier  # its tensors are not needed while the others are timed
    bench = Bench(case, device, seed=5)
    for name, launch in launches.items():
        bench.enter(name, launch)
    samples, reference = bench.rounds(list(launches), ROUNDS)
    timings = {name: Timing.of(samples[name], reference) for name in launches}
    configs = {"tuned": str(pick_config(case.problem, device).config)} if "tuned" in launches else {}
    return CaseResult(case.problem, statistics.median(reference), timings, configs, refused, wrong)


def prepared(provider: Provider, case: Case, device: Device, verifier: Verifier, *, allocating: bool = False) -> tuple[Launch, str]:
    """A provider's launch for a case, and what is wrong with its result (empty: nothing). Raises Refusal.

    allocating: the call that makes its result, also where there is one that is given it.
    """
    prepare = (provider.prepare_allocating if allocating else None) or provider.prepare
    try:
        launch = prepare(case, device)
        return launch, verifier.fault(_into_y(launch), provider.roundings)
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except FOREIGN_ERRORS as error:
        if not provider.foreign:
            raise
        raise Refusal(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:160]


def _into_y(launch: Launch) -> Callable[..., None]:
    """A provider's call in the form that the verifier takes."""

    def into(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, _eps: float) -> None:
        result = launch(Tensors(x, weight, y))
        if result is not y:
            y.copy_(result)

    return into
