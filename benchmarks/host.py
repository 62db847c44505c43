"""Host time of a call: what Python, dispatch and launch cost before the GPU has anything to do."""

from __future__ import annotations

import functools
import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.gpu_time import FOREIGN_ERRORS, prepared
from benchmarks.other_ops import FUNCTIONS
from benchmarks.providers import Launch, Provider, Refusal
from benchmarks.results import IN_TURN, MODULE, ONE_SHAPE, OUT_GIVEN, WAYS_WITH_GRAD, WITH_BACKWARD, WITH_GRAD
from kernels import RMSNorm
from kernels.dispatch import device_of
from tuner.cases import EPS, Case, Tensors
from tuner.verify import Verifier
from tuning_db.model import Device, Problem

CALLS = 100
"""Calls between two reads of the host's clock: below the depth of the launch queue, so that none waits for the GPU; and few, so that a
host that is slower for a while is so for every provider."""
REPEATS = 75
WARM_CALLS = 20

MODULES = {"tuned": RMSNorm, "eager": torch.nn.RMSNorm}
SHAPES_IN_TURN = 5
MOST_ROWS = 64
"""Of the shapes in turn: so few that the GPU keeps pace."""


def host_times(providers: Mapping[str, Provider], rows: int, cols: int) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """µs of host time a call by provider and way, bf16: medians of interleaved repeats; and why who was not timed."""
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
    for name in providers:
        if name in FUNCTIONS and name not in missing:
            try:
                calls |= {(name, way): call for way, call in _calls_with_grad(name, case, device, tensors[0]).items()}
            except FOREIGN_ERRORS as error:
                if not providers[name].foreign:
                    raise
                missing[f"{name} with gradients"] = f"refuses: {error}"
    return _timed(calls), missing


def _calls_with_grad(name: str, case: Case, device: Device, tensors: Tensors) -> dict[str, Callable[[], object]]:
    """A provider's calls by way, each made once."""
    assert tensors.weight is not None
    x, weight = tensors.x.detach().requires_grad_(), torch.nn.Parameter(tensors.weight)
    function, dy = FUNCTIONS[name].norm(case, device), torch.ones_like(x)
    calls: dict[str, Callable[[], object]] = {
        WITH_GRAD: lambda: function(x, weight),
        WITH_BACKWARD: lambda: torch.autograd.grad(function(x, weight), (x, weight), dy),
    }
    if name in MODULES:
        calls[MODULE] = functools.partial(MODULES[name](case.problem.cols, EPS, device=x.device, dtype=x.dtype), x)
    for call in calls.values():
        call()
    return calls


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
    for repeat in range(REPEATS):
        shuffled = random.Random(repeat).sample(list(calls), len(calls))  # none always follows the same one
        # Backwards last: they run in a thread of their own, and the host needs a while to come back from that.
        for key in sorted(shuffled, key=lambda key: key[1] == WITH_BACKWARD):
            call = calls[key]
            with torch.set_grad_enabled(key[1] in WAYS_WITH_GRAD):
                for _ in range(WARM_CALLS):
                    call()
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
