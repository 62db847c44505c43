"""Which GPUs a sweep takes, on a host that has four of two kinds."""

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from kernels import device as gpus
from stand_ins import DEVICE
from tuner.boards import boards_here, modelled_boards
from tuner.cli import main
from tuner.failure import Failure

OTHER = replace(DEVICE, bandwidth_gbs=4814, name="another fake")
HERE = (DEVICE, DEVICE, OTHER, DEVICE)


@pytest.fixture(autouse=True)
def _four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "gpu_count", lambda: len(HERE))
    monkeypatch.setattr(gpus, "describe", lambda index: HERE[index])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_gpus_of_a_kind_are_one_board() -> None:
    assert [(board.device, board.gpus) for board in boards_here(None)] == [(DEVICE, (0, 1, 3)), (OTHER, (2,))]
    assert [(board.device, board.gpus) for board in boards_here([3, 2, 3])] == [(OTHER, (2,)), (DEVICE, (3,))]
    assert [board.place for board in boards_here(None)] == ["GPUs 0, 1, 3", ""]
    with pytest.raises(Failure, match="there is no GPU 4 here: name some of 0, 1, 2, 3 by --gpus"):
        boards_here([0, 4])


def test_without_gpus_none_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "gpu_count", lambda: 0)
    assert boards_here(None) == []
    with pytest.raises(Failure, match="there is no GPU 0 here: leave out --gpus to compile only"):
        boards_here([0])


def test_architectures_need_no_gpu() -> None:
    (board,) = modelled_boards(["gfx942"], None)
    assert board.architecture is not None
    assert (board.device.arch, board.gpus) == ("gfx942", ())


@pytest.mark.parametrize(
    ("arguments", "uids", "said"),
    [
        ([], [DEVICE.uid], "another fake (GPU 2) is of another kind than GPU 0 and left out"),
        (["--gpus", "all"], [DEVICE.uid, OTHER.uid], ""),
        (["--gpus", "2,3"], [OTHER.uid, DEVICE.uid], ""),
        (["--gpus", "2"], [OTHER.uid], ""),
    ],
)
def test_the_default_is_all_of_the_kind_of_gpu_0(arguments: list[str], uids: list[str], said: str, tmp_path: Path) -> None:
    command = ["sweep", "--rows", "1", "--cols", "512", "--dry-run", "--db", str(tmp_path / "t.sqlite"), *arguments]
    output = CliRunner().invoke(main, command, env={"COLUMNS": "400"}).output
    assert [line.partition("(")[2].partition(")")[0] for line in output.splitlines() if line.startswith("Would measure")] == uids
    assert said in output
    assert said or "another kind" not in output
