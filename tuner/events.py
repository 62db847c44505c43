"""What a sweep tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tuning_db.model import Problem, Record


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
    """A problem's trials are committed. record is None if no config got through.

    load_bytes is what a thread of the record's binary loads at once, where that was disassembled.
    """

    problem: Problem
    record: Record | None
    trials: int
    failed: int
    load_bytes: int | None = None


Watch: TypeAlias = Callable[[Started | Finished], None]
