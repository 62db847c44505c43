"""`python -m tuner verify` with GPU and clock faked: who races against a record, what is said of it, and what --fix does."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kernels import device as gpus
from kernels.heuristic import heuristic_config
from kernels.variants import VARIANTS, candidates, source_hash
from stand_ins import DEVICE as H100
from stand_ins import SLOW_US, TORCH_US, Lab, faked
from tuner import cli
from tuner.boards import Board
from tuner.recheck import RIVALS, Recheck, race_again, records_in_use, sampled
from tuning_db.lookup import RecordIndex
from tuning_db.model import (
    Config,
    Measurement,
    Problem,
    Record,
    Role,
    Source,
    Status,
    Sweep,
    Trial,
)
from tuning_db.store import open_for_writing

PROBLEM = Problem("rmsnorm", "bfloat16", "bfloat16", "bfloat16", 128, 4096)
OTHER = replace(PROBLEM, cols=8192)
GUESS = heuristic_config(PROBLEM, H100)
HELD, FASTER, *REST = [config for config in candidates(PROBLEM, H100) if config.variant == "multi_row"]


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    return faked(monkeypatch)


def record_of(config: Config, problem: Problem = PROBLEM, us: float = 10.0, **changes: object) -> Record:
    revision, source = VARIANTS[config.variant].REVISION, source_hash(config.variant)
    made = Record(
        *(H100.uid, problem, config, Source.MEASURED, "graph", us, us, us, 0.9, None, None),
        *(revision, source, "3.6.0", "2.11.0", "2026-01-01", "trial"),
    )
    return replace(made, **changes)


def trials_of(times_us: Mapping[Config, float], problem: Problem = PROBLEM) -> list[Trial]:
    """One elimination race."""
    return [
        Trial(
            *(f"{problem} {config}", "s", "race", H100.uid, problem, config, Role.CANDIDATE, Status.OK, False, "2026-01-01"),
            *(VARIANTS[config.variant].REVISION, "", "3.6.0", "2.11.0"),
            measurement=Measurement("graph", us, us, us, 0.9, 9),
        )
        for config, us in times_us.items()
    ]


def rechecked(record: Record, trials: list[Trial] = ()) -> Recheck:
    (one,) = race_again([record], trials, Board(H100, gpus=(0,)), lambda event: None)
    return one


def test_a_record_that_still_wins(lab: Lab) -> None:
    lab.times = {HELD: 10.0}
    one = rechecked(record_of(HELD), trials_of({HELD: 10.0, FASTER: 11.0}))
    assert (one.fastest, one.loss, one.holds, one.fault) == (HELD, 0.0, True, "")
    assert one.times_us[Config.of("torch")] == TORCH_US


@pytest.mark.parametrize(("now_us", "holds"), [(9.95, True), (9.5, False)])
def test_a_rival_of_the_sweep_wins_by_more_than_a_tie(lab: Lab, now_us: float, holds: bool) -> None:
    lab.times = {HELD: 10.0, FASTER: now_us}
    one = rechecked(record_of(HELD), trials_of({HELD: 10.0, FASTER: 10.1}))
    assert one.fastest == FASTER
    assert one.loss == pytest.approx(10.0 / now_us - 1)
    assert one.holds is holds


def test_the_fastest_of_the_trials_race_and_no_others(lab: Lab) -> None:
    crowd = {config: 10.0 + i for i, config in enumerate([FASTER, *REST])}
    one = rechecked(record_of(HELD), trials_of(crowd))
    assert set(list(crowd)[:RIVALS]) <= lab.timed
    assert lab.timed - {"reference", Config.of("torch")} == {HELD, GUESS, one.model, *list(crowd)[:RIVALS]}


@pytest.mark.usefixtures("lab")
def test_without_trials_the_model_names_the_rivals() -> None:
    one = rechecked(record_of(HELD))
    assert one.model in candidates(PROBLEM, H100)
    assert {one.model, HELD, GUESS} <= set(one.times_us)
    assert len(one.times_us) > 4
    assert one.model_loss == pytest.approx(0.0)  # all take SLOW_US
    assert one.times_us[HELD] == SLOW_US


def test_a_wrong_result_is_no_record_and_never_timed(lab: Lab) -> None:
    lab.faults = {HELD: "error is 3 × the tolerance"}
    one = rechecked(record_of(HELD), trials_of({HELD: 10.0, FASTER: 11.0}))
    assert (one.loss, one.holds, one.fault) == (None, False, "wrong: error is 3 × the tolerance")
    assert HELD not in lab.timed


def test_what_breaks_the_gpu_is_left_out_from_then_on_and_said(lab: Lab) -> None:
    lab.crash = HELD
    again = record_of(HELD, replace(PROBLEM, rows=256))
    board = Board(H100, gpus=(0,))
    for one in race_again([record_of(HELD), again], trials_of({HELD: 10.0, FASTER: 11.0}), board, lambda event: None):
        assert (one.loss, one.holds, one.fault) == (None, False, "crashed: CUDA error: an illegal memory access")
        assert GUESS in one.times_us


def test_pytorch_as_a_record_is_held_against_kernels(lab: Lab) -> None:
    lab.times = {FASTER: TORCH_US / 2}
    one = rechecked(replace(record_of(HELD), config=Config.of("torch")))
    assert one.loss is not None
    assert one.loss > 0


def test_only_what_the_dispatcher_uses_is_checked() -> None:
    records = [
        record_of(HELD),
        record_of(HELD, replace(PROBLEM, rows=256), source=Source.MODELLED),
        record_of(HELD, replace(PROBLEM, rows=512), revision=99),
        record_of(HELD, replace(PROBLEM, x_dtype="float16")),
    ]
    index = RecordIndex([("a file", [H100], records)])
    assert records_in_use(index, H100, lambda problem: problem.x_dtype == "bfloat16") == records[:1]
    assert records_in_use(RecordIndex([]), H100, lambda problem: True) == []


def test_a_sample_is_the_same_each_time_and_in_order() -> None:
    records = [record_of(HELD, replace(PROBLEM, cols=cols)) for cols in range(1, 101)]
    some = sampled(records, 10)
    assert some == sampled(records, 10)
    assert len(set(some)) == 10
    assert [records.index(record) for record in some] == sorted(records.index(record) for record in some)
    assert sampled(records, 1000) == records


def invoke(monkeypatch: pytest.MonkeyPatch, path: Path, *arguments: str, columns: int = 80) -> Result:
    with open_for_writing(path) as store:
        store.add_device(H100)
        store.add_sweep(Sweep("s", H100.uid, "2026", "", "host", "[]", "finished", "3.6.0", "2.11.0"))
        final = [replace(t, uid=f"{t.uid} final", final=True) for t in trials_of({HELD: 10.0}) + trials_of({GUESS: 10.0}, OTHER)]
        store.add_trials([*trials_of({HELD: 10.0, FASTER: 10.2}), *final])
    monkeypatch.setattr(gpus, "has_gpu", lambda: True)
    monkeypatch.setattr(gpus, "describe", lambda index: H100)
    return CliRunner().invoke(cli.main, ["verify", "--db", str(path), *arguments], env={"COLUMNS": str(columns)})


@pytest.mark.parametrize("columns", [80, 160])
def test_the_command_names_what_fell_and_by_how_much(lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, columns: int) -> None:
    lab.times = {HELD: 10.0, FASTER: 8.0, GUESS: 12.0}
    result = invoke(monkeypatch, tmp_path / "t.sqlite", columns=columns)
    assert result.exit_code == 1, result.output
    assert "25.0" in result.output
    assert "1 of 2 records (50.0 %)" in result.output
    assert max(map(len, result.output.splitlines())) <= columns


def test_the_command_ends_well_where_all_hold(lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lab.times = {HELD: 10.0, GUESS: 10.0}
    result = invoke(monkeypatch, tmp_path / "t.sqlite", "--all", "--json")
    assert result.exit_code == 0, result.output
    (one, _) = json.loads(result.stdout)["records"]
    assert (one["holds"], one["loss"], one["times"][0]["median_us"]) == (True, 0.0, 10.0)


def test_fix_tunes_what_fell_and_nothing_else(lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lab.times = {HELD: 10.0, FASTER: 8.0, GUESS: 8.0}
    path = tmp_path / "t.sqlite"
    result = invoke(monkeypatch, path, "--fix")
    assert result.exit_code == 0, result.output
    with open_for_writing(path) as store:
        records = {record.problem: record for record in store.records(H100.uid)}
        assert len(store.sweeps()) == 2
        assert {trial.problem for trial in store.trials(H100.uid) if trial.sweep_uid != "s"} == {PROBLEM}
    assert records[PROBLEM].median_us == 8.0
    assert records[OTHER].median_us == 10.0


def test_a_sample_of_nothing_and_no_gpu_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = invoke(monkeypatch, tmp_path / "t.sqlite", "--cols", "7")
    assert (result.exit_code, "with --cols 7: sweep first" in result.output) == (1, True)
    monkeypatch.setattr(gpus, "has_gpu", lambda: False)
    result = CliRunner().invoke(cli.main, ["verify"])
    assert (result.exit_code, "there is no GPU here" in result.output) == (1, True)
