"""What PyTorch runs for a Problem, as a sweep times it beside the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kernels.reference import rmsnorm_backward_torch, rmsnorm_torch
from tuner.cases import EPS, Case, Tensors


def torch_baseline(case: Case, sets: Sequence[Tensors]) -> Callable[[Tensors], Any]:
    """PyTorch's forward; or the backward that its autograd calls for F.rms_norm, with what its forward saves made for `sets` beforehand.

    Where weight and x differ in dtype, and where torch has no such function, the formula's operations.
    """
    if not case.is_backward:
        return lambda tensors: rmsnorm_torch(tensors.x, tensors.weight, EPS, case.axis)
    problem = case.problem
    if problem.w_dtype not in ("none", problem.x_dtype) or not hasattr(torch.ops.aten, "_fused_rms_norm_backward"):

        def operations(tensors: Tensors) -> Any:
            assert tensors.dy is not None
            return rmsnorm_backward_torch(tensors.dy, tensors.x, tensors.weight, EPS, case.axis)

        return operations
    backward = torch.ops.aten._fused_rms_norm_backward
    shape = [problem.cols]
    rstds = {tensors.x.data_ptr(): torch.ops.aten._fused_rms_norm(tensors.x, shape, tensors.weight, EPS)[1] for tensors in sets}

    def launch(tensors: Tensors) -> Any:
        wanted = [True, tensors.weight is not None]
        return backward(tensors.dy, tensors.x, shape, rstds[tensors.x.data_ptr()], tensors.weight, wanted)

    return launch
