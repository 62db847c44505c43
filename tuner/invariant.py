"""The config for any number of rows, which batch_invariant runs: derived from what a sweep measured at some numbers of rows."""

from __future__ import annotations

import statistics
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from kernels.variants import is_legal
from tuner.eliminations import elimination_races
from tuning_db.derive import derive_record
from tuning_db.model import ANY_ROWS, FORWARD, Config, Device, Measurement, Problem, Record, Role, Trial, canonical_json

POLICY = "any-rows-1"
"""Name of the way to sum up: the geometric mean of a config's times over the numbers of rows; where it was not timed, for it takes more
rows at once than there are, the slowest time of that race stands for its own."""

MIN_ROWS_MEASURED = 2
"""With fewer numbers of rows there is nothing to choose between."""


def invariant_trials(device: Device, trials: Iterable[Trial]) -> list[Trial]:
    """For each kind of problem that was raced at several numbers of rows: a final race for ANY_ROWS of the configs that can serve them all.

    Pure: the same trials give the same, uids included, so that storing them twice changes nothing. `derive_record` names the winner.
    """
    kinds: dict[Problem, dict[Problem, list[Trial]]] = {}
    for problem, race in elimination_races(trials).items():
        if problem.op == FORWARD and problem.layout == "contiguous":
            kinds.setdefault(replace(problem, rows=ANY_ROWS), {})[problem] = race
    return [trial for kind in sorted(kinds) for trial in _race(kind, kinds[kind], device) if len(kinds[kind]) >= MIN_ROWS_MEASURED]


def invariant_records(device: Device, trials: Iterable[Trial]) -> list[Record]:
    """The records that `invariant_trials` stand for."""
    races: dict[Problem, list[Trial]] = {}
    for trial in invariant_trials(device, trials):
        races.setdefault(trial.problem, []).append(trial)
    return [record for race in races.values() if (record := derive_record(race))]


def _race(kind: Problem, races: Mapping[Problem, Sequence[Trial]], device: Device) -> list[Trial]:
    timed = {problem: {trial.config: trial for trial in race} for problem, race in races.items()}
    configs = sorted({config for own in timed.values() for config in own if _serves(config, kind, timed, device)}, key=str)
    members = {config: [timed[problem].get(config) or _slowest(races[problem]) for problem in sorted(races)] for config in configs}
    race_uid = _uid(trial.uid for config in configs for trial in members[config])
    return [_summed_up(kind, config, members[config], race_uid) for config in configs]


def _serves(config: Config, kind: Problem, timed: Mapping[Problem, Mapping[Config, Trial]], device: Device) -> bool:
    """Whether a config is legal for any rows, and was timed wherever it is legal for the rows that there are."""
    return is_legal(config, kind, device) and all(config in own or not is_legal(config, problem, device) for problem, own in timed.items())


def _slowest(race: Sequence[Trial]) -> Trial:
    return max(race, key=lambda trial: (trial.measurement.median_us if trial.measurement else 0.0, trial.uid))


def _summed_up(kind: Problem, config: Config, members: Sequence[Trial], race_uid: str) -> Trial:
    own = max((trial for trial in members if trial.config == config), key=lambda trial: (trial.created_at, trial.uid))
    times = [trial.measurement for trial in members if trial.measurement]
    mean = {
        name: statistics.geometric_mean(getattr(time, name) for time in times)
        for name in ("median_us", "low_us", "high_us", "copy_fraction")
    }
    measured = Measurement(POLICY, **mean, rounds=min(time.rounds for time in times))
    uid = _uid([race_uid, canonical_json([config.variant, config.params])])
    return replace(
        own, uid=uid, race_uid=race_uid, problem=kind, role=Role.CANDIDATE, final=True, measurement=measured, resources=None, error=""
    )


def _uid(parts: Iterable[str]) -> str:
    return uuid.uuid5(uuid.NAMESPACE_OID, " ".join([POLICY, *parts])).hex
