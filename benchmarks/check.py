"""`record` and `check`: figures of the present code in fresh processes, and how they stand to the board's baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.baseline import PROVIDER, Baseline, combined
from benchmarks.results import CaseResult, RunResult, result_from_dict
from benchmarks.verdict import Change, Judged, Verdict, change_from_baseline, verdict
from tuning_db.model import Problem

RunApart = Callable[[Sequence[Problem]], RunResult]
"""Measures `rmsnorm` on problems in a fresh process."""


def run_apart(problems: Sequence[Problem]) -> RunResult:
    """`RunApart` by `python -m benchmarks run`."""
    from benchmarks.processes import measured_apart

    result = result_from_dict(measured_apart(["benchmarks", "run", "--provider", PROVIDER], problems))
    assert isinstance(result, RunResult)
    return result


def record_baseline(suite: str, problems: Sequence[Problem], processes: int, run: RunApart, say: Callable[[str], None]) -> Baseline:
    """Measure the problems of `suite` in `processes` fresh processes, one after another. Raises BaselineError."""
    runs = []
    for number in range(processes):
        say(f"process {number + 1} of {processes}: {len(problems)} problems")
        runs.append(run(problems))
    return combined(suite, runs)


def check_against(baseline: Baseline, problems: Sequence[Problem], run: RunApart, say: Callable[[str], None]) -> list[Judged]:
    """Measure in a fresh process; what looks slower is measured again in another."""
    say(f"process 1: {len(problems)} problems")
    first = {case.problem: case for case in run(problems).cases}
    changes = {problem: _change(baseline, case) for problem, case in first.items()}
    suspects = [problem for problem, change in changes.items() if change and change.is_suspect]
    again: dict[Problem, Change | None] = {}
    if suspects:
        say(f"process 2: {len(suspects)} that look slower")
        again = {case.problem: _change(baseline, case) for case in run(suspects).cases}
    return [_judged(first[problem], changes[problem], again.get(problem)) for problem in problems]


def _change(baseline: Baseline, case: CaseResult) -> Change | None:
    former, now = baseline.case(case.problem), case.timings.get(PROVIDER)
    return change_from_baseline(now, case.copy_us, former.fraction) if former and now else None


def _judged(case: CaseResult, change: Change | None, again: Change | None) -> Judged:
    now = case.timings.get(PROVIDER)
    if PROVIDER in case.wrong:
        return Judged(case.problem, Verdict.REGRESSION, now, change, again, note=f"its result {case.wrong[PROVIDER]}")
    if change is None:
        return Judged(case.problem, Verdict.NO_BASELINE, now, change)
    return Judged(case.problem, verdict(change, again), now, change, again)
