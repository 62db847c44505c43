"""The elimination races among a database's trials: everybody's time on one problem, measured against each other."""

from __future__ import annotations

from collections.abc import Iterable

from kernels.provenance import is_current
from tuning_db.derive import source_of
from tuning_db.model import Problem, Source, Status, Trial


def elimination_races(trials: Iterable[Trial]) -> dict[Problem, list[Trial]]:
    """The trials with a measured time of each problem's newest elimination race, as far as today's space has their configs."""
    races: dict[Problem, dict[tuple[str, str], list[Trial]]] = {}
    for trial in trials:
        timed = trial.status is Status.OK and trial.measurement is not None and source_of(trial.measurement) is Source.MEASURED
        if timed and trial.measurement and not trial.final and is_current(trial):
            key = (trial.race_uid, trial.measurement.policy)
            races.setdefault(trial.problem, {}).setdefault(key, []).append(trial)
    return {
        problem: max(own.values(), key=lambda race: max((trial.created_at, trial.uid) for trial in race)) for problem, own in races.items()
    }
