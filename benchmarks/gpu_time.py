"""GPU time of providers on the tuner's clock: verified first, then all of them in the same rounds over rotated buffers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import triton

from benchmarks.backward import Backward
from benchmarks.providers import Launch, Provider, Refusal
from benchmarks.results import CaseResult, Timing
from kernels.dispatch import device_of, pick_config
from tuner.cases import Case, Tensors
from tuner.measure import Bench
from tuner.verify import Verifier
from tuning_db.model import Device, Problem

ROUNDS = 11
"""The interval of the median is then that of the third and the ninth sample, which holds it with 93 %."""

FOREIGN_ERRORS = (
    *(RuntimeError, ValueError, TypeError, AttributeError, AssertionError, NotImplementedError, ImportError),
    triton.TritonError,
)
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
    samples, floor = timed_together(case, device, launches)
    timings = {name: Timing.of(samples[name], floor) for name in launches}
    configs = {"tuned": str(pick_config(case.problem, device).config)} if "tuned" in launches else {}
    return CaseResult(case.problem, statistics.median(floor), timings, configs, refused, wrong)


def timed_together(case: Case, device: Device, launches: Mapping[str, Launch]) -> tuple[dict[str, list[float]], list[float]]:
    """µs of each launch in the same ROUNDS, and in each round of a copy of as many bytes."""
    bench = Bench(case, device, seed=5)
    for name, launch in launches.items():
        bench.enter(name, launch, before=launch.save if isinstance(launch, Backward) else None)
    samples, reference = bench.rounds(list(launches), ROUNDS)
    return samples, [case.copies * copy_us for copy_us in reference]


def prepared(provider: Provider, case: Case, device: Device, verifier: Verifier, *, allocating: bool = False) -> tuple[Launch, str]:
    """A provider's launch for a case, and what is wrong with its result (empty: nothing). Raises Refusal.

    allocating: the call that makes its result, also where there is one that is given it.
    """
    provider = provider.serving(case.problem.op)
    prepare = (provider.prepare_allocating if allocating else None) or provider.prepare
    try:
        launch = prepare(case, device)
        fault = verifier.fault(_filling(launch, verifier.tensors), provider.roundings)
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except FOREIGN_ERRORS as error:
        if not provider.foreign:
            raise
        raise Refusal(_first_line(error)) from error
    if isinstance(launch, Backward):
        launch.forget()
    return launch, fault


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:160]


def _filling(launch: Launch, tensors: Tensors) -> Callable[..., None]:
    """A provider's call in the form that the verifier takes: its results are where the verifier looks for them."""

    def fill(*_: object) -> None:
        if isinstance(launch, Backward):
            launch.save(tensors)
        returned = launch(tensors)
        for result, own in zip(tensors.results, returned if isinstance(returned, tuple) else (returned,), strict=True):
            if result is not None and own is not result:
                result.copy_(own)

    return fill
