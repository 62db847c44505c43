"""The spaces as `triton.autotune` sees them: what it prunes for a call is what the tuner and the dispatcher call illegal."""

import inspect

import pytest
import torch

from benchmarks.first_call_child import autotune_arguments
from kernels.device import INTERPRETER, current_device, interpreting
from kernels.geometry import geometry_of
from kernels.variants import VARIANTS, candidates, cluster_row, jit_function
from kernels.variants.common import config_params
from oracle import DEVICE, dtype_names
from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, Config

CALLS = {
    "whole_row": ((64, 4096), 1),
    "multi_row": ((640, 128), 1),
    "looped": ((4, 5000), 1),
    "split_row": ((4, 40_000), 1),
    "cluster_row": ((4, 40_000), 1),
    "strided_axis": ((3, 100, 64), 1),
    "backward_whole_row": ((64, 4096), 1),
    "backward_multi_row": ((640, 128), 1),
    "backward_split_row": ((4, 4096), 1),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "op"), [(name, op) for name, variant in VARIANTS.items() for op in variant.OPS])
def test_autotune_keeps_the_legal_configs(name, op, weighted, monkeypatch):
    if interpreting():  # where the dispatcher never picks it
        monkeypatch.setattr(cluster_row, "ARCHES", (INTERPRETER.arch,))
    shape, axis = CALLS[name]
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.empty(shape[axis], device=DEVICE) if weighted else None
    geometry = geometry_of(x.shape, x.stride(), x.stride(), axis)
    kernel = VARIANTS[name].kernel
    arguments = {"y_ptr": x, "dx_ptr": x, "dy_ptr": x, "x_ptr": x, "w_ptr": weight, **geometry.arguments()}
    if op in (ADD_FORWARD, ADD_BACKWARD):
        arguments |= {"addend_ptr": x, "sum_ptr": x, "dsum_ptr": x}
    arguments = {argument: value for argument, value in arguments.items() if argument in jit_function(name).arg_names}
    kept = {Config.of(name, **config_params(config)) for config in kernel.early_config_prune(kernel.configs, arguments)}
    legal = candidates(geometry.problem(*dtype_names(x, weight, x), op=op), current_device())
    assert kept == {config for config in legal if config.variant == name}
    assert 0 < len(kept) < len(kernel.configs)


def test_the_first_call_that_autotunes_has_every_argument():
    x = torch.empty((64, 4096), dtype=torch.bfloat16, device=DEVICE)
    kernel, function = VARIANTS["whole_row"].kernel, jit_function("whole_row")
    positional, constexprs = autotune_arguments(x, x, x[0])
    known = {*function.arg_names[: len(positional)], *constexprs, *kernel.fn.values, *kernel.configs[0].kwargs}
    parameters = inspect.signature(function.fn).parameters.values()
    assert known == {parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty}
    kept = kernel.early_config_prune(kernel.configs, dict(zip(function.arg_names, positional, strict=False)))
    assert 0 < len(kept) < len(kernel.configs)
