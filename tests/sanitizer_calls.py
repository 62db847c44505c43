"""Calls every config of every variant on odd inputs, for compute-sanitizer to watch; no test itself.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitizer_calls.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python tests/sanitizer_calls.py

Without PyTorch's memory cache each tensor is an allocation of its own, so that a read one element past it is seen. An argument names
the only variant to call.
"""

from __future__ import annotations

import sys

import torch

from kernels.device import describe
from kernels.geometry import geometry_of
from kernels.variants import VARIANTS, candidates
from tuner.cases import EPS, LAUNCHER_OF
from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, BACKWARD, FORWARD

SHAPES = {
    "whole_row": ((3, 129), (5, 1000), (2, 4097)),
    "multi_row": ((1, 1), (65, 7), (33, 129), (17, 1000)),
    "looped": ((2, 4097), (3, 20001)),
    "split_row": ((2, 4097), (3, 9217), (3, 40001)),
    "cluster_row": ((2, 4097), (3, 9217), (3, 40001)),
    "strided_axis": ((3, 129, 5), (1, 4097, 33), (2, 1000, 64)),
    "backward_whole_row": ((3, 129), (300, 1000), (200, 4097)),
    "backward_multi_row": ((1, 1), (65, 7), (3000, 129), (1700, 1000)),
    "backward_split_row": ((2, 4097), (40, 9217), (30, 40001)),
}


def call(name: str, x: torch.Tensor, axis: int) -> int:
    """Launch every legal config of a variant on x; how many there were."""
    weight = torch.rand(x.shape[axis], device="cuda", dtype=torch.float32)
    y = torch.empty_like(x)  # or dx
    dy = torch.randn_like(y)  # or what is added to x
    total, dw = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda"), torch.empty_like(weight)
    arguments = {
        FORWARD: (y, x, weight, EPS),
        BACKWARD: (y, dw, dy, x, weight, EPS),
        ADD_FORWARD: (y, total, dy, x, weight, EPS),
        ADD_BACKWARD: (y, dw, dy, x, weight, EPS, dy, None),
    }
    geometry = geometry_of(x.shape, x.stride(), y.stride(), axis)
    assert geometry is not None
    dtypes = (str(x.dtype).removeprefix("torch."), "float32", str(x.dtype).removeprefix("torch."))
    launches = 0
    for op in VARIANTS[name].OPS:
        for config in candidates(geometry.problem(*dtypes, op=op), describe(0)):
            if config.variant == name:
                LAUNCHER_OF[op](config, geometry, dtypes, 0)(*arguments[op])
                torch.cuda.synchronize()
                launches += 1
    return launches


def main() -> None:
    """All variants, or the one named; x contiguous, misaligned by one element, and (last axis) as a slice of wider rows."""
    for name in sys.argv[1:] or VARIANTS:
        launches = 0
        for shape in SHAPES[name]:
            axis = 1 if len(shape) == 3 else len(shape) - 1
            for dtype in (torch.bfloat16, torch.float32):
                size = torch.Size(shape).numel()
                launches += call(name, torch.randn(shape, device="cuda").to(dtype), axis)
                launches += call(name, torch.randn(size + 1, device="cuda").to(dtype)[1:].view(shape), axis)
                if axis == len(shape) - 1:
                    launches += call(name, torch.randn(shape[0], shape[1] + 3, device="cuda").to(dtype)[:, : shape[1]], axis)
        print(f"{name}: {launches} launches", flush=True)


if __name__ == "__main__":
    main()
