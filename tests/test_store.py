"""The database file and its JSON Lines: round trips, derivation, schema."""

import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from databases import DEVICE, OTHER, PROBLEM, SWEEP, fill, make_trial
from tuning_db import schema, store
from tuning_db.derive import derive_record
from tuning_db.errors import DatabaseError
from tuning_db.jsonl import read_jsonl, shipped_records, write_jsonl
from tuning_db.model import Config, Record, Resources, Role, Source, Status, Trial
from tuning_db.rows import row_of
from tuning_db.store import open_for_writing, read_records

# Round trips


def test_everything_stored_comes_back(tmp_path: Path) -> None:
    trials = [
        make_trial("t1", resources=Resources(32, 0, 1024)),
        make_trial("t2", 60.0, Config.of("torch"), role=Role.TORCH),
        make_trial("t3", final=False, role=Role.INCUMBENT, config=Config.of("multi_row", persistent=True, order="row")),
        make_trial("t4", final=False, status=Status.COMPILE_ERROR, error="no “ptxas”", measurement=None),
    ]
    path = tmp_path / "new" / "folder" / "a.db"
    with open_for_writing(path) as database:
        database.add_device(DEVICE)
        database.add_device(OTHER)
        database.add_sweep(SWEEP)
        assert database.add_trials(trials) == [derive_record(trials)]
        database.finish_sweep("s1", "2025-01-02", "finished")
        assert database.trials(DEVICE.uid) == database.trials(DEVICE.uid, PROBLEM) == trials
        assert database.trials(DEVICE.uid, replace(PROBLEM, rows=1)) == database.trials(OTHER.uid) == []
        assert database.sweeps() == [replace(SWEEP, finished_at="2025-01-02", state="finished")]
        assert {device.name for device in database.devices()} == {"H100", "MI300X"}
        assert database.records(OTHER.uid) == []
    assert read_records(path, "sm_90") == ([DEVICE], [derive_record(trials)])
    assert read_records(path, "gfx942") == ([OTHER], [])


def test_a_trial_is_never_counted_twice(tmp_path: Path) -> None:
    with open_for_writing(fill(tmp_path / "a.db", make_trial("t1"))) as database:
        assert database.add_trials([make_trial("t1")]) == []
        assert database.trials(DEVICE.uid) == [make_trial("t1")]


def test_measured_and_modelled_winners_live_side_by_side(tmp_path: Path) -> None:
    path = fill(tmp_path / "a.db", make_trial("t1"), make_trial("t2", 1.0, policy="model-1", race_uid="race2", created_at="2026"))
    assert [(r.source, r.median_us) for r in read_records(path, "sm_90")[1]] == [(Source.MEASURED, 50.0), (Source.MODELLED, 1.0)]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with open_for_writing(tmp_path / "a.db") as database:
        database.add_device(DEVICE)
        database.add_sweep(SWEEP)
        with pytest.raises(sqlite3.IntegrityError):
            database.add_trials([make_trial("t1"), make_trial("t2", sweep_uid="no such sweep")])
        with pytest.raises(ValueError, match="median_us is inf"):
            database.add_trials([make_trial("t1"), make_trial("t3", float("inf"))])
        assert database.trials(DEVICE.uid) == database.records() == []


def test_every_write_is_one_immediate_transaction(filled: Path) -> None:
    """A deferred one fails at once when another writer comes between its first read and its first write."""
    statements: list[str] = []
    with open_for_writing(filled) as database:
        database._connection.set_trace_callback(statements.append)
        database.add_device(OTHER)
        database.add_sweep(replace(SWEEP, uid="s2"))
        database.add_trials([make_trial("t3"), make_trial("t4")])
        database.finish_sweep("s2", "2026", "interrupted")
        database.import_jsonl(database.export())
        database.merge(filled)
    begun = [statement for statement in statements if statement.startswith(("BEGIN", "COMMIT"))]
    assert begun == ["BEGIN IMMEDIATE", "COMMIT"] * 6


# Derivation


