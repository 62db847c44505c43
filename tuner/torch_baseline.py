"""What PyTorch runs for a Problem, as a sweep times it beside the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kernels.reference import add_rmsnorm_torch, rmsnorm_backward_torch, rmsnorm_torch
from tuner.cases import EPS, Case, Tensors
from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, NO_WEIGHT


def torch_baseline(case: Case, sets: Sequence[Tensors]) -> Callable[[Tensors], Any]:
    """PyTorch's forward; or the backward that its autograd calls for F.rms_norm, with what its forward saves made for `sets` beforehand.

    Where weight and x differ in dtype, and where torch has no such function, the formula's operations. A sum, and a sum's gradient, are
    additions before or after.
    """
    problem = case.problem
    if problem.op == ADD_BACKWARD:
        backward = _backward(case, sets)

        def added(tensors: Tensors) -> Any:
            dx, dw = backward(tensors)
            dx = dx + tensors.dsum
            return dx, dx if tensors.daddend is None else dx.to(tensors.daddend.dtype), dw

        return added
    if problem.op == ADD_FORWARD:

        def sums(tensors: Tensors) -> Any:
            assert tensors.residual is not None
            return add_rmsnorm_torch(tensors.x, tensors.residual, tensors.weight, EPS)

        return sums
    if problem.is_backward:
        return _backward(case, sets)
    return lambda tensors: rmsnorm_torch(tensors.x, tensors.weight, EPS, case.axis)


def _backward(case: Case, sets: Sequence[Tensors]) -> Callable[[Tensors], Any]:
    problem = case.problem
    dtypes = {problem.x_dtype, problem.w_dtype, problem.y_dtype} - {NO_WEIGHT}
    if len(dtypes) > 1 or not hasattr(torch.ops.aten, "_fused_rms_norm_backward"):

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
