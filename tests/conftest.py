"""What every test gets: Triton's interpreter where there is no GPU, a data directory of its own, and no plans of another test."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton, which reads it on import


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-binary", action="store_true", help="compile every binary that can be reached, not a sample (half an hour)")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """For `pytest -n auto`: on a GPU one, since tests that read the clock must have it to themselves."""
    return 1 if HAS_GPU else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm GPU"))


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A database of two trials, which are the records of two problems."""
    from databases import PROBLEM, fill, make_trial

    return fill(tmp_path / "a.db", make_trial("t1"), make_trial("t2", 40.0, problem=replace(PROBLEM, cols=4096)))


@pytest.fixture(autouse=True)
def _own_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the user's settings or database, the shipped records of the GPU it runs on, or what another test looked up."""
    monkeypatch.delenv("RMSNORM_TUNING_DB", raising=False)
    monkeypatch.delenv("RMSNORM_BACKEND", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    from kernels import dispatch
    from kernels.api import forget_plans

    monkeypatch.setattr(dispatch, "shipped_records", lambda _: ([], []))
    forget_plans()