def race(*medians: float, **changes: object) -> list[Trial]:
    """Trials of one race, whose configs differ in a param that no tie rule counts before the name."""
    return [make_trial(f"{changes}{at}", us, Config.of("v", mode=f"m{at}"), **changes) for at, us in enumerate(medians)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"config": Config.of("z", num_warps=4, block=4096)}, {"config": Config.of("a", num_warps=8, block=2)}),
        ({"config": Config.of("z", num_warps=4, rows=2, block=64)}, {"config": Config.of("a", num_warps=4, rows=1, block=256)}),
        ({"config": Config.of("a", num_warps=4, flag=True)}, {"config": Config.of("b", num_warps=4, flag=False)}),
        ({"config": Config.of("z", num_warps=16)}, {"config": Config.of("torch")}),
    ],
    ids=["fewer warps", "smaller tile", "name", "kernel before torch"],
)
def test_ties_are_settled_by_rule(first: dict, second: dict) -> None:
    won, lost = make_trial("t1", 50.1, **first), make_trial("t2", 50.0, **second)
    assert derive_record([won, lost]).trial_uid == derive_record([lost, won]).trial_uid == "t1"
    beyond = make_trial("t1", 50.2, **first)
    assert derive_record([beyond, lost]).trial_uid == "t2"


@pytest.mark.parametrize(
    ("challenger_us", "winner"),
    [
        (49.9, "incumbent"),
        (49.0, "incumbent"),  # a median 2 % better, but 49.5 × 1.01 = 50.0 is not below 49.5
        (48.6, "incumbent"),  # 49.1 × 1.01 = 49.59
        (48.5, "challenger"),  # 49.0 × 1.01 = 49.49
    ],
)
def test_an_incumbent_falls_only_to_a_gain_surely_above_one_percent(challenger_us: float, winner: str) -> None:
    """Intervals are the medians ± 0.5 µs; the incumbent's begins at 49.5."""
    incumbent = make_trial("incumbent", 50.0, Config.of("z", num_warps=32), role=Role.INCUMBENT)
    challenger = make_trial("challenger", challenger_us, Config.of("a", num_warps=1))
    assert derive_record([incumbent, challenger]).trial_uid == winner
    assert derive_record([challenger, incumbent]).trial_uid == winner


def test_of_those_that_surely_beat_the_incumbent_the_rule_decides() -> None:
    incumbent = make_trial("incumbent", 60.0, Config.of("y", num_warps=1), role=Role.INCUMBENT)
    fastest, fewer = make_trial("a", 40.0, Config.of("a", num_warps=8)), make_trial("b", 40.1, Config.of("b", num_warps=4))
    assert derive_record([incumbent, fastest, fewer]).trial_uid == "b"
    unsure = make_trial("c", 40.05, Config.of("c", num_warps=2), measurement=replace(fastest.measurement, median_us=40.05, high_us=59.9))
    assert derive_record([incumbent, fastest, fewer, unsure]).trial_uid == "b"


def test_the_newest_race_decides_though_an_older_one_was_faster() -> None:
    lucky, now = race(10.0, 11.0, race_uid="old"), race(20.0, 30.0, race_uid="new", created_at="2025-02-01")
    assert derive_record(lucky + now).median_us == 20.0
    broken = make_trial("x", 1.0, race_uid="newer", created_at="2025-03-01")
    for change in ({"final": False}, {"status": Status.WRONG}, {"measurement": None}):
        assert derive_record([*lucky, *now, replace(broken, **change)]).median_us == 20.0
    assert derive_record([replace(broken, final=False)]) is None


def test_policies_never_mix() -> None:
    assert derive_record([make_trial("a", 10.0, policy="events"), make_trial("b", 20.0, created_at="2026")]).median_us == 20.0


def test_heuristic_and_torch_come_from_the_same_race() -> None:
    old = make_trial("t0", 1.0, role=Role.HEURISTIC, race_uid="old", created_at="2024")
    trials = [old, make_trial("t1"), make_trial("t2", 55.0, role=Role.HEURISTIC), make_trial("t3", 70.0, Config.of("torch"))]
    record = derive_record(trials)
    assert (record.heuristic_us, record.torch_us, record.source) == (55.0, 70.0, Source.MEASURED)
    alone = derive_record([make_trial("t1", policy="model-1", role=Role.HEURISTIC)])
    assert (alone.heuristic_us, alone.torch_us, alone.source) == (50.0, None, Source.MODELLED)


