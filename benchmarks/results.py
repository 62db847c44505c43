"""What a benchmark found, as nouns with one JSON form."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from tuner.race import median_interval
from tuning_db.model import Device, Problem


class Interval(NamedTuple):
    """A median, and the ends of its interval."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Interval:
        return cls(*median_interval(samples))


@dataclass(frozen=True)
class Timing:
    """An entrant's µs a launch, and the fraction of the reference copy (copy's time / own time, round by round)."""

    us: Interval
    fraction: Interval
    rounds: int

    @classmethod
    def of(cls, own_us: Sequence[float], copy_us: Sequence[float]) -> Timing:
        """From paired samples, one a round."""
        fractions = [copy / own for copy, own in zip(copy_us, own_us, strict=True)]
        return cls(Interval.of(own_us), Interval.of(fractions), len(own_us))


@dataclass(frozen=True)
class CaseResult:
    """One problem: the reference copy in µs, each provider's Timing, and why a provider has none.

    configs names the config that a provider of ours ran. Whoever refused is not wrong, and whoever is wrong was not timed.
    """

    problem: Problem
    copy_us: float
    timings: dict[str, Timing]
    configs: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Provenance:
    """Where and when figures were made, and with which versions. The policy says how it was measured."""

    device: Device
    made_at: str
    policy: str
    versions: dict[str, str]

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.device.name} ({self.device.uid}) · {versions} · {self.made_at[:10]}"


@dataclass(frozen=True)
class RunResult:
    """What `run` found: GPU time of providers on the problems of a suite. absent says why a provider is not in it."""

    provenance: Provenance
    suite: str
    calls: dict[str, str]
    absent: dict[str, str]
    cases: tuple[CaseResult, ...]


ONE_SHAPE, OUT_GIVEN, IN_TURN = "one shape", "one shape, out given", "5 shapes in turn"
WAYS = (ONE_SHAPE, OUT_GIVEN, IN_TURN)
WITH_GRAD, WITH_BACKWARD, MODULE = "requires grad", "and its backward", "module"
WAYS_WITH_GRAD = (WITH_GRAD, WITH_BACKWARD, MODULE)
"""x and the weight require grad, and gradients are recorded."""
GROUPS_OF_WAYS = {"without gradients": WAYS, "x and weight require grad": WAYS_WITH_GRAD}


@dataclass(frozen=True)
class HostResult:
    """What `host` found: µs of host time a call, by provider, then by what is called how."""

    provenance: Provenance
    rows: int
    cols: int
    times_us: dict[str, dict[str, float]]


def groups_of(times_us: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Times by title of a group of ways, provider and way; who has none of a group is left out of it."""
    groups = {}
    for title, ways in GROUPS_OF_WAYS.items():
        found = {name: {way: times[way] for way in ways if way in times} for name, times in times_us.items()}
        groups[title] = {name: times for name, times in found.items() if times}
    return {title: times for title, times in groups.items() if times}


@dataclass(frozen=True)
class FirstCallResult:
    """What `first-call` found: seconds to the first result of a new process, by way, then by the state of the caches."""

    provenance: Provenance
    problem: Problem
    seconds: dict[str, dict[str, Interval]]


KINDS: dict[str, type] = {"run": RunResult, "host": HostResult, "first_call": FirstCallResult}


class ResultError(ValueError):
    """A file holds no result; the message names the file."""


def provenance_here(device: Device, policy: str) -> Provenance:
    """Of a benchmark that starts now, in this process."""
    import torch
    import triton

    from kernels.device import cuda_version

    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": cuda_version(), "python": platform.python_version()}
    return Provenance(device, datetime.now(timezone.utc).isoformat(timespec="seconds"), policy, versions)


def to_json(result: RunResult | HostResult | FirstCallResult) -> str:
    kind = next(name for name, noun in KINDS.items() if isinstance(result, noun))
    return json.dumps({"kind": kind, **asdict(result)}, indent=1, allow_nan=False)


def read_result(path: Path) -> RunResult | HostResult | FirstCallResult:
    """The inverse of `to_json`. Raises ResultError on anything else."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return result_from_dict(plain)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "name a file that `python -m benchmarks run`, `host` or `first-call` wrote by --json"
        raise ResultError(f"{path} holds no benchmark result ({error!r}): {hint}") from error


def result_from_dict(plain: Mapping[str, Any]) -> RunResult | HostResult | FirstCallResult:
    provenance = provenance_from_dict(plain["provenance"])
    kind = plain["kind"]
    if kind == "run":
        cases = tuple(case_from_dict(case) for case in plain["cases"])
        return RunResult(provenance, plain["suite"], plain["calls"], plain["absent"], cases)
    if kind == "host":
        return HostResult(provenance, plain["rows"], plain["cols"], plain["times_us"])
    if kind == "first_call":
        seconds = {way: {state: Interval(*value) for state, value in states.items()} for way, states in plain["seconds"].items()}
        return FirstCallResult(provenance, Problem(**plain["problem"]), seconds)
    raise ValueError(f"unknown kind {kind!r}")


def provenance_from_dict(plain: Mapping[str, Any]) -> Provenance:
    return Provenance(**{**plain, "device": Device(**plain["device"])})


def timing_from_dict(plain: Mapping[str, Any]) -> Timing:
    return Timing(Interval(*plain["us"]), Interval(*plain["fraction"]), plain["rounds"])


def case_from_dict(plain: Mapping[str, Any]) -> CaseResult:
    timings = {name: timing_from_dict(timing) for name, timing in plain["timings"].items()}
    return CaseResult(**{**plain, "problem": Problem(**plain["problem"]), "timings": timings})
