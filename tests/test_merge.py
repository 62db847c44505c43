"""Merge, export, import: in any order, any number of times, from damaged files, with evidence that contradicts itself."""

import itertools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from databases import CONFIG, DAMAGES, DEVICE, OTHER, PROBLEM, SWEEP, edit, fill, make_trial
from tuning_db import schema
from tuning_db.derive import derive_record, source_of
from tuning_db.errors import DatabaseError
from tuning_db.jsonl import write_jsonl
from tuning_db.model import Config, Record, Trial
from tuning_db.rows import checksum
from tuning_db.store import Store, open_for_writing

FASTER = Config.of("multi_row", rows_per_program=2, num_warps=8)


def contents(path: Path) -> tuple[object, ...]:
    """All that a database holds, names that don't count for equality too."""
    with open_for_writing(path) as database:
        devices = database.devices()
        trials = [trial for device in devices for trial in database.trials(device.uid)]
        return [vars(device) for device in devices], database.sweeps(), trials, database.records()


def merged(path: Path, *sources: Path) -> Path:
    with open_for_writing(path) as database:
        database.merge(*sources)
    return path


def test_merge_adds_what_is_new_once(tmp_path: Path) -> None:
    here = fill(tmp_path / "a.db", make_trial("t1"))
    there = fill(tmp_path / "b.db", make_trial("t1"), make_trial("t2", 20.0, race_uid="race2", created_at="2026"))
    with open_for_writing(there) as database:
        database.finish_sweep("s1", "2026", "finished")
    with open_for_writing(here) as database:
        assert [list(database.merge(path).new_trials.values()) for path in (there, there, here)] == [[1], [0], [0]]
        assert [record.trial_uid for record in database.records()] == ["t2"]
        assert [sweep.state for sweep in database.sweeps()] == ["finished"]


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Three files that share a device under three names, a sweep in three states, a trial of three contents, and imported records."""
    paths = []
    for number, (name, state) in enumerate([("", "running"), ("H100", "interrupted"), ("H100 SXM5", "finished")]):
        path = tmp_path / f"shard{number}.db"
        with open_for_writing(path) as database:
            database.add_device(replace(DEVICE, name=name))
            database.add_sweep(SWEEP)
            if number:
                database.finish_sweep("s1", f"202{number}", state)
            other = make_trial(f"t{number}", 30.0 + number, race_uid=f"r{number}", created_at=f"202{number}")
            database.add_trials([make_trial("same"), make_trial("edited", 50.0 + number), other])
            claim = derive_record([make_trial(f"far{number}", 9.0, problem=replace(PROBLEM, rows=number // 2 + 1))])
            database.import_jsonl(write_jsonl([DEVICE, OTHER], [claim, replace(claim, device_uid=OTHER.uid, created_at="2025")]))
        paths.append(path)
    return paths


def test_the_order_of_the_files_does_not_matter(shards: list[Path], tmp_path: Path) -> None:
    results = [contents(merged(tmp_path / f"all{at}.db", *order)) for at, order in enumerate(itertools.permutations(shards))]
    for result in results:
        assert result == results[0]
    devices, sweeps, trials, records = results[0]
    assert [device["name"] for device in devices] == ["MI300X", "H100 SXM5"]
    assert [sweep.state for sweep in sweeps] == ["finished"]
    assert sorted(trial.measurement.median_us for trial in trials) == [30.0, 31.0, 32.0, 50.0, 50.0, 51.0, 52.0]
    assert [record.trial_uid for record in records if record.problem == PROBLEM] == ["edited"]  # of the newest race, 2025-01-01


def test_a_merge_of_merges_is_the_merge(shards: list[Path], tmp_path: Path) -> None:
    a, b, c = shards
    expected = contents(merged(tmp_path / "all.db", a, b, c))
    ab, bc = merged(tmp_path / "ab.db", b, a), merged(tmp_path / "bc.db", b, c)
    assert contents(merged(tmp_path / "abbc.db", bc, ab, bc)) == expected
    assert contents(merged(ab, ab, c, bc)) == expected
    assert contents(merged(a, b, c)) == expected


@pytest.mark.parametrize("local", [True, False], ids=["WAL", "rollback journal"])
def test_a_file_merged_into_itself_is_what_it_was(filled: Path, monkeypatch: pytest.MonkeyPatch, local: bool) -> None:
    if not local:
        monkeypatch.setattr(schema, "is_local", lambda _: False)
        filled = merged(filled.parent / "other.db", filled)
    before = contents(filled)
    assert contents(merged(filled, filled)) == before


def test_evidence_that_contradicts_is_kept_and_told(tmp_path: Path) -> None:
    one = fill(tmp_path / "a.db", make_trial("t1", 50.0), make_trial("edited", 60.0, final=False))
    two = fill(tmp_path / "b.db", make_trial("t2", 40.0, FASTER, race_uid="r2", created_at="2026"), make_trial("edited", 61.0, final=False))
    with open_for_writing(tmp_path / "c.db") as database:
        for _ in range(2):
            told = database.merge(one, two)
            assert told.split_uids == ["edited"]
            ((kept, other),) = told.disputes
            assert (kept.config, kept.median_us, other.config, other.median_us) == (FASTER, 40.0, CONFIG, 50.0)
        assert sorted(trial.measurement.median_us for trial in database.trials(DEVICE.uid)) == [40.0, 50.0, 60.0, 61.0]
        assert database.merge(two).disputes == []


def test_a_damaged_row_is_ignored_and_comes_back_from_an_intact_copy(filled: Path, tmp_path: Path) -> None:
    intact = tmp_path / "intact.db"
    shutil.copy(filled, intact)
    before = contents(intact)
    edit(filled, "UPDATE trial SET median_us = 1.0 WHERE uid = 't1'")
    edit(filled, "UPDATE record SET params = '{}' WHERE trial_uid = 't2'")
    edit(filled, "UPDATE device SET sm_count = 7")
    damaged = contents(filled)
    assert damaged[0] == []
    assert contents(merged(tmp_path / "b.db", filled, intact)) == before
    assert contents(merged(filled, intact)) == before


def test_records_are_derived_anew_whatever_a_file_says(filled: Path, tmp_path: Path) -> None:
    """A record that somebody made up, checksum and all, for a problem that has trials."""
    before = contents(filled)
    with open_for_writing(filled) as database:
        (record, _) = database.records()
        database._insert("record", replace(record, config=FASTER, median_us=0.1, created_at="2099"), "REPLACE")
        assert len(database.records()) == 2
    assert contents(merged(tmp_path / "b.db", filled)) == before
    assert contents(merged(filled)) == before


def test_trials_without_their_sweep_are_evidence_all_the_same(filled: Path, tmp_path: Path) -> None:
    edit(filled, "DELETE FROM sweep")
    assert [len(part) for part in contents(merged(tmp_path / "b.db", filled))] == [1, 0, 2, 2]


@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGES], ids=lambda damage: damage.__name__)
def test_where_one_file_is_bad_none_is_taken_in(filled: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    good, target = fill(tmp_path / "good.db", make_trial("t3")), fill(tmp_path / "target.db", make_trial("t4"))
    damage(filled)
    before = contents(target)
    with open_for_writing(target) as database, pytest.raises(DatabaseError, match=r"a\.db "):
        database.merge(good, filled)
    assert contents(target) == before


def test_records_without_trials_yield_to_those_with(tmp_path: Path) -> None:
    record = derive_record([make_trial("elsewhere", 30.0, created_at="2026")])
    newer = replace(record, created_at="2027", median_us=29.0)
    with open_for_writing(tmp_path / "a.db") as database:
        assert database.import_jsonl(write_jsonl([DEVICE], [record])) == 1
        assert database.import_jsonl(write_jsonl([DEVICE], [newer])) == 1
        assert database.import_jsonl(write_jsonl([DEVICE], [record, newer])) == 0
        assert database.records() == database.records_without_trials() == [newer]
    with open_for_writing(fill(tmp_path / "b.db", make_trial("t1"))) as database:
        assert database.import_jsonl(write_jsonl([DEVICE], [newer])) == 0
        database.merge(tmp_path / "a.db")
        assert [kept.trial_uid for kept in database.records()] == ["t1"]
        assert database.records_without_trials() == []
    with open_for_writing(tmp_path / "c.db") as database:
        database.merge(tmp_path / "a.db")
        assert database.records() == [newer]
        database.merge(fill(tmp_path / "d.db", make_trial("elsewhere", 30.0, created_at="2026")))
        assert database.records() == [record]
        assert database.records_without_trials() == []


def test_export_is_what_import_takes(filled: Path, tmp_path: Path) -> None:
    with open_for_writing(filled) as database:
        database.add_device(OTHER)
        text = database.export("sm_90")
        assert (text, database.export("gfx942")) == (database.export(), "")
    assert text.count("\n") == 3
    with open_for_writing(tmp_path / "b.db") as database:
        assert database.import_jsonl(text) == 2
        assert database.export() == text


FILES = st.integers(0, 2)
TRIALS = st.builds(
    make_trial,
    uid=st.sampled_from("abcdefgh"),  # so few that trials of different content meet under one uid
    median_us=st.sampled_from([50.0, 50.25, 51.0, 40.0]),
    config=st.sampled_from([CONFIG, FASTER]),
    policy=st.sampled_from(["graph", "model-1"]),
    race_uid=st.sampled_from(["r1", "r2"]),
    created_at=st.sampled_from(["2024", "2025"]),
    problem=st.sampled_from([PROBLEM, replace(PROBLEM, cols=64)]),
    final=st.booleans(),
)


class Databases(RuleBasedStateMachine):
    """Three databases beside a model of them: the set of trials each was given, and the newest record offered for each problem."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.paths = [Path(self.folder.name) / f"{at}.db" for at in range(3)]
        self.stores: list[Store] = [open_for_writing(fill(path)) for path in self.paths]
        self.trials: list[set[Trial]] = [set(), set(), set()]
        self.claims: list[dict[tuple, Record]] = [{}, {}, {}]

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        self.folder.cleanup()

    def offer(self, at: int, records: list[Record]) -> None:
        for record in records:
            key = (record.source, record.problem)
            self.claims[at][key] = max(record, self.claims[at].get(key, record), key=lambda r: (r.created_at, r.trial_uid, repr(r)))

    @rule(at=FILES, trials=st.lists(TRIALS, max_size=4))
    def record(self, at: int, trials: list[Trial]) -> None:
        self.stores[at].add_trials(trials)
        self.trials[at].update(trials)

    @rule(first=FILES, other=FILES, into=FILES)
    def merge(self, first: int, other: int, into: int) -> None:
        offered = self.stores[first].records() + self.stores[other].records()
        self.stores[into].merge(self.paths[first], self.paths[other])
        self.trials[into] |= self.trials[first] | self.trials[other]
        self.offer(into, offered)

    @rule(first=FILES, into=FILES)
    def export_and_import(self, first: int, into: int) -> None:
        offered = self.stores[first].records()
        self.stores[into].import_jsonl(self.stores[first].export())
        self.offer(into, offered)

    @rule(at=FILES)
    def reopen(self, at: int) -> None:
        self.stores[at].close()
        self.stores[at] = open_for_writing(self.paths[at])

    @invariant()
    def nothing_is_lost_and_records_are_what_the_trials_say(self) -> None:
        for store, given, claims in zip(self.stores, self.trials, self.claims, strict=True):
            trials = store.trials(DEVICE.uid)
            assert sorted((replace(t, uid=t.uid.partition("~")[0]) for t in trials), key=repr) == sorted(given, key=repr)
            expected = dict(claims)
            for key in {(source_of(t.measurement), t.problem) for t in trials}:
                derived = derive_record(t for t in trials if (source_of(t.measurement), t.problem) == key)
                if derived:
                    expected[key] = derived
            assert {(record.source, record.problem): record for record in store.records()} == expected


TestDatabases = Databases.TestCase
TestDatabases.settings = settings(max_examples=20, stateful_step_count=15, deadline=None)


def test_equal_values_have_equal_checksums() -> None:
    """As SQLite's columns change them: an integer in a column of floats, and NULL for a value that is missing."""
    assert checksum({"a": 2, "b": "x"}) == checksum({"b": "x", "a": 2.0, "c": None})
    assert len({checksum({"a": value}) for value in (2, 3, None, "")}) == 4
