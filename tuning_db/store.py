"""The tuning database's files: the project's only SQL, and the JSON Lines in which records ship."""

from __future__ import annotations

import json
import logging
import math
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields
from enum import Enum
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from tuning_db.model import (
    LAYOUTS,
    NO_WEIGHT,
    TORCH_VARIANT,
    Config,
    Device,
    Measurement,
    Problem,
    Record,
    Resources,
    Role,
    Source,
    Status,
    Sweep,
    Trial,
    canonical_json,
    itemsize,
    record_from_dict,
    to_dict,
)

SCHEMA_VERSION = 1
READ_TIMEOUT_S = 0.2
WRITE_TIMEOUT_S = 30.0
TIE = 1.01
"""Medians within this ratio of the fastest are a tie."""

log = logging.getLogger("tuned_rmsnorm")
Noun = TypeVar("Noun")

_OTHER_FILE = "name another file by RMSNORM_TUNING_DB or --db"
_PROBLEM = tuple(spec.name for spec in fields(Problem))
_MEASUREMENT = tuple(spec.name for spec in fields(Measurement))
_RESOURCES = tuple(spec.name for spec in fields(Resources))
_SAME_PROBLEM = " AND ".join(f"{name} = ?" for name in _PROBLEM)
_SAME_RECORD = f"device_uid = ? AND source = ? AND {_SAME_PROBLEM}"
_FILE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""What sqlite3 raises on a bad file: its message about a damaged schema need not be UTF-8."""
_FROM_TRIAL = tuple(spec.name for spec in fields(Record) if spec.name in Trial.__dataclass_fields__)
_FROM_MEASUREMENT = tuple(spec.name for spec in fields(Record) if spec.name in _MEASUREMENT)
_TYPES: dict[str, Any] = {"int": int, "str": str, "float": (int, float), "float | None": (int, float, NoneType)}


class DatabaseError(Exception):
    """A tuning database can't be used; the message names the file and the way out."""

    @classmethod
    def of_version(cls, path: Path, version: int) -> DatabaseError:
        if version > SCHEMA_VERSION:
            cure = f"upgrade this package, or {_OTHER_FILE}"
        else:
            cure = f"`python -m tuner sweep` brings it up to date, or {_OTHER_FILE}"
        return cls(f"{path} has schema version {version}, this package knows version {SCHEMA_VERSION}: {cure}")

    @classmethod
    def of_path(cls, path: Path, error: Exception) -> DatabaseError:
        if os.path.isdir(path):
            return cls(f"{path} is a directory: {_OTHER_FILE}")
        if "locked" in str(error):
            return cls(f"{path} is locked by another process: try again when that has ended, or {_OTHER_FILE}")
        return cls(f"{path} can't be used ({error}): restore it from a copy, move it away and sweep again, or {_OTHER_FILE}")


def read_records(path: str | os.PathLike[str], arch: str) -> tuple[list[Device], list[Record]]:
    """All devices of an arch and their records, in one read-only snapshot. DatabaseError if the file is bad in any way."""
    with _open_for_reading(Path(path)) as store:
        return store.devices(arch), store.records(arch=arch)


def shipped_records(arch: str) -> tuple[list[Device], list[Record]]:
    """The devices and records of an arch that come with the package; empty if there are none."""
    file = resources.files("tuning_db") / "shipped" / f"{arch}.jsonl"
    return read_jsonl(file.read_text(encoding="utf-8"), origin=str(file)) if file.is_file() else ([], [])


def write_jsonl(devices: Iterable[Device], records: Iterable[Record]) -> str:
    """One line each, devices first, sorted, so that a diff shows what changed. Times and fractions keep four decimals."""
    lines = [canonical_json({"device": to_dict(device)}) for device in sorted(devices, key=lambda device: device.uid)]
    for record in sorted(records, key=lambda record: (record.device_uid, record.source.value, record.problem)):
        plain = {name: round(value, 4) if isinstance(value, float) else value for name, value in to_dict(record).items()}
        lines.append(canonical_json({"record": plain}))
    return "".join(f"{line}\n" for line in lines)


def read_jsonl(text: str, origin: str = "JSON Lines") -> tuple[list[Device], list[Record]]:
    """The inverse of `write_jsonl`. Raises DatabaseError with the number of the first bad line."""
    devices: dict[str, Device] = {}
    records: list[Record] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            ((kind, plain),) = json.loads(line).items()
            if kind == "device":
                device = _checked(Device(**plain))
                devices[device.uid] = device
            elif kind == "record":
                records.append(_checked(record_from_dict(plain)))
                if records[-1].device_uid not in devices:
                    raise ValueError(f"no line above describes device {records[-1].device_uid}")
            else:
                raise ValueError(f"expected `device` or `record`, found {kind!r}")
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise DatabaseError(f"{origin}, line {number}: {error!r}; correct or delete that line") from error
    return list(devices.values()), records


