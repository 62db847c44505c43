"""Sweeps that are killed at random moments and resumed, with made-up trials by a fake clock; no test itself.

    python tests/killed_sweep.py FOLDER KILLS SEED

writes FOLDER/whole.sqlite in one go, then FOLDER/0.sqlite, 1.sqlite, …: each by sweeps that are killed until one gets to the end. All
together KILLS are. Two stations work at once; one problem has a config that crashes. A sweep is a fork of this process, which has
everything imported, so that hundreds fit into seconds; it opens no database itself.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from kernels.variants import candidates
from stand_ins import BEST, DEVICE, PROBLEMS, TROUBLE, measured
from tuner.boards import Board
from tuner.jobs import Job, Outcome
from tuner.session import Session
from tuner.sweep import sweep
from tuner.trials import TrialBook
from tuning_db import schema  # noqa: F401  imported by the first writer: not in each fork
from tuning_db.model import Config, Problem, Status, Trial
from tuning_db.store import open_for_writing

WORK = [replace(PROBLEMS[1], rows=2**power) for power in range(6, 18)]
CRASHING = WORK[4]
JOB_S = 0.002
LONGEST_S = 0.08
"""More than a sweep of WORK takes."""


class MadeUp:
    """A station whose trials depend on the problem alone, their time of making too."""

    lookahead = 0
    progress = (0, 0)

    def __init__(self) -> None:
        self.compiler = self

    def prepare(self, job: Job, barred: Collection[Config]) -> None:
        pass

    def run(self, job: Job, barred: Collection[Config]) -> Outcome:
        time.sleep(JOB_S)
        if job.problem == CRASHING and TROUBLE not in barred:
            book = TrialBook(job)
            book.add(TROUBLE, Status.CRASHED, error="made up")
            return Outcome(job, dated(job.problem, tuple(book.trials)), finished=False)
        configs = [config for config in candidates(job.problem, DEVICE) if config == BEST or config.variant == "looped"]
        return Outcome(job, dated(job.problem, measured(job, configs)))

    def close(self) -> None:
        pass


def dated(problem: Problem, trials: tuple[Trial, ...]) -> tuple[Trial, ...]:
    return tuple(replace(trial, created_at=f"2026-01-01T00:00:{WORK.index(problem):02}") for trial in trials)


def run_sweep(path: Path) -> None:
    """What `python -m tuner sweep` does, but for its output."""
    session = Session(Board(DEVICE), tuple(WORK), path, retune=False, budget_s=None)
    with open_for_writing(path) as store:
        todo = session.todo(store.records(DEVICE.uid))
        sweep(todo, DEVICE, None, [MadeUp(), MadeUp()], store, ["sweep"], lambda event: None, None)


def killed_after(path: Path, seconds: float | None) -> bool:
    """Fork a sweep and kill it after a time (None: never); whether it was killed before its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run_sweep(path)
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"a sweep failed with exit code {code}"
    return code != 0


def main() -> None:
    folder, kills, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    killed_after(folder / "whole.sqlite", None)
    killed, files = 0, 0
    while killed < kills:
        path = folder / f"{files}.sqlite"
        while killed < kills and killed_after(path, draw.uniform(0, LONGEST_S)):
            killed += 1
        killed_after(path, None)
        files += 1
    print(f"{killed} killed, {files} files")


if __name__ == "__main__":
    main()
