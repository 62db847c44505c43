"""The tuning database's SQLite files: the project's only SQL."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tuning_db.derive import derive_record, source_of
from tuning_db.errors import OTHER_FILE, DatabaseError
from tuning_db.jsonl import read_jsonl, write_jsonl
from tuning_db.model import Device, Problem, Record, Status, Sweep, Trial
from tuning_db.rows import PROBLEM, SCHEMA_VERSION, Noun, device_from_row, problem_values, record_from_row, row_of, trial_from_row

READ_TIMEOUT_S = 0.2
WRITE_TIMEOUT_S = 30.0

log = logging.getLogger("tuned_rmsnorm")

_SAME_PROBLEM = " AND ".join(f"{name} = ?" for name in PROBLEM)
_SAME_RECORD = f"device_uid = ? AND source = ? AND {_SAME_PROBLEM}"
_FILE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""What sqlite3 raises on a bad file: its message about a damaged schema need not be UTF-8."""


def read_records(path: str | os.PathLike[str], arch: str) -> tuple[list[Device], list[Record]]:
    """All devices of an arch and their records, in one read-only snapshot. DatabaseError if the file is bad in any way."""
    with open_for_reading(Path(path)) as store:
        return store.devices(arch), store.records(arch=arch)


def open_for_writing(path: str | os.PathLike[str]) -> Store:
    """Open or create a tuning database. Raises DatabaseError if it is newer, locked for 30 s, or no tuning database."""
    from tuning_db import schema  # imports sqlite-utils: 150 ms that readers need not pay

    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=WRITE_TIMEOUT_S, isolation_level=None)
    except (OSError, sqlite3.Error) as error:
        raise DatabaseError.of_path(path, error) from error
    try:
        schema.migrate(connection, path, WRITE_TIMEOUT_S)
        connection.execute("PRAGMA foreign_keys = ON")
    except _FILE_ERRORS as error:
        connection.close()
        raise DatabaseError.of_path(path, error) from error
    except BaseException:
        connection.close()
        raise
    return Store(path, connection)