def derive_record(trials: Iterable[Trial]) -> Record | None:
    """The record that trials of one device, problem and source stand for: the winner of the newest final race, or None.

    Older races are history, however fast. Within 1 % of the fastest median is a tie: the incumbent stays; else a kernel comes
    before PyTorch, then fewer warps, the smaller tile (product of the other integer params) and the name decide.
    """
    races: dict[tuple[str, str], list[tuple[Trial, Measurement]]] = {}
    for trial in trials:
        if trial.final and trial.status is Status.OK and trial.measurement:
            races.setdefault((trial.race_uid, trial.measurement.policy), []).append((trial, trial.measurement))
    if not races:
        return None
    newest = max(races, key=lambda key: (max(trial.created_at for trial, _ in races[key]), key))
    race = races[newest]
    fastest = min(measured.median_us for _, measured in race)
    winner, measured = min((entry for entry in race if entry[1].median_us <= fastest * TIE), key=_tie_order)
    torch_us = [timed.median_us for trial, timed in race if trial.role is Role.TORCH or trial.config.variant == TORCH_VARIANT]
    return Record(
        source=_source(measured),
        heuristic_us=min((timed.median_us for trial, timed in race if trial.role is Role.HEURISTIC), default=None),
        torch_us=min(torch_us, default=None),
        trial_uid=winner.uid,
        **{name: getattr(winner, name) for name in _FROM_TRIAL},
        **{name: getattr(measured, name) for name in _FROM_MEASUREMENT},
    )


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
        schema.migrate(connection, path)
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
        return self._select(_device, "SELECT * FROM device WHERE ? IN (arch, '') ORDER BY uid", arch or "")

    def sweeps(self) -> list[Sweep]:
        return self._select(lambda row: Sweep(**dict(row)), "SELECT * FROM sweep ORDER BY started_at, uid")

    def trials(self, device_uid: str, problem: Problem | None = None) -> list[Trial]:
        query = "SELECT * FROM trial WHERE device_uid = ?"
        if problem is None:
            return self._select(_trial, f"{query} ORDER BY created_at, uid", device_uid)
        return self._select(_trial, f"{query} AND {_SAME_PROBLEM} ORDER BY created_at, uid", device_uid, *_values(problem))

    def records(self, device_uid: str | None = None, *, arch: str | None = None) -> list[Record]:
        """All records, or those of one device or arch, in the order of `write_jsonl`."""
        query = "SELECT record.* FROM record JOIN device ON device.uid = device_uid WHERE ? IN (device_uid, '') AND ? IN (arch, '')"
        return self._select(_record, f"{query} ORDER BY device_uid, source, {', '.join(_PROBLEM)}", device_uid or "", arch or "")

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
        with _open_for_reading(Path(other_path)) as other:
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
        columns = _columns(noun) | ({"uid": noun.uid} if isinstance(noun, Device) else {})
        names, marks = ", ".join(columns), ", ".join(f":{name}" for name in columns)
        return self._connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks}) ON CONFLICT {conflict}", columns).rowcount

    def _add_device(self, device: Device) -> None:
        self._insert("device", device, "(uid) DO NOTHING")

    def _add_sweep(self, sweep: Sweep) -> None:
        news = "finished_at = excluded.finished_at, state = excluded.state"
        self._insert("sweep", sweep, f"(uid) DO UPDATE SET {news} WHERE sweep.state = 'running'")

    def _add_trials(self, trials: Sequence[Trial]) -> tuple[int, list[Record]]:
        new = [trial for trial in trials if self._insert("trial", trial, "(uid) DO NOTHING")]
        sources = {(t.device_uid, t.problem, _source(t.measurement)) for t in new if t.final and t.measurement}
        records = []
        for device_uid, problem, source in sorted(sources):
            known = self.trials(device_uid, problem)
            record = derive_record(t for t in known if t.measurement and _source(t.measurement) is source)
            if record:
                self._put_record(record)
                records.append(record)
        return len(new), records

    def _import_records(self, records: Iterable[Record]) -> int:
        """Add records that come without trials, unless the record here is newer or has its trial."""
        kept = f"{_SAME_RECORD} AND (created_at >= ? OR trial_uid IN (SELECT uid FROM trial))"
        count = 0
        for record in records:
            key = (record.device_uid, record.source.value, *_values(record.problem), record.created_at)
            if not self._connection.execute(f"SELECT 1 FROM record WHERE {kept}", key).fetchone():
                self._put_record(record)
                count += 1
        return count

    def _put_record(self, record: Record) -> None:
        key = (record.device_uid, record.source.value, *_values(record.problem))
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
def _open_for_reading(path: Path) -> Iterator[Store]:
    """A Store on one snapshot, which can't write. Where SQLite may not put its lock files, it takes the file as it lies there."""
    if not os.path.isfile(path):
        if os.path.exists(path):
            raise DatabaseError(f"{path} is not a file: {_OTHER_FILE}")
        raise DatabaseError(f"{path} does not exist: `python -m tuner sweep` writes it, or {_OTHER_FILE}")
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
            raise DatabaseError.of_version(path, version)
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


