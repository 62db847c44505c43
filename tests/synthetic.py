"""Made-up benchmark results for tests: an H100 that nobody ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.results import CaseResult, FirstCallResult, HostResult, Interval, Provenance, RunResult, Timing
from benchmarks.suites import load_suite
from tuner.measure import POLICY
from tuning_db.model import Device, Problem

DEVICE = Device("sm_90", 132, 50 * 2**20, 227 * 2**10, 3352, name="NVIDIA H100 80GB HBM3")
VERSIONS = {"torch": "2.11.0+cu130", "triton": "3.6.0", "cuda": "13.0", "python": "3.12.3"}
PROVENANCE = Provenance(DEVICE, "2026-11-24T10:00:00+00:00", POLICY, VERSIONS)
PROBLEMS = tuple(load_suite("gate"))

SLOWNESS = {"tuned": 1.0, "heuristic": 1.04, "eager": 1.6, "compile": 1.12, "liger": 1.2, "quack": 1.03, "flashinfer": 1.1, "flaggems": 1.3}
"""Time over ours, everywhere the same."""


def copy_us(problem: Problem) -> float:
    """1 µs and the bytes at 3000 GB/s."""
    return 1.0 + problem.bytes_moved / 3000e3


def timing(us: float, copy: float, spread: float = 0.003) -> Timing:
    fraction = copy / us
    return Timing(
        Interval(us, us * (1 - spread), us * (1 + spread)), Interval(fraction, fraction * (1 - spread), fraction * (1 + spread)), 11
    )


def case(problem: Problem, slowness: Mapping[str, float] = SLOWNESS, factor: float = 1.0) -> CaseResult:
    """Ours takes `factor` × copy / 0.97; Liger refuses what is wide."""
    copy = copy_us(problem)
    names = [name for name in slowness if name != "liger" or problem.cols <= 65536]
    timings = {name: timing(copy / 0.97 * factor * slowness[name], copy) for name in names}
    refused = {"liger": "more than 65536 columns"} if "liger" in slowness and "liger" not in timings else {}
    return CaseResult(problem, copy, timings, {"tuned": "whole_row num_warps=8 weight_first=True"}, refused)


def run_result(
    problems: Sequence[Problem] = PROBLEMS, slowness: Mapping[str, float] = SLOWNESS, factors: Mapping[Problem, float] | None = None
) -> RunResult:
    calls = {name: f"what {name} calls, {name} 1.0" for name in slowness}
    cases = tuple(case(problem, slowness, (factors or {}).get(problem, 1.0)) for problem in problems)
    return RunResult(PROVENANCE, "gate", calls, {}, cases)


HOST = HostResult(
    PROVENANCE,
    1,
    4096,
    {
        "torch.empty_like": {"one shape": 2.5},
        "tuned": {"one shape": 9.8, "5 shapes in turn": 10.1, "one shape, out given": 7.6, "requires grad": 13.2, "module": 15.1},
        "eager": {"one shape": 13.9, "5 shapes in turn": 14.1, "requires grad": 16.5, "module": 17.0},
        "compile": {"one shape": 34.0, "5 shapes in turn": 41.0},
    },
)
FIRST_CALL = FirstCallResult(
    PROVENANCE,
    PROBLEMS[2],
    {
        "tuned": {"empty": Interval(0.9, 0.8, 1.0), "warm": Interval(0.4, 0.4, 0.5)},
        "compile": {"empty": Interval(9.0, 8.5, 9.9), "warm": Interval(4.0, 3.8, 4.4)},
        "autotune": {"empty": Interval(6.1, 6.0, 6.2), "warm": Interval(2.2, 2.1, 2.4)},
    },
)
