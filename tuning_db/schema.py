"""The tables of the tuning database, as numbered migrations."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import sqlite_utils

from tuning_db.errors import DatabaseError
from tuning_db.rows import SCHEMA_VERSION, checksum

NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "fuse", "9p", "afs", "wekafs")

PROBLEM = {
    "op": str,
    "x_dtype": str,
    "w_dtype": str,
    "y_dtype": str,
    "rows": int,
    "cols": int,
    "layout": str,
    "inner_rows": int,
}
CONFIG = {"variant": str, "params": str}
MEASUREMENT = {"policy": str, "median_us": float, "low_us": float, "high_us": float, "copy_fraction": float}
VERSIONS = {"revision": int, "source_hash": str, "triton_version": str, "torch_version": str, "created_at": str}


def create_tables(database: sqlite_utils.Database) -> None:
    """Version 1."""
    device = {
        "uid": str,
        "arch": str,
        "sm_count": int,
        "l2_bytes": int,
        "shared_bytes": int,
        "bandwidth_gbs": int,
        "warp_size": int,
        "name": str,
    }
    sweep = {
        "uid": str,
        "device_uid": str,
        "started_at": str,
        "finished_at": str,
        "host": str,
        "argv": str,
        "state": str,
        "triton_version": str,
        "torch_version": str,
    }
    identity = {"uid": str, "sweep_uid": str, "race_uid": str, "device_uid": str}
    outcome = {"role": str, "status": str, "final": int, "error": str}
    resources = {"registers": int, "spill_bytes": int, "shared_bytes": int}
    attempted = identity | PROBLEM | CONFIG | outcome | VERSIONS
    trial = attempted | MEASUREMENT | {"rounds": int} | resources
    key = {"device_uid": str, "source": str} | PROBLEM
    evidenced = key | CONFIG | MEASUREMENT | VERSIONS | {"trial_uid": str}
    record = evidenced | {"heuristic_us": float, "torch_us": float}

    of_device = ("device_uid", "device", "uid")
    of_sweep = ("sweep_uid", "sweep", "uid")
    database.create_table("device", device, pk="uid", not_null=device).create_index(["arch"])
    database.create_table("sweep", sweep, pk="uid", not_null=sweep, foreign_keys=[of_device])
    trials = database.create_table("trial", trial, pk="uid", not_null=attempted, foreign_keys=[of_sweep, of_device])
    trials.create_index(["device_uid", "op", "cols", "rows"])
    trials.create_index(["sweep_uid"])
    database.create_table("record", record, pk=tuple(key), not_null=evidenced, foreign_keys=[of_device])


def add_checksums(database: sqlite_utils.Database) -> None:
    """Version 2: by its checksum a damaged row is told from what was written. Sweeps, which no pick depends on, have none."""
    for table in ("device", "trial", "record"):
        rows = list(database.query(f"SELECT rowid AS at, * FROM {table}"))
        database.execute(f"ALTER TABLE {table} ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0")
        for row in rows:
            at = row.pop("at")
            database.execute(f"UPDATE {table} SET checksum = ? WHERE rowid = ?", (checksum(row), at))


MIGRATIONS = (create_tables, add_checksums)


def migrate(connection: sqlite3.Connection, path: Path, timeout_s: float) -> None:
    """Bring the file behind an autocommit connection to SCHEMA_VERSION; any number of processes may do so at once.

    Raises DatabaseError if the file is of a newer version or belongs to another program.
    """
    if count_tables(connection) == 0 and is_local(path):
        set_wal(connection, timeout_s)
    if read_version(connection) == SCHEMA_VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = read_version(connection)
        if version > SCHEMA_VERSION:
            raise DatabaseError.of_version(path, version, SCHEMA_VERSION)
        if version == 0 and count_tables(connection):
            raise DatabaseError(f"{path} holds another program's tables: name another file by RMSNORM_TUNING_DB or --db")
        database = sqlite_utils.Database(connection, execute_plugins=False)
        for number, migration in enumerate(MIGRATIONS[version:], start=version + 1):
            migration(database)
            connection.execute(f"PRAGMA user_version = {number}")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def read_version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def count_tables(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


def set_wal(connection: sqlite3.Connection, timeout_s: float) -> None:
    """Let readers read while a writer writes, where the file system can; else the default journal serves, with short waits."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                return
            time.sleep(0.01)  # SQLite's busy timeout does not cover the switch, which another creator may be making


def is_local(path: Path) -> bool:
    """False on a file system that hosts share, by /proc/mounts: WAL needs shared memory, and there it corrupts silently."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return True
    kinds = {mount[1]: mount[2] for mount in mounts}
    nearest = next((kinds[str(parent)] for parent in path.resolve().parents if str(parent) in kinds), "")
    return not nearest.startswith(NETWORK_FILESYSTEMS)
