"""`benchmark_rmsnorm`: one shape, `rmsnorm` against PyTorch, the quick way."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels import InvalidInput, rmsnorm


def benchmark_rmsnorm(M: int, N: int, warmup: int = 10, repeat: int = 100) -> dict[str, float]:
    """Time `rmsnorm` and `F.rms_norm` on an fp32 (M, N) tensor with weight: `repeat` calls between two events, after `warmup` calls.

    Returns `triton_time` and `torch_time` in seconds a call, `speedup`, `triton_bandwidth` and `torch_bandwidth` in GB/s (x read once,
    y written once). Calls shorter than their host time measure the host; `python -m benchmarks run` tells GPU time.

    Raises InvalidInput without a GPU or if a number is not positive.
    """
    for name, value in (("M", M), ("N", N), ("repeat", repeat)):
        if value < 1:
            raise InvalidInput(f"{name} is {value}; pass a positive number")
    if not torch.cuda.is_available():
        raise InvalidInput("there is no GPU to benchmark; run this on a machine with one")
    x = torch.randn(M, N, device="cuda")
    weight = torch.rand(N, device="cuda")
    triton_time = _seconds(lambda: rmsnorm(x, weight), warmup, repeat)
    torch_time = _seconds(lambda: F.rms_norm(x, (N,), weight, 1e-6), warmup, repeat)
    gigabytes = 2 * x.numel() * x.element_size() / 1e9
    return {
        "triton_time": triton_time,
        "torch_time": torch_time,
        "speedup": torch_time / triton_time,
        "triton_bandwidth": gigabytes / triton_time,
        "torch_bandwidth": gigabytes / torch_time,
    }


def _seconds(call: Callable[[], object], warmup: int, repeat: int) -> float:
    for _ in range(warmup):
        call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeat):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeat
