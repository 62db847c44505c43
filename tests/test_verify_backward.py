"""The tuner's verdict on a backward: right results pass, and each kind of wrong one is found."""

import math

import pytest
import torch

from kernels.backward_launch import build_backward_launcher
from kernels.device import current_device
from kernels.variants import candidates
from oracle import DEVICE, DEVICE_INDEX
from tuner.cases import Case
from tuner.verify import Verifier
from tuning_db.model import BACKWARD, Problem

PROBLEM = Problem(BACKWARD, "float32", "float32", "float32", 48, 100)


def case_and_launch(problem=PROBLEM):
    case = Case(problem, DEVICE)
    config = candidates(problem, current_device())[-1]
    return case, build_backward_launcher(config, case.geometry, case.dtypes, DEVICE_INDEX)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float16", "float32"), ("float32", "none")])
@pytest.mark.parametrize("cols", [2, 100])
def test_a_right_gradient_passes(cols, dtypes):
    case, launch = case_and_launch(Problem(BACKWARD, *dtypes, dtypes[0], 48, cols))
    assert Verifier(case).fault(launch) == ""


FAULTS = {
    "a row of dw left out": lambda dx, dw, dy, x: dw.sub_(dy[5] * x[5] * (x[5].square().mean() + 1e-6).rsqrt()),
    "a column of dx off": lambda dx, dw, dy, x: dx[:, 7].mul_(1.001),
    "the mean left out of one row": lambda dx, dw, dy, x: dx[0].copy_(dy[0] * (x[0].square().mean() + 1e-6).rsqrt()),
    "dw unwritten": lambda dx, dw, dy, x: dw[3:4].fill_(math.nan),
    "dx unwritten": lambda dx, dw, dy, x: dx[47, 99:].fill_(math.nan),
    "written beyond dw": lambda dx, dw, dy, x: dw.as_strided((1,), (1,), dw.storage_offset() + dw.numel()).fill_(1.0),
    "written before dx": lambda dx, dw, dy, x: dx.as_strided((1,), (1,), dx.storage_offset() - 1).fill_(1.0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_gradient_is_found(name):
    case, launch = case_and_launch()

    def wrong(dx, dw, dy, x, weight, eps):
        launch(dx, dw, dy, x, weight, eps)
        FAULTS[name](dx, dw, dy, x)

    assert Verifier(case).fault(wrong)


def test_a_set_counts_three_streams():
    case, _ = case_and_launch()
    (tensors,) = case.sets(1, seed=1)
    assert case.set_bytes == 3 * tensors.x.numel() * 4
    assert case.copies == 1.5
    assert tensors.y.isnan().all()
    assert tensors.dw is not None
    assert tensors.dw.isnan().all()
    assert not torch.equal(tensors.x, tensors.dy)