def _columns(noun: Any) -> dict[str, Any]:
    """A noun as one flat row; a column without a value is left out."""
    columns: dict[str, Any] = {}
    for name, value in ((spec.name, getattr(noun, spec.name)) for spec in fields(noun)):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}: a failed trial has a status, not a time")
        if isinstance(value, Config):
            columns |= {"variant": value.variant, "params": value.params_json}
        elif isinstance(value, Problem | Measurement | Resources):
            columns |= _columns(value)
        elif value is not None:
            columns[name] = value.value if isinstance(value, Enum) else value
    return columns


def _values(problem: Problem) -> tuple[Any, ...]:
    return tuple(getattr(problem, name) for name in _PROBLEM)


def _take(plain: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: plain.pop(name) for name in names}


def _device(row: sqlite3.Row) -> Device:
    plain = dict(row)
    uid = plain.pop("uid")
    device = _checked(Device(**plain))
    if device.uid != uid:
        raise ValueError(f"device {uid} has the fingerprint of {device.uid}")
    return device


def _trial(row: sqlite3.Row) -> Trial:
    plain = dict(row)
    problem, measurement, binary = _take(plain, _PROBLEM), _take(plain, _MEASUREMENT), _take(plain, _RESOURCES)
    return Trial(
        problem=Problem(**problem),
        config=Config.of(plain.pop("variant"), **json.loads(plain.pop("params"))),
        role=Role(plain.pop("role")),
        status=Status(plain.pop("status")),
        final=bool(plain.pop("final")),
        measurement=None if measurement["policy"] is None else _checked(Measurement(**measurement)),
        resources=None if binary["registers"] is None else _checked(Resources(**binary)),
        **plain,
    )


def _record(row: sqlite3.Row) -> Record:
    plain = dict(row)
    plain["problem"] = _take(plain, _PROBLEM)
    plain["config"] = {"variant": plain.pop("variant"), "params": json.loads(plain.pop("params"))}
    return _checked(record_from_dict(plain))


def _checked(noun: Noun) -> Noun:
    """The noun, if its fields hold what their annotations say and no negative, infinite or unknown value."""
    for spec in fields(noun):  # type: ignore[arg-type]
        value = getattr(noun, spec.name)
        if isinstance(value, Problem):
            _checked(value)
            if min(value.rows, value.cols, value.inner_rows) < 1 or value.layout not in LAYOUTS:
                raise ValueError(f"no such problem: {value}")
            for dtype in {value.x_dtype, value.w_dtype, value.y_dtype} - {NO_WEIGHT}:
                itemsize(dtype)
        elif isinstance(value, Config):
            if not isinstance(value.variant, str) or not all(isinstance(param, int | str) for _, param in value.items):
                raise TypeError(f"no such config: {value}")
        elif isinstance(value, bool) or not isinstance(value, _TYPES.get(str(spec.type), object)):
            raise TypeError(f"{spec.name} is {value!r}, expected {spec.type}")
        elif isinstance(value, int | float) and not 0 <= value < 2**63:
            raise ValueError(f"{spec.name} is {value!r}")
    return noun


def _source(measurement: Measurement) -> Source:
    return Source.MODELLED if measurement.policy.startswith("model") else Source.MEASURED


def _tie_order(entry: tuple[Trial, Measurement]) -> tuple[Any, ...]:
    trial, measurement = entry
    params = trial.config.params
    warps = int(params.pop("num_warps", 0))
    tile = math.prod(value for value in params.values() if isinstance(value, int) and not isinstance(value, bool))
    fixed = (trial.config.variant == TORCH_VARIANT, warps, tile, str(trial.config))
    return (trial.role is not Role.INCUMBENT, *fixed, measurement.median_us, trial.uid)
