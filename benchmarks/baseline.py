"""Baselines: committed figures of one board, a case a line, in benchmarks/baselines/<vendor>/<arch>/<sku>.json."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import Interval, Provenance, RunResult, provenance_from_dict
from tuning_db.model import Device, Problem, canonical_json

FOLDER = Path(__file__).parent / "baselines"
MIN_PROCESSES = 3
PROVIDER = "tuned"


class BaselineError(ValueError):
    """A baseline can't be read or made; the message says why and what helps."""


@dataclass(frozen=True)
class BaselineCase:
    """One problem: median over the processes of their fraction of copy, with the lowest and the highest, and the µs it was made of."""

    problem: Problem
    fraction: Interval
    median_us: float
    copy_us: float


@dataclass(frozen=True)
class Baseline:
    """Figures of one board and one or more suites, made by `record` in several processes."""

    provenance: Provenance
    suites: tuple[str, ...]
    processes: int
    cases: tuple[BaselineCase, ...]

    def case(self, problem: Problem) -> BaselineCase | None:
        return next((case for case in self.cases if case.problem == problem), None)


def combined(suite: str, runs: Sequence[RunResult]) -> Baseline:
    """The baseline that runs of one suite in separate processes stand for. Raises BaselineError."""
    if len(runs) < MIN_PROCESSES:
        raise BaselineError(f"{len(runs)} processes tell no spread between processes; record at least {MIN_PROCESSES}")
    cases = []
    for same in zip(*(run.cases for run in runs), strict=True):
        problem = same[0].problem
        for case in same:
            if PROVIDER not in case.timings:
                raise BaselineError(f"{problem} has no time to record: its result {case.wrong.get(PROVIDER, 'is missing')}")
        timings = [case.timings[PROVIDER] for case in same]
        fractions = [timing.fraction.median for timing in timings]
        spread = Interval(statistics.median(fractions), min(fractions), max(fractions))
        median_us = statistics.median(timing.us.median for timing in timings)
        cases.append(BaselineCase(problem, spread, median_us, statistics.median(case.copy_us for case in same)))
    return Baseline(runs[-1].provenance, (suite,), len(runs), tuple(cases))


def joined(former: Baseline, new: Baseline) -> Baseline:
    """The new baseline, with what the former one has of other suites, if it was made alike; else the new one alone."""
    if (former.provenance.policy, former.provenance.versions) != (new.provenance.policy, new.provenance.versions):
        return new
    kept = [case for case in former.cases if new.case(case.problem) is None]
    suites = tuple(dict.fromkeys((*former.suites, *new.suites)))
    return Baseline(new.provenance, suites, min(former.processes, new.processes), (*kept, *new.cases))


def to_text(baseline: Baseline) -> str:
    """JSON with one case a line, sorted, so that a diff shows what changed. Four decimals are less than any spread."""
    head = {"processes": baseline.processes, "provenance": asdict(baseline.provenance), "suites": baseline.suites}
    lines = [f'"{name}":{canonical_json(value)},' for name, value in head.items()]
    cases = [canonical_json(_rounded(asdict(case))) for case in sorted(baseline.cases, key=lambda case: case.problem)]
    return "\n".join(["{", *lines, '"cases":[', ",\n".join(cases), "]", "}", ""])


def read_baseline(path: Path) -> Baseline:
    """The inverse of `to_text`. Raises BaselineError."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        cases = tuple(
            BaselineCase(Problem(**case["problem"]), Interval(*case["fraction"]), case["median_us"], case["copy_us"])
            for case in plain["cases"]
        )
        return Baseline(provenance_from_dict(plain["provenance"]), tuple(plain["suites"]), plain["processes"], cases)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaselineError(f"{path} is no baseline ({error!r}); `python -m benchmarks record` makes one") from error


def path_for(device: Device, folder: Path | None = None) -> Path:
    """Where the baseline of a board is, or would be: by the fingerprint among those that there are, else a name made of the board's."""
    vendor = "amd" if device.arch.startswith("gfx") else "nvidia"
    arch = (folder or FOLDER) / vendor / device.arch
    for path in sorted(arch.glob("*.json")):
        if read_baseline(path).provenance.device == device:
            return path
    words = [word for word in re.findall(r"[a-z0-9]+", device.name.lower()) if word not in (vendor, "amd", "nvidia")]
    return arch / f"{'-'.join(words) or device.uid}.json"


def find(device: Device, policy: str, path: Path | None = None) -> tuple[Baseline | None, str]:
    """The baseline to hold a device against, or None and why there is none."""
    named, path = path, path or path_for(device)
    if not path.is_file():
        return None, f"{named} does not exist" if named else f"there is none for {device.name} ({device.uid})"
    baseline = read_baseline(path)
    if baseline.provenance.device != device:
        return None, f"{path} is of {baseline.provenance.device.uid}, and this is {device.uid}"
    if baseline.provenance.policy != policy:
        return None, f"{path} was measured by policy {baseline.provenance.policy}, and now it is {policy}"
    return baseline, ""


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list | tuple) else value
