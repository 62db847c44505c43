"""The tuning database's SQLite files: the project's only SQL."""

from __future__ import annotations

import itertools
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuning_db.derive import derive_record, source_of
from tuning_db.errors import OTHER_FILE, DatabaseError
from tuning_db.jsonl import read_jsonl, write_jsonl
from tuning_db.merged import Key, Merged, age_order, device_order, disputes, key_of, sweep_order
from tuning_db.model import Device, Problem, Record, Status, Sweep, Trial
from tuning_db.rows import (
    PROBLEM,
    SCHEMA_VERSION,
    Noun,
    checksum,
    device_from_row,
    problem_values,
    record_from_row,
    row_of,
    sweep_from_row,
    trial_from_row,
)

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
        self._has_warned = False

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def devices(self, arch: str | None = None) -> list[Device]:
        return self._select(device_from_row, "SELECT * FROM device WHERE ? IN (arch, '') ORDER BY uid", arch or "")

    def sweeps(self) -> list[Sweep]:
        return self._select(sweep_from_row, "SELECT * FROM sweep ORDER BY started_at, uid")

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

    def records_without_trials(self) -> list[Record]:
        """Records that were imported: the trial they name is not in this file."""
        return self._select(record_from_row, "SELECT * FROM record WHERE trial_uid NOT IN (SELECT uid FROM trial)")

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
            changed = itertools.chain.from_iterable(map(self._add_trial, trials))
            keys = {(t.device_uid, source_of(t.measurement), t.problem) for t in changed if t.final and t.measurement}
            records = [record for key in sorted(keys) if (record := self._derive(key))]
            for record in records:
                self._insert("record", record, "REPLACE")
        return records

    def merge(self, *paths: str | os.PathLike[str]) -> Merged:
        """Take in other tuning databases, all of them or none, and derive the records anew.

        The result is the same in whatever order the files come, and however often. Rows that are damaged in one file are taken from
        another. DatabaseError names the file that can't be read; this one is then as it was.
        """
        self._connection.execute("PRAGMA foreign_keys = OFF")  # trials whose sweep is damaged in their file are evidence all the same
        try:
            with self._transaction():
                found, new = self.records(), {}
                for path in map(Path, paths):
                    with open_for_reading(path) as other:
                        new[path] = self._take(other)
                        found += other.records()
                derived = self._derive_all()
                self._settle(record for record in found if key_of(record) not in derived)
                kept = {key_of(record): record for record in self.records()}
        finally:
            self._connection.execute("PRAGMA foreign_keys = ON")
        return Merged(new, self._split_uids(), disputes(kept, found))

    def import_jsonl(self, text: str, origin: str = "JSON Lines") -> int:
        """Take in exported records and return how many were used: where there are no trials, the newest."""
        devices, records = read_jsonl(text, origin)
        with self._transaction():
            for device in devices:
                self._add_device(device)
            return self._settle(records)

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
        if not isinstance(noun, Sweep):  # whose state changes
            row["checksum"] = checksum(row)
        names, marks = ", ".join(row), ", ".join(f":{name}" for name in row)
        return self._connection.execute(f"INSERT OR {conflict} INTO {table} ({names}) VALUES ({marks})", row).rowcount

    def _add_device(self, device: Device) -> None:
        known = self._select(device_from_row, "SELECT * FROM device WHERE uid = ?", device.uid)
        if not known or device_order(known[0]) < device_order(device):
            self._insert("device", device, "REPLACE")

    def _add_sweep(self, sweep: Sweep) -> None:
        known = self._select(sweep_from_row, "SELECT * FROM sweep WHERE uid = ?", sweep.uid)
        if not known or sweep_order(known[0]) < sweep_order(sweep):
            self._insert("sweep", sweep, "REPLACE")

    def _add_trial(self, trial: Trial) -> list[Trial]:
        """Add a trial and return what that changed. Of trials that differ under one uid the first by its text keeps that uid."""
        if self._insert("trial", trial, "IGNORE"):
            return [trial]
        known = self._select(trial_from_row, "SELECT * FROM trial WHERE uid = ?", trial.uid)  # none if that row is damaged
        if known == [trial]:
            return []
        first, *others = sorted([*known, trial], key=repr)
        self._insert("trial", first, "REPLACE")
        added = [self._insert("trial", replace(t, uid=f"{t.uid}~{checksum(row_of(t)):08x}"), "IGNORE") for t in others]
        return [first, *others] if all(added) else []

    def _split_uids(self) -> list[str]:
        """The uids that stand for trials that differ, as `_add_trial` tells them apart."""
        rows = self._connection.execute("SELECT DISTINCT substr(uid, 1, instr(uid, '~') - 1) FROM trial WHERE instr(uid, '~') ORDER BY 1")
        return [uid for (uid,) in rows]

    def _take(self, other: Store) -> int:
        """Take in all of another database but its records, and return how many trials were new."""
        added = 0
        for sweep in other.sweeps():
            self._add_sweep(sweep)
        for device in other.devices():
            self._add_device(device)
            added += sum(bool(self._add_trial(trial)) for trial in other.trials(device.uid))
        return added

    def _derive(self, key: Key) -> Record | None:
        device_uid, source, problem = key
        known = self.trials(device_uid, problem)
        return derive_record(t for t in known if t.measurement and source_of(t.measurement) is source)

    def _derive_all(self) -> set[Key]:
        """Put the record of every problem that has one by its trials, and return which those are."""
        races: dict[Key, list[Trial]] = {}
        for device in self.devices():
            for trial in self.trials(device.uid):
                if trial.measurement:
                    races.setdefault((device.uid, source_of(trial.measurement), trial.problem), []).append(trial)
        derived = {key: record for key, trials in races.items() if (record := derive_record(trials))}
        for record in derived.values():
            self._insert("record", record, "REPLACE")
        return set(derived)

    def _settle(self, claims: Iterable[Record]) -> int:
        """Use the newest claim of each problem that has no record by its trials, and return how many were used."""
        used, devices = 0, {device.uid for device in self.devices()}
        for claim in claims:
            if claim.device_uid not in devices:
                continue
            values = (claim.device_uid, claim.source.value, *problem_values(claim.problem))
            known = self._select(record_from_row, f"SELECT * FROM record WHERE {_SAME_RECORD}", *values)
            if not self._derive(key_of(claim)) and (not known or age_order(known[0]) < age_order(claim)):
                self._insert("record", claim, "REPLACE")
                used += 1
        return used

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
        if bad and not self._has_warned:
            self._has_warned = True
            log.warning("%s: ignored %d of %d rows that are damaged; merge a copy that has them, or sweep again", self.path, bad, len(rows))
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
    for journal in (f"{path}-wal", f"{path}-journal"):
        try:
            if os.path.getsize(journal):
                return True
        except OSError:  # there is none, or no longer
            continue
    return False
