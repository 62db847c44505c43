"""kill -9 of the sweep at 100 random moments: what a resumed sweep leaves equals what an uninterrupted one does."""

import os
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from killed_sweep import CRASHING, WORK
from stand_ins import BEST, DEVICE, TROUBLE
from tuning_db.model import Status
from tuning_db.store import open_for_reading

ROOT = Path(__file__).parents[1]
DIFFERING = {"uid", "sweep_uid", "race_uid", "trial_uid", "checksum"}
"""Columns with random values, and the sum over them."""


def contents(path: Path) -> dict[str, Counter[Any]]:
    """The rows of device, trial and record, how often each is there, after checking that the file is sound."""
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    try:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        rows = {table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in ("device", "trial", "record")}
    finally:
        connection.close()
    return {table: Counter(tuple(item for item in dict(row).items() if item[0] not in DIFFERING) for row in rows[table]) for table in rows}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and kill -9")
def test_killed_at_100_moments_the_database_is_that_of_an_uninterrupted_sweep(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "killed_sweep.py"), str(tmp_path), "100", "20260101"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("100 killed, ")
    whole = contents(tmp_path / "whole.sqlite")
    with open_for_reading(tmp_path / "whole.sqlite") as store:
        assert [(record.problem, record.config) for record in store.records()] == [(problem, BEST) for problem in WORK]
        (crash,) = store.trials_with(DEVICE.arch, (Status.CRASHED,))
        assert (crash.problem, crash.config) == (CRASHING, TROUBLE)
    resumed = sorted(path for path in tmp_path.glob("*.sqlite") if path.stem != "whole")
    assert len(resumed) > 1
    for path in resumed:
        assert contents(path) == whole, path
