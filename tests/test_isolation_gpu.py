"""On a GPU: a config that breaks the context and one that never ends cost their workers; a sweep on several GPUs is one sweep."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hostile_sweep import HOSTILE, PROBLEMS
from kernels.device import describe
from tuner.fleet import FAULTS
from tuner.tuning import TORCH
from tuning_db.model import ANY_ROWS, Status
from tuning_db.store import open_for_reading

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[1]


def run_python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def words(text: str) -> str:
    """Text as it was before it was wrapped to the width of a terminal."""
    return " ".join(text.split())


def test_hostile_configs_cost_their_workers_and_are_not_tried_again(tmp_path: Path) -> None:
    database = tmp_path / "tuning.sqlite"
    output = run_python(str(ROOT / "tests" / "hostile_sweep.py"), str(database))
    assert output.splitlines()[-1] == "context: False"
    with open_for_reading(database) as store:
        faults = {trial.config.variant: trial for trial in store.trials_with(describe(0).arch, FAULTS)}
        assert set(faults) == set(HOSTILE)
        assert (faults["trapping_variant"].status, faults["spinning_variant"].status) == (Status.CRASHED, Status.TIMED_OUT)
        assert "illegal memory access" in faults["trapping_variant"].error
        assert {record.problem for record in store.records() if record.problem.rows != ANY_ROWS} == set(PROBLEMS)
        assert all(record.config != TORCH for record in store.records())
        assert [sweep.state for sweep in store.sweeps()] == ["finished"]
        uids = {trial.uid for trial in faults.values()}
    output = run_python(str(ROOT / "tests" / "hostile_sweep.py"), str(database))
    with open_for_reading(database) as store:
        assert {trial.uid for trial in store.trials_with(describe(0).arch, FAULTS)} == uids
        assert [sweep.state for sweep in store.sweeps()] == ["finished"] * 2
    assert f"Not tried again on {describe(0).arch}" in words(output)


def test_two_gpus_share_a_sweep(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2 or describe(0) != describe(1):
        pytest.skip("needs two GPUs of one kind")
    database = tmp_path / "tuning.sqlite"
    command = ("sweep", "--gpus", "0,1", "--cols", "512,4096", "--rows", "1,64,1024,4096", "--db", str(database))
    assert " on GPUs 0, 1." in words(run_python("-m", "tuner", *command))
    with open_for_reading(database) as store:
        assert len(store.records(describe(0).uid)) == 8
        races = {(trial.problem, trial.race_uid) for trial in store.trials(describe(0).uid)}
    assert len(races) == 8  # each problem on one GPU, once