trials = st.builds(
    make_trial,
    uid=st.uuids().map(str),
    median_us=st.sampled_from([50.0, 50.2, 50.5, 50.6, 51.0]),
    config=st.sampled_from([Config.of("v", num_warps=warps, block=block) for warps in (1, 4) for block in (64, 128)]),
    race_uid=st.sampled_from(["a", "b"]),
    created_at=st.sampled_from(["2024", "2025"]),
    role=st.sampled_from(Role),
    final=st.booleans(),
)


@given(st.lists(trials, max_size=8), st.randoms(use_true_random=False))
def test_derivation_knows_no_order(some: list[Trial], random: object) -> None:
    assert derive_record(random.sample(some, len(some))) == derive_record(some)


@given(st.lists(trials, max_size=8), st.integers(0, 8))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_records_do_not_depend_on_how_trials_arrived(tmp_path: Path, some: list[Trial], cut: int) -> None:
    for path in tmp_path.iterdir():
        path.unlink()
    fill(tmp_path / "b.db", *some[cut:])
    with open_for_writing(fill(tmp_path / "a.db", *some[:cut])) as database:
        database.merge(tmp_path / "b.db")
        expected = derive_record(some)
        assert database.records() == ([expected] if expected else [])


records = st.builds(
    replace,
    st.just(derive_record([make_trial("t1")])),
    problem=st.builds(replace, st.just(PROBLEM), rows=st.integers(1, 9), cols=st.integers(1, 9)),
    median_us=st.floats(0, 1e6).map(lambda us: round(us, 4)),
    torch_us=st.one_of(st.none(), st.floats(0, 1e6).map(lambda us: round(us, 4))),
    source=st.sampled_from(Source),
    source_hash=st.text(max_size=4),
)


@given(st.lists(records, max_size=6, unique_by=lambda record: (record.source, record.problem)), st.randoms(use_true_random=False))
def test_jsonl_round_trip_in_any_order(some: list[Record], random: object) -> None:
    text = write_jsonl([OTHER, DEVICE], some)
    assert text == write_jsonl([DEVICE, OTHER], random.sample(some, len(some)))
    devices, back = read_jsonl(text)
    assert [(device, device.name) for device in devices] == [(OTHER, "MI300X"), (DEVICE, "H100")]
    assert sorted(back, key=repr) == sorted(some, key=repr)
    assert write_jsonl(devices, back) == text


GOOD = write_jsonl([DEVICE], [derive_record([make_trial("t1")])])


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", "Expecting"),
        ("[]", "items"),
        ('{"sweep": {}}', "'sweep'"),
        ('{"device": {"arch": "sm_90"}}', "sm_count"),
        (GOOD.splitlines()[1].replace("8192", '"8192"'), "cols is '8192'"),
        (GOOD.splitlines()[1].replace("8192", "0"), "no such problem"),
        (GOOD.splitlines()[1].replace('"median_us":50.0', '"median_us":NaN'), "median_us is nan"),
        (GOOD.splitlines()[1].replace("measured", "guessed"), "guessed"),
        (GOOD.splitlines()[1].replace('"trial_uid":"t1"', '"trial_uid":"\\ud800"'), "surrogates not allowed"),
        (GOOD.splitlines()[1].replace("multi_row", "\\udfff"), "surrogates not allowed"),
        (GOOD.splitlines()[1].replace('"x_dtype":"bfloat16"', '"x_dtype":"none"'), "no such problem"),
        (GOOD.splitlines()[1].replace("bfloat16", "float12"), "float12"),
        (GOOD.splitlines()[1].replace('"num_warps":8', '"num_warps":[8]'), "no such config"),
        (GOOD.splitlines()[1].replace("sm_90-", "sm_91-"), "no line above"),
    ],
)
def test_a_bad_line_is_named(line: str, found: str) -> None:
    with pytest.raises(DatabaseError, match=r"here\.jsonl, line 4: ") as caught:
        read_jsonl(f"{GOOD}\n{line}\n", origin="here.jsonl")
    assert found in str(caught.value)


def test_what_ships_can_be_read() -> None:
    assert shipped_records("sm_1") == ([], [])
    for file in (Path(store.__file__).parent / "shipped").glob("*.jsonl"):
        devices, records = shipped_records(file.stem)
        assert {device.arch for device in devices} == {file.stem}
        assert write_jsonl(devices, records) == file.read_text(encoding="utf-8")


# Schema


def test_every_version_has_its_migration() -> None:
    assert len(schema.MIGRATIONS) == store.SCHEMA_VERSION


