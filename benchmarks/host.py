"""Host time of a call: what Python, dispatch and launch cost before the GPU has anything to do."""

from __future__ import annotations

import functools
import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.gpu_time import prepared
from benchmarks.providers import Launch, Provider, Refusal
from kernels.dispatch import device_of
from tuner.cases import Case, Tensors
from tuner.verify import Verifier
from tuning_db.model import Problem

CALLS = 500
"""Calls between two reads of the host's clock: below the depth of the launch queue, so that none waits for the GPU."""
REPEATS = 15
WARM_CALLS = 50

ONE_SHAPE, OUT_GIVEN, IN_TURN = "one shape", "one shape, out given", "5 shapes in turn"
WAYS = (ONE_SHAPE, OUT_GIVEN, IN_TURN)
SHAPES_IN_TURN = 5
MOST_ROWS = 64
"""Of the shapes in turn: so few that the GPU keeps pace."""


def host_times(providers: Mapping[str, Provider], rows: int, cols: int) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """µs of host time a call by provider and way, bf16 inputs without grad: medians of interleaved repeats; and why who was not timed."""
    problem = Problem("rmsnorm", "bfloat16", "bfloat16", "bfloat16", rows, cols)
    index = torch.cuda.current_device()
    case, device = Case(problem, torch.device("cuda", index)), device_of(index)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    missing = {}
    with torch.no_grad():
        tensors, several = _tensors(case, [rows]), _tensors(case, random_rows())
        calls["torch.empty_like", ONE_SHAPE] = functools.partial(torch.empty_like, tensors[0].x)
        verifier = Verifier(case)
        for name, provider in providers.items():
            try:
                launch, fault = prepared(provider, case, device, verifier, allocating=True)
            except Refusal as refusal:
                missing[name] = f"refuses: {refusal}"
                continue
            if fault:
                missing[name] = f"its result {fault}"
                continue
            calls[name, ONE_SHAPE] = functools.partial(launch, tensors[0])
            calls[name, IN_TURN] = in_turn(launch, several)
            if provider.prepare_allocating:
                into, _ = prepared(provider, case, device, verifier)
                calls[name, OUT_GIVEN] = functools.partial(into, tensors[0])
        return _timed(calls), missing


def in_turn(launch: Launch, several: list[Tensors]) -> Callable[[], object]:
    """A call on the next of several sets of tensors."""
    turn = itertools.cycle(several)
    return lambda: launch(next(turn))


def random_rows() -> list[int]:
    """Rows of the shapes in turn, always the same."""
    return random.Random(7).sample(range(1, MOST_ROWS + 1), SHAPES_IN_TURN)


def _tensors(case: Case, rows: list[int]) -> list[Tensors]:
    weight, cols = case.weight(seed=1), case.problem.cols
    made = []
    for count in rows:
        x = torch.randn(count, cols, device=case.device).to(torch.bfloat16)
        made.append(Tensors(x, weight, torch.empty_like(x)))
    return made


def _timed(calls: Mapping[tuple[str, str], Callable[[], object]]) -> dict[str, dict[str, float]]:
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for call in calls.values():
        for _ in range(WARM_CALLS):
            call()
    for _ in range(REPEATS):
        for key, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            for _ in range(CALLS):
                call()
            samples[key].append((time.perf_counter_ns() - start) / CALLS / 1e3)
    torch.cuda.synchronize()
    times: dict[str, dict[str, float]] = {}
    for (name, way), values in samples.items():
        times.setdefault(name, {})[way] = statistics.median(values)
    return times