class Store:
    """An open tuning database. Every method that writes is one transaction; all raise DatabaseError if the file fails them."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._connection.row_factory = sqlite3.Row

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def devices(self, arch: str | None = None) -> list[Device]:
        return self._select(device_from_row, "SELECT * FROM device WHERE ? IN (arch, '') ORDER BY uid", arch or "")

    def sweeps(self) -> list[Sweep]:
        return self._select(lambda row: Sweep(**dict(row)), "SELECT * FROM sweep ORDER BY started_at, uid")

    def outcomes(self, device_uid: str) -> dict[Status, int]:
        """How many trials of a device ended in which way."""
        query = "SELECT status, count(*) AS trials FROM trial WHERE device_uid = ? GROUP BY status ORDER BY status"
        return dict(self._select(lambda row: (Status(row["status"]), row["trials"]), query, device_uid))

    def trials_with(self, arch: str, statuses: Sequence[Status]) -> list[Trial]:
        """The trials on all devices of an arch that ended in one of these ways."""
        query = f"""SELECT trial.* FROM trial JOIN device ON device.uid = device_uid
            WHERE arch = ? AND status IN ({", ".join("?" * len(statuses))}) ORDER BY trial.created_at, trial.uid"""
        return self._select(trial_from_row, query, arch, *(status.value for status in statuses))

    def trials(self, device_uid: str, problem: Problem | None = None) -> list[Trial]:
        query = "SELECT * FROM trial WHERE device_uid = ?"
        if problem is None:
            return self._select(trial_from_row, f"{query} ORDER BY created_at, uid", device_uid)
        return self._select(trial_from_row, f"{query} AND {_SAME_PROBLEM} ORDER BY created_at, uid", device_uid, *problem_values(problem))

    def records(self, device_uid: str | None = None, *, arch: str | None = None) -> list[Record]:
        """All records, or those of one device or arch, in the order of `write_jsonl`."""
        query = "SELECT record.* FROM record JOIN device ON device.uid = device_uid WHERE ? IN (device_uid, '') AND ? IN (arch, '')"
        return self._select(record_from_row, f"{query} ORDER BY device_uid, source, {', '.join(PROBLEM)}", device_uid or "", arch or "")

    def export(self, arch: str | None = None) -> str:
        """Records, and the devices that have any, as `write_jsonl` writes them."""
        records = self.records(arch=arch)
        known = {record.device_uid for record in records}
        return write_jsonl([device for device in self.devices(arch) if device.uid in known], records)

    def add_device(self, device: Device) -> None:
        with self._transaction():
            self._add_device(device)

    def add_sweep(self, sweep: Sweep) -> None:
        with self._transaction():
            self._add_sweep(sweep)

    def finish_sweep(self, uid: str, finished_at: str, state: str) -> None:
        with self._transaction():
            self._connection.execute("UPDATE sweep SET finished_at = ?, state = ? WHERE uid = ?", (finished_at, state, uid))

    def add_trials(self, trials: Sequence[Trial]) -> list[Record]:
        """Add trials whose uid is new, and derive anew, and return, the records of the problems they belong to."""
        with self._transaction():
            return self._add_trials(trials)[1]

    def merge(self, other_path: str | os.PathLike[str]) -> int:
        """Take in another tuning database and return how many trials were new; doing so twice changes nothing."""
        with open_for_reading(Path(other_path)) as other:
            devices, sweeps, records = other.devices(), other.sweeps(), other.records()
            trials = [trial for device in devices for trial in other.trials(device.uid)]
        with self._transaction():
            for device in devices:
                self._add_device(device)
            for sweep in sweeps:
                self._add_sweep(sweep)
            added, _ = self._add_trials(trials)
            self._import_records(records)
        return added

    def import_jsonl(self, text: str) -> int:
        """Take in exported records and return how many were used: those newer than a record that has no trials here either."""
        devices, records = read_jsonl(text)
        with self._transaction():
            for device in devices:
                self._add_device(device)
            return self._import_records(records)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite itself rolls back when the disk is full
                    self._connection.execute("ROLLBACK")
                raise
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise
        except _FILE_ERRORS as error:
            raise DatabaseError.of_path(self.path, error) from error

    def _insert(self, table: str, noun: Any, conflict: str) -> int:
        row = row_of(noun) | ({"uid": noun.uid} if isinstance(noun, Device) else {})
        names, marks = ", ".join(row), ", ".join(f":{name}" for name in row)
        return self._connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks}) ON CONFLICT {conflict}", row).rowcount

    def _add_device(self, device: Device) -> None:
        self._insert("device", device, "(uid) DO NOTHING")

    def _add_sweep(self, sweep: Sweep) -> None:
        news = "finished_at = excluded.finished_at, state = excluded.state"
        self._insert("sweep", sweep, f"(uid) DO UPDATE SET {news} WHERE sweep.state = 'running'")

    def _add_trials(self, trials: Sequence[Trial]) -> tuple[int, list[Record]]:
        new = [trial for trial in trials if self._insert("trial", trial, "(uid) DO NOTHING")]
        sources = {(t.device_uid, t.problem, source_of(t.measurement)) for t in new if t.final and t.measurement}
        records = []
        for device_uid, problem, source in sorted(sources):
            known = self.trials(device_uid, problem)
            record = derive_record(t for t in known if t.measurement and source_of(t.measurement) is source)
            if record:
                self._put_record(record)
                records.append(record)
        return len(new), records

    def _import_records(self, records: Iterable[Record]) -> int:
        """Add records that come without trials, unless the record here is newer or has its trial."""
        kept = f"{_SAME_RECORD} AND (created_at >= ? OR trial_uid IN (SELECT uid FROM trial))"
        count = 0
        for record in records:
            key = (record.device_uid, record.source.value, *problem_values(record.problem), record.created_at)
            if not self._connection.execute(f"SELECT 1 FROM record WHERE {kept}", key).fetchone():
                self._put_record(record)
                count += 1
        return count

    def _put_record(self, record: Record) -> None:
        key = (record.device_uid, record.source.value, *problem_values(record.problem))
        self._connection.execute(f"DELETE FROM record WHERE {_SAME_RECORD}", key)
        self._insert("record", record, "DO NOTHING")

    def _select(self, convert: Callable[[sqlite3.Row], Noun], query: str, *values: object) -> list[Noun]:
        try:
            rows = self._connection.execute(query, values).fetchall()
        except _FILE_ERRORS as error:
            raise DatabaseError.of_path(self.path, error) from error
        nouns, bad = [], 0
        for row in rows:
            try:
                nouns.append(convert(row))
            except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
                bad += 1
        if bad:
            log.warning("%s: ignored %d of %d rows without valid values; sweep again to replace them", self.path, bad, len(rows))
        return nouns


@contextmanager
def open_for_reading(path: Path) -> Iterator[Store]:
    """A Store on one snapshot, which can't write. Where SQLite may not put its lock files, it takes the file as it lies there."""
    if not os.path.isfile(path):
        if os.path.exists(path):
            raise DatabaseError(f"{path} is not a file: {OTHER_FILE}")
        raise DatabaseError(f"{path} does not exist: `python -m tuner sweep` writes it, or {OTHER_FILE}")
    try:
        try:
            connection, version = _connect(path, "mode=ro")
        except sqlite3.OperationalError as error:
            if "locked" in str(error) or _has_journal(path):
                raise
            connection, version = _connect(path, "mode=ro&immutable=1")
    except _FILE_ERRORS as error:
        raise DatabaseError.of_path(path, error) from error
    with closing(connection):
        if version != SCHEMA_VERSION:
            raise DatabaseError.of_version(path, version, SCHEMA_VERSION)
        yield Store(path, connection)


def _connect(path: Path, mode: str) -> tuple[sqlite3.Connection, int]:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=READ_TIMEOUT_S, isolation_level=None)
    try:
        connection.execute("BEGIN")
        return connection, connection.execute("PRAGMA user_version").fetchone()[0]
    except BaseException:
        connection.close()
        raise


def _has_journal(path: Path) -> bool:
    """Whether a writer left work beside the file, without which the file may be half of a commit."""
    journals = (f"{path}-wal", f"{path}-journal")
    return any(os.path.exists(journal) and os.path.getsize(journal) for journal in journals)