def test_columns_are_the_fields(filled: Path) -> None:
    connection = sqlite3.connect(filled)
    full = make_trial("t", resources=Resources(1, 2, 3))
    trial, device = {*row_of(full), "checksum"}, {*vars(DEVICE), "uid", "checksum"}
    for table, expected in (("trial", trial), ("sweep", {*vars(SWEEP)}), ("device", device)):
        assert {row[1] for row in connection.execute(f"PRAGMA table_info({table})")} == expected
    connection.close()


@pytest.mark.parametrize(("local", "mode"), [(True, "wal"), (False, "delete")])
def test_journal_is_wal_on_a_local_disk_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool, mode: str) -> None:
    monkeypatch.setattr(schema, "is_local", lambda _: local)
    connection = sqlite3.connect(fill(tmp_path / "a.db", make_trial("t1")))
    assert connection.execute("PRAGMA journal_mode").fetchone() == (mode,)
    connection.close()


@pytest.mark.parametrize(("message", "calls"), [("database is locked", 3), ("locking protocol", 1), ("disk I/O error", 1)])
def test_the_switch_to_wal_waits_for_other_creators_alone(message: str, calls: int) -> None:
    class Connection:
        def __init__(self) -> None:
            self.executed: list[str] = []

        def execute(self, statement: str) -> None:
            self.executed.append(statement)
            if len(self.executed) < 3:
                raise sqlite3.OperationalError(message)

    connection = Connection()
    schema.set_wal(connection, 30.0)
    assert connection.executed == ["PRAGMA journal_mode = WAL"] * calls


def test_the_migration_is_one_immediate_transaction(tmp_path: Path) -> None:
    statements: list[str] = []
    connection = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    connection.set_trace_callback(statements.append)
    schema.migrate(connection, tmp_path / "a.db", 1.0)
    schema.migrate(connection, tmp_path / "a.db", 1.0)
    assert [line for line in statements if line.startswith(("BEGIN", "COMMIT"))] == ["BEGIN IMMEDIATE", "COMMIT"]
    connection.close()


def test_network_mounts_are_told_by_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = "/dev/vda / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\nlocal /home/local xfs rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: mounts)
    assert [schema.is_local(Path(path)) for path in ("/data/a.db", "/home/me/a.db", "/home/local/a.db")] == [True, False, True]


def test_a_file_of_version_1_is_brought_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.db"
    with monkeypatch.context() as patched:
        patched.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
        patched.setattr(schema, "SCHEMA_VERSION", 1)
        open_for_writing(path).close()
    expected = fill(tmp_path / "new.db", make_trial("t1"), make_trial("t2", 40.0))
    connection = sqlite3.connect(path)
    connection.execute("ATTACH ? AS new", (str(expected),))
    for table in ("device", "sweep", "trial", "record"):
        names = ", ".join(row[1] for row in connection.execute(f"PRAGMA main.table_info({table})"))
        connection.execute(f"INSERT INTO main.{table} ({names}) SELECT {names} FROM new.{table}")
    connection.commit()
    connection.close()
    with pytest.raises(DatabaseError, match="schema version 1, this package knows version 2: `python -m tuner sweep` brings it up"):
        read_records(path, "sm_90")
    with open_for_writing(path) as database, open_for_writing(expected) as other:
        assert database.trials(DEVICE.uid) == other.trials(DEVICE.uid)
    assert len(read_records(path, "sm_90")[1]) == 1
    assert read_records(path, "sm_90") == read_records(expected, "sm_90")


def test_a_failed_migration_leaves_no_half_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create_then_fail(database: object) -> None:
        schema.create_tables(database)
        raise RuntimeError("stop")

    with monkeypatch.context() as patched:
        patched.setattr(schema, "MIGRATIONS", (create_then_fail,))
        with pytest.raises(RuntimeError):
            open_for_writing(tmp_path / "a.db")
    assert len(read_records(fill(tmp_path / "a.db", make_trial("t1")), "sm_90")[1]) == 1


def test_readers_import_nothing_heavy() -> None:
    code = "import sys, tuning_db.store, tuning_db.lookup; print({'sqlite_utils', 'torch', 'triton', 'click'} & set(sys.modules))"
    root = Path(store.__file__).parents[1]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() == "set()"
