"""Whether records still win: measured again against what might beat them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from kernels.dispatch import pick_config
from kernels.heuristic import heuristic_config
from kernels.variants import candidates, is_legal
from tuner.architectures import Architecture, architectures
from tuner.boards import Board
from tuner.eliminations import elimination_races
from tuner.events import Started
from tuner.failure import Failure
from tuner.fleet import FAULTS, outcomes
from tuner.jobs import Job
from tuner.model import least_us
from tuning_db.derive import TIE, derive_record
from tuning_db.lookup import RecordIndex
from tuning_db.model import ANY_ROWS, TORCH_VARIANT, Config, Device, Problem, Record, Source, Status, Tier, Trial, to_dict

RIVALS = 4
"""Fastest configs of the problem's newest elimination race that a record is held against, or as many that the model finds promising."""


@dataclass(frozen=True)
class Recheck:
    """A record after a new race: the µs of everybody in it, itself included unless `fault` says why it has none, and the model's pick."""

    record: Record
    times_us: dict[Config, float]
    model: Config | None
    fault: str = ""

    @property
    def fastest(self) -> Config:
        return min(self.times_us, key=lambda config: (self.times_us[config], str(config)))

    @property
    def loss(self) -> float | None:
        """The record's time over the fastest one's, less 1; None without a time."""
        return self._loss(self.record.config)

    @property
    def model_loss(self) -> float | None:
        return self._loss(self.model)

    @property
    def holds(self) -> bool:
        """Whether the record is within the tie band of the fastest."""
        return self.loss is not None and 1 + self.loss <= TIE

    def _loss(self, config: Config | None) -> float | None:
        return self.times_us[config] / self.times_us[self.fastest] - 1 if config in self.times_us else None

    def to_dict(self) -> dict[str, Any]:
        times = [{"variant": c.variant, "params": c.params, "median_us": us} for c, us in sorted(self.times_us.items(), key=lambda p: p[1])]
        figures = {"holds": self.holds, "loss": self.loss, "model_loss": self.model_loss, "fault": self.fault}
        return {"problem": to_dict(self.record.problem), **figures, "times": times}


def records_in_use(index: RecordIndex, device: Device, wanted: Callable[[Problem], bool]) -> list[Record]:
    """The measured records that the dispatcher runs on a device, in the order of Problem; those for any number of rows were summed up."""
    shelf = index.shelves.get((device.uid, Source.MEASURED))
    problems = [problem for problem in sorted(shelf.at if shelf else ()) if problem.rows != ANY_ROWS and wanted(problem)]
    picks = [pick_config(problem, device, index=index) for problem in problems]
    return [pick.record for pick in picks if pick.record is not None and pick.tier is Tier.EXACT]


def sampled(records: Sequence[Record], number: int) -> list[Record]:
    """So many of the records, the same each time, in their order."""
    chosen = random.Random(0).sample(range(len(records)), min(number, len(records)))
    return [records[i] for i in sorted(chosen)]


def race_again(records: Sequence[Record], trials: Sequence[Trial], board: Board, watch: Callable[[Started], None]) -> list[Recheck]:
    """Race each record again on the board's GPUs; nothing is stored. `trials` are what is known of the device.

    The rivals: the fastest of the trials, the model's pick, the heuristic's, PyTorch. Raises Failure as a sweep does.
    """
    device = board.device
    usual = architectures().get(device.arch)
    architecture = replace(usual, device=device) if usual else None
    models = _model_picks(records, architecture, watch) if architecture else {}
    races = elimination_races(trials)
    jobs = []
    for record in records:
        problem = record.problem
        rivals = _rivals(problem, races.get(problem, ()), device, architecture)
        wanted = dict.fromkeys([record.config, heuristic_config(problem, device), models.get(problem), *rivals])
        entrants = tuple(config for config in wanted if config is not None and config.variant != TORCH_VARIANT)
        jobs.append(Job(problem, device, None, record.config, "", entrants))
    raced = _run(board, jobs, watch)
    faults = {trial.config: _fault(trial) for own in raced.values() for trial in own if trial.status in FAULTS}
    return [_judged(record, raced[record.problem], models.get(record.problem), faults) for record in records]


def _model_picks(records: Sequence[Record], architecture: Architecture, watch: Callable[[Started], None]) -> dict[Problem, Config]:
    device = architecture.device
    jobs = [Job(record.problem, device, architecture, None, "") for record in records]
    picks = {problem: derive_record(own) for problem, own in _run(Board(device, architecture), jobs, watch).items()}
    return {problem: pick.config for problem, pick in picks.items() if pick}


def _run(board: Board, jobs: Sequence[Job], watch: Callable[[Started], None]) -> dict[Problem, list[Trial]]:
    """All trials of each job. A config that breaks or stalls a worker is left out from then on. Raises Failure."""
    stations = board.stations()
    trials: dict[Problem, list[Trial]] = {job.problem: [] for job in jobs}
    done = 0
    with closing(outcomes(stations, jobs, (), lambda: True)) as events:
        for event in events:
            if isinstance(event, Job):
                watch(Started(event.problem, done, len(jobs), *stations[0].progress))
                continue
            if event.note:
                raise Failure(f"{event.job.problem}: {event.note}")
            trials[event.job.problem] += event.trials
            done += event.finished
    return trials


def _rivals(problem: Problem, race: Sequence[Trial], device: Device, board: Architecture | None) -> list[Config]:
    """Up to RIVALS configs, most promising first."""
    if race:
        timed = sorted((trial.measurement.median_us, str(trial.config), trial.config) for trial in race if trial.measurement)
        return [config for _, _, config in timed if is_legal(config, problem, device)][:RIVALS]
    if board is None:
        return []
    return sorted(candidates(problem, device), key=lambda config: (least_us(problem, config, board), str(config)))[:RIVALS]


def _judged(record: Record, trials: Sequence[Trial], model: Config | None, faults: Mapping[Config, str]) -> Recheck:
    """`faults` tells of what was left out because it broke or stalled a worker, on whichever problem."""
    times_us = {trial.config: trial.measurement.median_us for trial in trials if trial.measurement}
    own = [_fault(trial) for trial in trials if trial.config == record.config and trial.status is not Status.OK]
    return Recheck(record, times_us, model, next(iter(own), faults.get(record.config, "")))


def _fault(trial: Trial) -> str:
    return f"{trial.status.value}: {trial.error}"
