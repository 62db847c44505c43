"""`python -m tuner sweep --retry` with GPU and clock faked: what crashed is tried again, and left out no longer once it passes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kernels import device as gpus
from kernels.variants import VARIANTS
from stand_ins import CONFIGS, DEVICE, PROBLEMS, Lab, faked, stand_in_station
from tuner import cli
from tuner import sweep as pipeline
from tuner.faults import standing_faults
from tuner.fleet import FAULTS
from tuning_db.model import Measurement, Problem, Status
from tuning_db.store import Store, open_for_reading, open_for_writing

CRASHES, OTHER = CONFIGS[0], CONFIGS[1]
HERE, ELSEWHERE = PROBLEMS[1], PROBLEMS[2]


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    return faked(monkeypatch)


@pytest.fixture
def path(lab: Lab, tmp_path: Path) -> Path:
    """A database of a sweep in which CRASHES crashed on HERE. From now on it does not."""
    lab.crash = CRASHES
    with open_for_writing(tmp_path / "t.sqlite") as store:
        run(lab, store, HERE)
    lab.crash = None
    return tmp_path / "t.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with open_for_writing(path) as opened:
        yield opened


def run(lab: Lab, store: Store, problem: Problem, *, retry: bool = False) -> bool:
    """Sweep a problem; whether CRASHES was tried on it."""
    lab.built.clear()
    pipeline.sweep([problem], DEVICE, None, [stand_in_station(lab)], store, ["sweep"], lambda event: None, None, retry)
    assert OTHER in lab.built
    return CRASHES in lab.built


def test_what_passes_where_it_crashed_is_tried_everywhere_again(lab: Lab, store: Store) -> None:
    assert not run(lab, store, ELSEWHERE)
    assert not run(lab, store, HERE)
    assert run(lab, store, HERE, retry=True)
    assert standing_faults(store, DEVICE.arch) == []
    assert run(lab, store, ELSEWHERE)
    assert len(store.trials_with(DEVICE.arch, FAULTS)) == 1  # what happened stays known


def test_it_is_not_tried_again_where_nothing_crashed(lab: Lab, store: Store) -> None:
    assert not run(lab, store, ELSEWHERE, retry=True)


def test_what_crashes_again_is_left_out_as_before(lab: Lab, store: Store) -> None:
    lab.crash = CRASHES
    assert run(lab, store, HERE, retry=True)
    assert [fault.config for fault in standing_faults(store, DEVICE.arch)] == [CRASHES] * 2
    assert not run(lab, store, ELSEWHERE)


@pytest.mark.parametrize(
    ("changes", "lifts"),
    [
        ({}, True),
        ({"created_at": "2020"}, False),
        ({"config": OTHER}, False),
        ({"problem": ELSEWHERE}, False),
        ({"measurement": Measurement("model-1", 1.0, 1.0, 1.0, 1.0, 1)}, False),
        ({"status": Status.WRONG, "measurement": None}, False),
    ],
    ids=["measured", "before", "another config", "another problem", "modelled", "wrong"],
)
def test_a_later_measurement_of_the_same_alone_lifts_a_fault(store: Store, changes: dict[str, object], lifts: bool) -> None:
    (fault,) = standing_faults(store, DEVICE.arch)
    measured = replace(fault, uid="later", status=Status.OK, created_at="9999", measurement=Measurement("graph", 1.0, 1.0, 1.0, 1.0, 9))
    store.add_trials([replace(measured, **changes)])
    assert standing_faults(store, DEVICE.arch) == ([] if lifts else [fault])


def test_another_board_of_the_architecture_lifts_it_and_a_raised_revision_does(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (fault,) = standing_faults(store, DEVICE.arch)
    with monkeypatch.context() as raised:
        raised.setattr(VARIANTS[CRASHES.variant], "REVISION", fault.revision + 1)
        assert standing_faults(store, DEVICE.arch) == []
    assert standing_faults(store, DEVICE.arch) == [fault]
    smaller = replace(DEVICE, sm_count=114)
    store.add_device(smaller)
    timed = Measurement("graph", 1.0, 1.0, 1.0, 1.0, 9)
    store.add_trials([replace(fault, uid="later", device_uid=smaller.uid, status=Status.OK, created_at="9999", measurement=timed)])
    assert standing_faults(store, DEVICE.arch) == []


def invoke(monkeypatch: pytest.MonkeyPatch, path: Path, *arguments: str, columns: int = 80) -> Result:
    monkeypatch.setattr(gpus, "has_gpu", lambda: True)
    monkeypatch.setattr(gpus, "gpu_count", lambda: 1)
    monkeypatch.setattr(gpus, "describe", lambda index: DEVICE)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return CliRunner().invoke(cli.main, [*arguments, "--db", str(path)], env={"COLUMNS": str(columns)})


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("columns", [80, 160])
def test_the_command_says_what_it_tries_and_what_became_of_it(lab: Lab, path: Path, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    assert "`python -m tuner sweep --retry` tries them again" in words(invoke(monkeypatch, path, "status", columns=columns).stdout)
    lab.crash = CRASHES
    result = invoke(monkeypatch, path, "sweep", "--retry", columns=columns)
    assert result.exit_code == 0, result.output
    assert f"Trying 1 config again that crashed or hung on sm_90: {CRASHES}." in words(result.stdout)
    assert words(result.stdout).endswith(f"Still left out: {CRASHES}.")
    lab.crash = None
    result = invoke(monkeypatch, path, "sweep", "--retry", columns=columns)
    assert result.exit_code == 0, result.output
    passed = f"Passed, and left out no longer: {CRASHES}. `python -m tuner sweep --retune` races them everywhere."
    assert words(result.stdout).endswith(passed)
    assert max(len(line) for line in result.stdout.splitlines() if str(path) not in line) <= columns
    with open_for_reading(path) as store:
        assert {trial.problem for trial in store.trials(DEVICE.uid) if trial.config == OTHER} == {HERE}
    result = invoke(monkeypatch, path, "sweep", "--retry", columns=columns)
    assert (result.exit_code, words(result.stdout).startswith("Nothing to try again: ")) == (0, True)
    assert "Not tried again" not in invoke(monkeypatch, path, "status", columns=columns).stdout


def test_the_command_does_what_it_would_do(lab: Lab, path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lab.built.clear()
    assert "Would measure 1 problem, " in invoke(monkeypatch, path, "sweep", "--retry", "--dry-run").stdout
    assert not lab.built
    for nothing in (["--cols", "7"], ["--op", "add_rmsnorm"]):
        assert words(invoke(monkeypatch, path, "sweep", "--retry", *nothing).stdout).startswith("Nothing to try again: ")
    missing = tmp_path / "none.sqlite"
    assert words(invoke(monkeypatch, missing, "sweep", "--retry").stdout).startswith("Nothing to try again: ")
    assert not missing.exists()


@pytest.mark.parametrize("option", [["--workload", "llm"], ["--arch", "sm_90"], ["--ray", "auto"], ["--shard", "1/2"], ["--retune"]])
def test_what_does_not_go_with_retry_is_wrong_usage(path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str]) -> None:
    result = invoke(monkeypatch, path, "sweep", "--retry", *option)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith(f"leave out {option[0]}")


def test_without_a_gpu_nothing_is_tried_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "has_gpu", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = CliRunner().invoke(cli.main, ["sweep", "--retry", "--db", str(path)])
    assert (result.exit_code, "there is no GPU here, and --retry measures" in result.stderr) == (1, True)
