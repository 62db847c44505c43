"""The database under many processes and under kill -9: nothing reported as committed is ever lost."""

import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tuning_db import store
from tuning_db.derive import derive_record
from tuning_db.model import Device
from tuning_db.schema import is_local
from tuning_db.store import open_for_writing, read_records

DEVICE = Device("sm_90", 132, 50 * 2**20, 227 * 2**10, 3352)
WRITER = """
import sys, time
from tuning_db.model import Config, Device, Measurement, Problem, Role, Status, Sweep, Trial
from tuning_db.store import open_for_writing

path, name, count, pause_s = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
device = Device("sm_90", 132, 50 * 2**20, 227 * 2**10, 3352)

def trial(at, part):
    problem = Problem("rmsnorm", "bfloat16", "float32", "bfloat16", 4096, 64 * (at % 50 + 1))
    timed = Measurement("graph", 10.0 + part, 9.0, 11.0 + part, 0.9, 30)
    uid, config = f"{name}-{at}-{part}", Config.of("multi_row", num_warps=2**part)
    code = (f"{at:09}", 1, "0a1b", "3.6.0", "2.13.0", "", timed)
    return Trial(uid, name, f"{name}-{at}", device.uid, problem, config, Role.CANDIDATE, Status.OK, True, *code)

with open_for_writing(path) as database:
    database.add_device(device)
    database.add_sweep(Sweep(name, device.uid, "2025", "", "host", "[]", "running", "3.6.0", "2.13.0"))
    for at in range(count):
        database.add_trials([trial(at, part) for part in range(3)])
        print(f"{name}-{at}", flush=True)
        time.sleep(pause_s)
    sys.stdin.read()
"""
READER = """
import json, sys
from tuning_db.errors import DatabaseError
from tuning_db.store import read_records

try:
    print(json.dumps([record.trial_uid for record in read_records(sys.argv[1], "sm_90")[1]]))
except DatabaseError as error:
    print(json.dumps(str(error)))
"""


def start_writer(path: Path, name: str, count: int, pause_s: float = 0.0) -> subprocess.Popen:
    return start(WRITER, str(path), name, str(count), str(pause_s))


def start_reader(path: Path) -> subprocess.Popen:
    return start(READER, str(path))


def start(source: str, *arguments: str) -> subprocess.Popen:
    """A Python process; the writer ends when its stdin does, which `communicate` closes."""
    root, pipe = Path(store.__file__).parents[1], subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", source, *arguments], cwd=root, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def races_of(path: Path) -> set[str]:
    """The races that are complete, after checking that the file is sound and every record is what its trials say."""
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal" if is_local(path) else "delete",)
    connection.close()
    with open_for_writing(path) as database:
        parts: dict[str, int] = {}
        for trial in database.trials(DEVICE.uid):
            parts[trial.race_uid] = parts.get(trial.race_uid, 0) + 1
        problems = {trial.problem for trial in database.trials(DEVICE.uid)}
        assert database.records() == [derive_record(database.trials(DEVICE.uid, problem)) for problem in sorted(problems)]
    assert set(parts.values()) <= {3}
    return set(parts)


def test_64_processes_start_on_a_file_that_8_create_and_fill(tmp_path: Path) -> None:
    """Each reads once, as the first call of a process does. Those that start after the first commit find records, whoever is writing."""
    path, count = tmp_path / "new" / "a.db", 40
    writers = [start_writer(path, f"w{at}", count, pause_s=0.1) for at in range(8)]
    early = [start_reader(path) for _ in range(32)]
    late = []
    try:
        first = writers[0].stdout.readline()
        late = [start_reader(path) for _ in range(32)]
        read = [json.loads(reader.communicate(timeout=60)[0]) for reader in early + late]
        reported = [writer.communicate(timeout=60) for writer in writers]  # they hold the file open until now
    finally:
        for process in writers + early + late:
            process.kill()
            process.wait()
    assert [(process.returncode, errors) for process, (_, errors) in zip(writers, reported, strict=True)] == [(0, "")] * 8
    assert first == "w0-0\n"
    assert races_of(path) == {f"w{writer}-{at}" for writer in range(8) for at in range(count)}
    misses = [seen for seen in read[:32] if isinstance(seen, str)]
    expected = ("does not exist", "has schema version 0", "has schema version 1", "locked by another process")
    assert [miss for miss in misses if not any(part in miss for part in expected)] == []
    hits = [seen for seen in read[:32] if not isinstance(seen, str)] + read[32:]
    assert all(isinstance(seen, list) and seen for seen in read[32:]), read[32:]
    with open_for_writing(path) as database:
        trials = {trial.uid for trial in database.trials(DEVICE.uid)}
    assert all(set(seen) <= trials for seen in hits)
    assert min(map(len, read[32:])) < count  # some read before the last problem had a record


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_a_killed_writer_loses_nothing_it_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    draw = random.Random(20250101)
    reported: set[str] = set()
    for kill in range(10):
        writer = start_writer(path, f"w{kill}", 100_000)
        try:
            reported.update(writer.stdout.readline().split())
            time.sleep(draw.uniform(0, 0.1))
        finally:
            writer.kill()
        lines, errors = writer.communicate()
        assert writer.returncode == -signal.SIGKILL, errors
        reported.update(line for line in lines.split("\n")[:-1])
        assert len(read_records(path, "sm_90")[1]) > 0
    assert len(reported) > 20
    assert races_of(path) >= reported


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_a_writer_killed_while_it_creates_the_file_can_be_followed(tmp_path: Path) -> None:
    draw = random.Random(20250102)
    for kill in range(6):
        path = tmp_path / f"{kill}.db"
        writer = start_writer(path, "first", 1)
        try:
            while not path.exists() and writer.poll() is None:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.02))
        finally:
            writer.kill()
        assert writer.communicate()[1] == ""
        follower = start_writer(path, "second", 2)
        assert follower.communicate() == ("second-0\nsecond-1\n", "")
        assert races_of(path) >= {"second-0", "second-1"}
