"""Every way in which a database file can be bad: reading is a miss, writing one clear error, and what was recorded stays."""

import hashlib
import logging
import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from databases import DAMAGES, DEVICE, OTHER, PROBLEM, damage_directory, damage_newer, damage_random, edit, fill, make_trial
from kernels.dispatch import pick_config
from kernels.variants import VARIANTS, candidates, is_legal, source_hash
from tuning_db import store
from tuning_db.errors import DatabaseError
from tuning_db.lookup import RecordIndex
from tuning_db.model import Record
from tuning_db.store import open_for_writing, read_records


def snapshot(folder: Path) -> dict[str, str]:
    """Contents by name; SQLite's -wal and -shm, which every reader of a WAL file needs, only if they hold data."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}
    empty = [name for name in digests if name.endswith("-shm") or (name.endswith("-wal") and not os.path.getsize(folder / name))]
    return {name: digest for name, digest in digests.items() if name not in empty}


def test_reading_writes_nothing(filled: Path) -> None:
    before = snapshot(filled.parent)
    assert list(before) == ["a.db"]
    assert len(read_records(filled, "sm_90")[1]) == 2
    with pytest.raises(DatabaseError):
        read_records(filled.parent / "missing.db", "sm_90")
    assert snapshot(filled.parent) == before


@pytest.fixture
def without_permissions() -> Iterator[Path]:
    """A folder in which the present user may only read; root becomes nobody for as long."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    if os.getuid() == 0:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_a_folder_that_cannot_be_written(without_permissions: Path, filled: Path) -> None:
    folder = without_permissions
    expected = read_records(filled, "sm_90")
    shutil.copy(filled, folder / "a.db")
    (folder / "unfinished.db").write_bytes(filled.read_bytes())
    (folder / "unfinished.db-wal").write_bytes(b"not yet in the file")
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    with pytest.raises(PermissionError):
        (folder / "b.db").touch()
    assert read_records(folder / "a.db", "sm_90") == expected
    with pytest.raises(DatabaseError, match=r"unfinished\.db can't be opened"):
        read_records(folder / "unfinished.db", "sm_90")
    with pytest.raises(DatabaseError, match=r"b\.db can't be opened .*RMSNORM_TUNING_DB"):
        open_for_writing(folder / "b.db")


@pytest.mark.parametrize(("damage", "found"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_a_bad_file_is_a_database_error(filled: Path, damage: Callable[[Path], None], found: str) -> None:
    damage(filled)
    with pytest.raises(DatabaseError) as caught:
        read_records(filled, "sm_90")
    for part in (str(filled), found, "name another file by RMSNORM_TUNING_DB or --db"):
        assert part in str(caught.value)


@pytest.mark.parametrize("damage", [damage_random, damage_directory, damage_newer])
def test_a_writer_refuses_a_bad_file_and_leaves_it(filled: Path, damage: Callable[[Path], None]) -> None:
    damage(filled)
    before = filled.read_bytes() if filled.is_file() else b""
    with pytest.raises(DatabaseError, match="name another file"):
        open_for_writing(filled)
    assert (filled.read_bytes() if filled.is_file() else b"") == before


def test_a_writer_refuses_another_programs_file(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "a.db")
    connection.execute("CREATE TABLE song (title)")
    with pytest.raises(DatabaseError, match="another program"):
        open_for_writing(tmp_path / "a.db")
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("song",)]
    connection.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, set[Record]]:
    """The content of a database of forty problems, each tuned three times, and every record that was ever in it."""
    path, records = tmp_path_factory.mktemp("written") / "a.db", set()
    draw = random.Random(20260101)
    for race in range(3):
        trials = []
        for cols in range(1024, 1024 * 41, 1024):
            problem = replace(PROBLEM, cols=cols)
            for config in draw.sample(candidates(problem, DEVICE), 3):
                name = f"{race}-{cols}-{config}"
                code = {"revision": VARIANTS[config.variant].REVISION, "source_hash": source_hash(config.variant)}
                made = make_trial(name, draw.uniform(9, 99), config, problem=problem, race_uid=f"{race}", created_at=f"{race}", **code)
                trials.append(made)
        fill(path, *trials)
        records |= set(read_records(path, "sm_90")[1])
    assert len(records) == 120
    return path.read_bytes(), records


