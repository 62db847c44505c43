"""What a sweep hands to its stations and what comes back, whether a station is here or on another host."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Protocol

from tuner.architectures import Architecture
from tuning_db.model import Config, Device, Problem, Trial


@dataclass(frozen=True)
class Job:
    """A problem to tune, wholly on one GPU; or, with an architecture, to compile and model."""

    problem: Problem
    device: Device
    architecture: Architecture | None
    incumbent: Config | None
    sweep_uid: str
    entrants: tuple[Config, ...] | None = None
    """The only configs to try, all of them in the final race; None: all candidates, after an elimination."""


@dataclass(frozen=True)
class Outcome:
    """The trials of a run. Not `finished`: a config broke the run, its trial is all there is, the job is to be run without it."""

    job: Job
    trials: tuple[Trial, ...]
    finished: bool = True
    note: str = ""
    """Why the job was given up, if it was."""
    load_bytes: int | None = None
    """What a thread of a modelled job's pick loads at once, where that is known."""


class Station(Protocol):
    """The executor of jobs that a sweep knows: one GPU, here or elsewhere, or a compiler alone. One job at a time, any number ahead."""

    @property
    def compiler(self) -> Hashable:
        """Stations with the same one share what they compile."""

    @property
    def lookahead(self) -> int:
        """How many jobs its compiler is told of before they are run."""

    @property
    def progress(self) -> tuple[int, int]:
        """Of its compiler: how many binaries are compiled, how many there are to be; zeros where nobody knows."""

    def prepare(self, job: Job, barred: Collection[Config]) -> None:
        """Begin to compile for a job that its compiler will get, and return."""

    def run(self, job: Job, barred: Collection[Config]) -> Outcome:
        """Run a job without the barred configs. Raises JobLost, StationGone or Failure."""

    def close(self) -> None:
        """End all its processes; from any thread, as often as one likes."""
