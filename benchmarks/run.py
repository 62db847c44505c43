"""Compares providers: GPU time on the tuner's clock, in interleaved rounds over rotated buffers, and host time of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.providers import PROVIDERS
from kernels import rmsnorm
from kernels.dispatch import device_of
from tuner.cases import EPS, Case, Tensors
from tuner.measure import Bench, measurement
from tuner.verify import Verifier
from tuning_db.model import Measurement, Problem

ROUNDS = 9
HOST_CALLS = 500
"""Calls between two reads of the host's clock: below the depth of the launch queue, so that none waits for the GPU."""
HOST_REPEATS = 15


@dataclass(frozen=True)
class Row:
    """One problem: reference copy in µs, a Measurement for each provider, and why a provider is missing."""

    problem: Problem
    copy_us: float
    measured: dict[str, Measurement]
    missing: dict[str, str]


def compare(problems: Sequence[Problem], names: Sequence[str], index: int = 0) -> Iterator[Row]:
    """Measure the named providers on each problem, all of them in the same rounds. A provider that is wrong is not timed."""
    device = device_of(index)
    for problem in problems:
        case = Case(problem, torch.device("cuda", index))
        verifier = Verifier(case)
        bench = Bench(case, device, seed=5)
        missing = {}
        for name in names:
            launch = PROVIDERS[name].prepare(case, device)
            fault = verifier.fault(_into_y(launch))
            if fault:
                missing[name] = fault
            else:
                bench.enter(name, launch)
        entered = [name for name in names if name not in missing]
        samples, reference = bench.rounds(entered, ROUNDS)
        measured = {name: measurement(samples[name], reference) for name in entered}
        yield Row(problem, statistics.median(reference), measured, missing)


def _into_y(launch: Callable[[Tensors], torch.Tensor]) -> Callable[..., None]:
    """A provider's call in the form that the verifier takes."""

    def into(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, _eps: float) -> None:
        result = launch(Tensors(x, weight, y))
        if result is not y:
            y.copy_(result)

    return into


def host_times(rows: int = 1, cols: int = 4096) -> dict[str, float]:
    """µs of host time a call, by what is called: median over HOST_REPEATS of HOST_CALLS calls, interleaved, nothing synchronised inside."""
    x = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(cols, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(x)
    shapes = [torch.randn(count, cols, device="cuda", dtype=torch.bfloat16) for count in (1, 2, 5, 9, 17)]
    turn = iter(range(1 << 62))
    calls: dict[str, Callable[[], object]] = {
        "F.rms_norm": lambda: torch.nn.functional.rms_norm(x, (cols,), weight, EPS),
        "rmsnorm": lambda: rmsnorm(x, weight, EPS),
        "rmsnorm, out given": lambda: rmsnorm(x, weight, EPS, out=out),
        "rmsnorm, 5 shapes in turn": lambda: rmsnorm(shapes[next(turn) % 5], weight, EPS),
        "torch.empty_like": lambda: torch.empty_like(x),
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for call in calls.values():
            for _ in range(50):
                call()
        for _ in range(HOST_REPEATS):
            for name, call in calls.items():
                torch.cuda.synchronize()
                start = time.perf_counter_ns()
                for _ in range(HOST_CALLS):
                    call()
                samples[name].append((time.perf_counter_ns() - start) / HOST_CALLS / 1e3)
    torch.cuda.synchronize()
    return {name: statistics.median(values) for name, values in samples.items()}
