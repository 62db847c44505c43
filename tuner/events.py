"""What a sweep tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tuning_db.model import Problem, Record, Trial


@dataclass(frozen=True)
class Started:
    """Work on a problem begins; `done` of `total` problems are finished, `compiled` of `binaries` binaries compiled."""

    problem: Problem
    done: int
    total: int
    compiled: int
    binaries: int


@dataclass(frozen=True)
class Finished:
    """A problem's trials are committed. record is None if no config got through; note says why the problem was given up, if it was.

    load_bytes is what a thread of the record's binary loads at once, where that was disassembled.
    """

    problem: Problem
    record: Record | None
    trials: int
    failed: int
    note: str = ""
    load_bytes: int | None = None


@dataclass(frozen=True)
class Faulted:
    """A config broke or stalled a worker or the compiler. Its trial is committed, and it is not tried again."""

    trial: Trial


Event: TypeAlias = Started | Finished | Faulted
Watch: TypeAlias = Callable[[Event], None]
