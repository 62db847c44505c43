"""Made-up tuning databases for tests, and the ways in which a file can be bad."""

import sqlite3
from dataclasses import replace
from pathlib import Path

from tuning_db.model import Config, Device, Measurement, Problem, Role, Status, Sweep, Trial
from tuning_db.rows import checksum
from tuning_db.store import open_for_writing

DEVICE = Device("sm_90", 132, 50 * 2**20, 227 * 2**10, 3352, name="H100")
OTHER = Device("gfx942", 304, 4 * 2**20, 64 * 2**10, 5300, 64, name="MI300X")
SWEEP = Sweep("s1", DEVICE.uid, "2025-01-01T00:00:00Z", "", "host", '["sweep"]', "running", "3.6.0", "2.13.0")
PROBLEM = Problem("rmsnorm", "bfloat16", "float32", "bfloat16", 4096, 8192)
CONFIG = Config.of("multi_row", rows_per_program=4, num_warps=8)


def make_trial(uid: str, median_us: float = 50.0, config: Config = CONFIG, policy: str = "graph", **changes: object) -> Trial:
    measurement = Measurement(policy, median_us, median_us - 0.5, median_us + 0.5, 0.9, 30)
    code = {"revision": 1, "source_hash": "0a1b", "triton_version": "3.6.0", "torch_version": "2.13.0", "created_at": "2025-01-01"}
    outcome = {"role": Role.CANDIDATE, "status": Status.OK, "final": True, "measurement": measurement}
    trial = Trial(uid, "s1", "race1", DEVICE.uid, PROBLEM, config, **outcome, **code)
    return replace(trial, **changes)


def fill(path: Path, *trials: Trial) -> Path:
    with open_for_writing(path) as database:
        database.add_device(DEVICE)
        database.add_sweep(SWEEP)
        database.add_trials(trials)
    return path


def edit(path: Path, statement: str, *, seal: bool = False) -> None:
    """Change a file behind the package's back; with `seal` the rows get the checksums that they would have been written with."""
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    connection.execute(statement)
    for table in ("device", "trial", "record") if seal else ():
        for row in connection.execute(f"SELECT rowid AS at, * FROM {table}").fetchall():
            plain = {name: value for name, value in dict(row).items() if name not in ("at", "checksum")}
            connection.execute(f"UPDATE {table} SET checksum = ? WHERE rowid = ?", (checksum(plain), row["at"]))
    connection.commit()
    connection.close()


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 100])


def damage_random(path: Path) -> None:
    path.write_bytes(bytes(at * 197 % 251 for at in range(20_000)))


def damage_tables(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE record")
    connection.commit()
    connection.close()


def damage_pages(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))


def damage_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def damage_newer(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()


DAMAGES = [
    (damage_missing, "does not exist"),
    (damage_empty, "schema version 0"),
    (damage_truncated, "can't be used"),
    (damage_random, "not a database"),
    (damage_tables, "no such table"),
    (damage_pages, "can't be used"),
    (damage_directory, "is not a file"),
    (damage_newer, "schema version 7, this package knows version 2: upgrade"),
]