def corrupted(content: bytes, draw: random.Random) -> bytes:
    """`content` with some bytes flipped, or whole stretches of it zeroed, moved, repeated or cut off."""
    damaged, kind = bytearray(content), draw.randrange(6)
    at, other = draw.randrange(len(content)), draw.randrange(len(content))
    length = draw.randrange(1, 5000)
    if kind == 0:
        return content[:at]
    if kind == 1:
        damaged[at : at + length] = bytes(len(damaged[at : at + length]))
    elif kind == 2:
        page, source = at // 4096 * 4096, other // 4096 * 4096
        damaged[page : page + 4096] = content[source : source + 4096]
    else:
        for _ in range(draw.choice([1, 3, 30, 300])):
            damaged[draw.randrange(100 if kind == 3 and draw.random() < 0.1 else len(content))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def test_of_a_thousand_corrupted_files_none_gives_what_was_never_written(written: tuple[bytes, set[Record]], tmp_path: Path) -> None:
    """Reading is a miss or gives records that were written, and what the ladder picks with those is legal."""
    content, records = written
    path, draw, unreadable, partly, picked = tmp_path / "damaged.db", random.Random(20260102), 0, 0, 0
    for _ in range(1000):
        path.write_bytes(corrupted(content, draw))
        try:
            devices, found = read_records(path, "sm_90")
        except DatabaseError:
            unreadable += 1
            continue
        assert set(found) <= records
        assert devices in ([], [DEVICE])
        partly += len(found) < 40
        index = RecordIndex([("damaged", devices, found)])
        problem = replace(PROBLEM, cols=draw.randrange(1000, 42_000))
        pick = pick_config(problem, DEVICE, index=index)
        assert is_legal(pick.config, problem, DEVICE)
        picked += pick.record is not None
    assert min(unreadable, partly, picked) > 20  # each outcome was seen


BAD_VALUES = ["params = '{'", "params = '[]'", "source = 'new'", "rows = 0", "cols = 'many'", "x_dtype = 'int3'", "low_us = 9e999"]
BAD_VALUES += ["x_dtype = 'none'", "y_dtype = 'float64'", "cols = 2.5", "median_us = -1", "layout = ''"]
BAD_VALUES += ["params = '{\"num_warps\": [8]}'", "params = '" + '{"a":' * 9999 + "'", "params = '{\"num_warps\": 1e999}'"]


DAMAGED_VALUES = ["median_us = 41.0", "cols = x'00'", "variant = x'ff'"]
"""Told by the checksum alone, or such that there is none."""


@pytest.mark.parametrize("change", BAD_VALUES + DAMAGED_VALUES, ids=lambda change: change[:40])
def test_a_bad_row_is_skipped_alone(filled: Path, change: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever wrote it: rows with bad values have the checksum that goes with those."""
    edit(filled, f"UPDATE record SET {change} WHERE trial_uid = 't1'", seal=change in BAD_VALUES)
    with caplog.at_level(logging.WARNING, logger="tuned_rmsnorm"):
        devices, (record,) = read_records(filled, "sm_90")
    assert record.trial_uid == "t2"
    assert "ignored 1 of 2 rows" in caplog.text
    assert pick_config(PROBLEM, DEVICE, index=RecordIndex([("", devices, [record])])).config


def test_many_bad_rows_are_one_line(filled: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(filled, "UPDATE record SET median_us = 41.0")
    edit(filled, "UPDATE device SET sm_count = 7")
    with caplog.at_level(logging.WARNING, logger="tuned_rmsnorm"):
        assert read_records(filled, "sm_90") == ([], [])
    assert len(caplog.records) == 1


def test_a_device_whose_fingerprint_is_not_its_uid_is_skipped(filled: Path) -> None:
    edit(filled, "UPDATE device SET sm_count = 7", seal=True)
    assert read_records(filled, "sm_90")[0] == []


@pytest.mark.parametrize("change", ["argv = '{'", "argv = '[1]'", "state = x'00'"])
def test_a_bad_sweep_is_skipped_alone(filled: Path, change: str) -> None:
    edit(filled, f"UPDATE sweep SET {change}")
    with open_for_writing(filled) as database:
        assert database.sweeps() == []
        assert len(database.records()) == 2


def test_a_full_disk_undoes_one_commit(filled: Path) -> None:
    """SQLite's limit of pages stands for the disk's end: the commit that meets it leaves nothing, those before it all."""
    before = read_records(filled, "sm_90")
    with open_for_writing(filled) as database:
        (pages,) = database._connection.execute("PRAGMA page_count").fetchone()
        database._connection.execute(f"PRAGMA max_page_count = {pages + 1}")
        more = [make_trial(f"u{at}", race_uid="r2", created_at="2026", final=False, error="e" * 100) for at in range(200)]
        with pytest.raises(DatabaseError, match=r"a\.db can't be written further .*full.*: free some space"):
            database.add_trials(more)
        assert [trial.uid for trial in database.trials(DEVICE.uid)] == ["t1", "t2"]
        database._connection.execute("PRAGMA max_page_count = 1000000")
        database.add_trials(more)
        assert len(database.trials(DEVICE.uid)) == 202
    assert read_records(filled, "sm_90") == before


def test_a_locked_file_is_a_quick_error(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = sqlite3.connect(filled, isolation_level=None)
    other.execute("PRAGMA journal_mode = DELETE")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(DatabaseError, match="locked by another process"):
        read_records(filled, "sm_90")
    monkeypatch.setattr(store, "WRITE_TIMEOUT_S", 0.1)
    with open_for_writing_later(filled) as database, pytest.raises(DatabaseError, match="locked by another process"):
        database.add_device(OTHER)
    other.execute("ROLLBACK")
    other.close()
    assert len(read_records(filled, "sm_90")[1]) == 2


def open_for_writing_later(path: Path) -> store.Store:
    """A writer as one that had opened before the lock was taken."""
    return store.Store(path, sqlite3.connect(path, timeout=store.WRITE_TIMEOUT_S, isolation_level=None))


def test_a_reader_does_not_wait_for_a_writer(filled: Path) -> None:
    other = sqlite3.connect(filled, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.execute("DELETE FROM record")
    assert len(read_records(filled, "sm_90")[1]) == 2
    other.execute("COMMIT")
    assert read_records(filled, "sm_90")[1] == []
    other.close()
