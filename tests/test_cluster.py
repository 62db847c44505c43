"""A sweep over Ray: on a real local cluster that loses a process and a node; and what is said where there is no Ray, or no cluster."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tuner.cli import main
from tuning_db.model import Source, Status
from tuning_db.store import open_for_reading

ROOT = Path(__file__).parents[1]
HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="needs Ray: pip install ray")


def run_python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """A process outside of Triton's interpreter."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**kept, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False)


@needs_ray
def test_a_cluster_that_loses_a_process_and_a_node_ends_the_sweep_well(tmp_path: Path) -> None:
    from cluster_sweep import PROBLEMS

    database = tmp_path / "tuning.sqlite"
    done = run_python(str(ROOT / "tests" / "cluster_sweep.py"), str(database))
    assert done.returncode == 0, done.stderr
    assert "killed 1 of 2 actors" in done.stdout
    assert "removed 1 of 2 nodes" in done.stdout
    with open_for_reading(database) as store:
        assert sorted((record.problem, record.source) for record in store.records()) == sorted((p, Source.MODELLED) for p in PROBLEMS)
        (device,) = store.devices()
        for problem in PROBLEMS:
            trials = store.trials(device.uid, problem)
            assert {trial.status for trial in trials} == {Status.OK}
            assert len({trial.race_uid for trial in trials}) == 1
        assert [sweep.state for sweep in store.sweeps()] == ["finished"]


@needs_ray
def test_an_address_where_no_cluster_is_gets_one_line() -> None:
    done = run_python("-m", "tuner", "sweep", "--arch", "sm_90", "--ray", "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "Error: no Ray cluster answers at 127.0.0.1:1: `ray start --head` starts one"


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = CliRunner().invoke(main, ["sweep", "--arch", "sm_90", "--ray", "auto"])
    assert result.exit_code == 1
    assert result.stderr == "Error: this command needs Ray, which is not installed here: `pip install ray`\n"
