"""The pipeline of a GPU sweep with every GPU part faked: what is built, verified, timed, recorded, and in which order."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kernels.heuristic import heuristic_config
from kernels.variants import VARIANTS, candidates
from stand_ins import CONFIGS, COPY_US, DEVICE, PROBLEMS, SLOW_US, TORCH_US, FakePool, InProcess, Lab, faked, stand_in_station
from tuner import sweep as pipeline
from tuner import tuning
from tuner.compiling import Compiled
from tuner.events import Event, Faulted, Finished, Started
from tuner.failure import Failure
from tuner.station import LocalStation
from tuner.tuning import TORCH
from tuner.unfinished import unfinished
from tuning_db.errors import DatabaseError
from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, ANY_ROWS, BACKWARD, Config, Problem, Record, Role, Source, Status
from tuning_db.store import Store, open_for_writing

FIRST, SECOND, BAD = CONFIGS[0], CONFIGS[1], CONFIGS[2]


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    return faked(monkeypatch)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_for_writing(tmp_path / "tuning.sqlite") as opened:
        yield opened


def run(lab: Lab, store: Store, problems: list[Problem] = PROBLEMS[1:2], watch: Any = None, budget_s: float | None = None) -> list[Record]:
    station = stand_in_station(lab)
    pipeline.sweep(problems, DEVICE, None, [station], store, ["sweep"], watch or (lambda event: None), budget_s)
    return [record for record in store.records(DEVICE.uid) if record.problem.rows != ANY_ROWS]


def test_the_winner_is_recorded_with_what_it_beat(lab: Lab, store: Store) -> None:
    lab.times = {FIRST: 10.0, heuristic_config(PROBLEMS[1], DEVICE): 12.0}
    (record,) = run(lab, store)
    assert (record.config, record.source) == (FIRST, Source.MEASURED)
    assert (record.median_us, record.heuristic_us, record.torch_us) == (10.0, 12.0, TORCH_US)
    assert record.copy_fraction == pytest.approx(COPY_US / 10.0)
    trials = store.trials(DEVICE.uid, PROBLEMS[1])
    assert {trial.config for trial in trials} == {*candidates(PROBLEMS[1], DEVICE), TORCH}
    assert {trial.role for trial in trials if trial.final} == {Role.CANDIDATE, Role.HEURISTIC, Role.TORCH}
    assert next(trial for trial in trials if trial.uid == record.trial_uid).final


@pytest.mark.parametrize(("op", "streams"), [(BACKWARD, 3), (ADD_FORWARD, 4), (ADD_BACKWARD, 4)])
def test_an_op_is_built_as_one_and_held_against_its_streams(lab: Lab, store: Store, op: str, streams: int) -> None:
    problem = replace(PROBLEMS[1], op=op)
    (record,) = run(lab, store, [problem])
    assert lab.built == set(candidates(problem, DEVICE))
    assert lab.built_ops == {op}
    assert record.problem == problem
    assert record.copy_fraction == pytest.approx(streams / 2 * COPY_US / record.median_us)


def test_the_heuristic_is_in_the_final_however_slow(lab: Lab, store: Store) -> None:
    lab.times = {config: 10.0 for config in CONFIGS}
    (record,) = run(lab, store)
    assert record.heuristic_us == SLOW_US


def test_pytorch_can_win(lab: Lab, store: Store) -> None:
    lab.times = dict.fromkeys(candidates(PROBLEMS[1], DEVICE), TORCH_US * 1.02)
    assert run(lab, store)[0].config == TORCH


def test_a_wrong_result_is_recorded_and_never_timed(lab: Lab, store: Store) -> None:
    lab.times = {BAD: 1.0, FIRST: 10.0}
    lab.faults = {BAD: "error is 3 × the tolerance"}
    events: list[Any] = []
    (record,) = run(lab, store, watch=events.append)
    assert record.config == FIRST
    assert BAD in lab.built
    assert BAD not in lab.timed
    (trial,) = (trial for trial in store.trials(DEVICE.uid) if trial.config == BAD)
    assert (trial.status, trial.error, trial.measurement) == (Status.WRONG, "error is 3 × the tolerance", None)
    assert events[-1].failed == 1


@pytest.mark.parametrize("status", [Status.COMPILE_ERROR, Status.OUT_OF_RESOURCES])
def test_what_does_not_compile_is_recorded_and_never_built(lab: Lab, store: Store, status: Status) -> None:
    lab.compiled = {"looped": Compiled(status, None, "no")}
    run(lab, store)
    broken = {config for config in candidates(PROBLEMS[1], DEVICE) if config.variant == "looped"}
    assert broken
    assert not broken & (lab.built | lab.timed)
    assert {trial.config for trial in store.trials(DEVICE.uid) if trial.status is status} == broken


def test_what_stalls_the_compiler_is_recorded_once_and_not_compiled_again(lab: Lab, store: Store) -> None:
    lab.compiled = {"looped": Compiled(Status.TIMED_OUT, error="compiling: no sign of life for 120 s")}
    (record,) = run(lab, store)
    stalled = store.trials_with(DEVICE.arch, (Status.TIMED_OUT,))
    assert {trial.config.variant for trial in stalled} == {"looped"}
    pool: Any = FakePool(lab.compiled)
    station: Any = LocalStation(pool, InProcess(lab))  # type: ignore[arg-type]
    pipeline.sweep([record.problem], DEVICE, None, [station], store, [], lambda event: None, None)
    variants = {binary.variant for binary in pool.submitted}
    assert variants
    assert "looped" not in variants
    assert store.trials_with(DEVICE.arch, (Status.TIMED_OUT,)) == stalled


def test_where_no_config_gets_through_pytorch_is_the_winner(lab: Lab, store: Store) -> None:
    lab.faults = dict.fromkeys(candidates(PROBLEMS[1], DEVICE), "wrote outside its output")
    events: list[Any] = []
    (record,) = run(lab, store, watch=events.append)
    assert record.config == Config.of("torch")
    assert events[-1] == Finished(PROBLEMS[1], record, len(lab.built) + 1, len(lab.built))


def test_a_crash_is_recorded_and_left_out_from_then_on(lab: Lab, store: Store) -> None:
    lab.crash = FIRST
    events: list[Event] = []
    records = run(lab, store, PROBLEMS[1:3], events.append)
    (trial,) = (trial for trial in store.trials(DEVICE.uid) if trial.status is Status.CRASHED)
    assert (trial.config, trial.problem, trial.error) == (FIRST, PROBLEMS[1], "CUDA error: an illegal memory access")
    assert [record.problem for record in records] == PROBLEMS[1:3]
    assert [sweep.state for sweep in store.sweeps()] == ["finished"]
    assert events.count(Faulted(trial)) == 1
    (finished,) = (event for event in events if isinstance(event, Finished) and event.problem == PROBLEMS[1])
    assert (finished.trials, finished.failed) == (len(store.trials(DEVICE.uid, PROBLEMS[1])), 1)
    lab.built.clear()
    run(lab, store, PROBLEMS)
    assert lab.built
    assert FIRST not in lab.built


def test_a_crash_bars_a_config_on_its_architecture_and_at_its_revision(lab: Lab, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.crash = FIRST
    run(lab, store)
    lab.crash = None
    same_arch, other_arch = replace(DEVICE, sm_count=114), replace(DEVICE, arch="sm_100")
    for device, tried in ((same_arch, False), (other_arch, True)):
        lab.built.clear()
        monkeypatch.setattr(tuning, "describe", lambda index, device=device: device)
        station = stand_in_station(lab)
        pipeline.sweep(PROBLEMS[1:2], device, None, [station], store, [], lambda event: None, None)
        assert (FIRST in lab.built) is tried
    monkeypatch.setattr(tuning, "describe", lambda index: DEVICE)
    monkeypatch.setattr(VARIANTS[FIRST.variant], "REVISION", VARIANTS[FIRST.variant].REVISION + 1)
    lab.built.clear()
    run(lab, store)
    assert FIRST in lab.built


def test_a_gpu_of_another_kind_is_never_measured(lab: Lab, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "describe", lambda index: replace(DEVICE, sm_count=114))
    with pytest.raises(Failure, match=r"this GPU is a sm_90-114sm.*, not a sm_90-132sm"):
        run(lab, store)
    assert not lab.built
    assert store.records() == []


def test_an_incumbent_stays_inside_the_tie_band_and_falls_beyond(lab: Lab, store: Store) -> None:
    lab.times = {FIRST: 10.0}
    run(lab, store)
    lab.times = {FIRST: 10.0, SECOND: 9.95}
    (record,) = run(lab, store)
    assert (record.config, record.median_us) == (FIRST, 10.0)
    assert Role.INCUMBENT in {trial.role for trial in store.trials(DEVICE.uid) if trial.config == FIRST}
    lab.times = {FIRST: 10.0, SECOND: 9.85}
    assert run(lab, store)[0].config == SECOND


def test_a_slower_incumbent_races_again_and_its_old_luck_is_forgotten(lab: Lab, store: Store) -> None:
    lab.times = {FIRST: 5.0}
    run(lab, store)
    lab.times = {FIRST: 15.0, SECOND: 10.0}
    (record,) = run(lab, store)
    assert (record.config, record.median_us) == (SECOND, 10.0)


def test_an_interrupted_sweep_goes_on_where_it_stopped(lab: Lab, store: Store) -> None:
    lab.times = {FIRST: 10.0}

    def interrupt(event: Event) -> None:
        if isinstance(event, Finished):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lab, store, PROBLEMS, interrupt)
    assert [record.problem for record in store.records()] == PROBLEMS[:1]  # and none for any number of rows yet
    assert {trial.problem for trial in store.trials(DEVICE.uid)} == {PROBLEMS[0]}
    rest = unfinished(PROBLEMS, store.records(), Source.MEASURED, DEVICE)
    assert rest == PROBLEMS[1:]
    assert {record.problem for record in run(lab, store, rest)} == set(PROBLEMS)
    assert unfinished(PROBLEMS, store.records(), Source.MEASURED, DEVICE) == []
    assert [sweep.state for sweep in store.sweeps()] == ["interrupted", "finished"]


def test_the_config_for_any_number_of_rows_is_recorded_once_all_are_measured(lab: Lab, store: Store) -> None:
    lab.times = {FIRST: 15.0, SECOND: 10.0}
    run(lab, store, PROBLEMS)
    (record,) = (record for record in store.records(DEVICE.uid) if record.problem.rows == ANY_ROWS)
    assert (record.config, record.median_us) == (SECOND, pytest.approx(10.0))
    assert record.problem == replace(PROBLEMS[0], rows=ANY_ROWS)


def test_a_clock_that_was_set_back_makes_no_race_older(lab: Lab, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.times = {FIRST: 10.0}
    run(lab, store)
    for year in ("2020", "2010"):
        monkeypatch.setattr("tuner.trials.now", lambda year=year: f"{year}-01-01T00:00:00.000000+00:00")
        lab.times = {FIRST: 15.0 if year == "2020" else 12.0, SECOND: 10.0 if year == "2020" else 11.0}
        (record,) = run(lab, store)
        assert record == store.records(DEVICE.uid)[0]
        assert (record.config, record.median_us) == (SECOND, lab.times[SECOND])


def test_a_full_disk_ends_a_sweep_that_goes_on_later(lab: Lab, store: Store) -> None:
    lab.times = {FIRST: 10.0}

    def fill_the_disk(event: Event) -> None:
        if isinstance(event, Finished):
            (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
            store._connection.execute(f"PRAGMA max_page_count = {pages}")

    with pytest.raises(DatabaseError, match="free some space"):
        run(lab, store, PROBLEMS, fill_the_disk)
    assert [record.problem for record in store.records()] == PROBLEMS[:1]
    assert {trial.problem for trial in store.trials(DEVICE.uid)} == {PROBLEMS[0]}
    store._connection.execute("PRAGMA max_page_count = 1000000")
    assert {record.problem for record in run(lab, store, unfinished(PROBLEMS, store.records(), Source.MEASURED, DEVICE))} == set(PROBLEMS)


def test_the_budget_ends_between_two_problems(lab: Lab, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def tick(event: Event) -> None:
        clock[0] += isinstance(event, Started)

    monkeypatch.setattr(pipeline, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    assert {record.problem for record in run(lab, store, PROBLEMS, tick, budget_s=1.5)} == set(PROBLEMS[:2])
    assert [sweep.state for sweep in store.sweeps()] == ["finished"]


def test_records_of_other_kernels_are_not_done(lab: Lab, store: Store) -> None:
    lab.times = {FIRST: 10.0}
    (record,) = run(lab, store)
    problems = [record.problem]
    changed = {"revision": record.revision + 1, "source_hash": "other", "triton_version": "0", "config": Config.of("gone")}
    for name, value in changed.items():
        old = Record(**{**vars(record), name: value})
        assert unfinished(problems, [old], Source.MEASURED, DEVICE) == problems, name
    assert unfinished(problems, [record], Source.MEASURED, DEVICE) == []
    assert unfinished(problems, [record], Source.MODELLED, DEVICE) == problems
