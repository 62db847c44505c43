"""What is asked of GPUs and of torch about them; with `driver.py` the only module that does."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from kernels.driver import bandwidth_gbs, nvidia_device
from kernels.settings import interpreting
from tuning_db.model import Device

INTERPRETER = Device(arch="interpreter", sm_count=4, l2_bytes=0, shared_bytes=2**30, bandwidth_gbs=0, name="Triton's interpreter")
"""Stands for the CPU under TRITON_INTERPRET=1."""

LAST_LEVEL_CACHE_BYTES = {"gfx942": 256 * 2**20, "gfx950": 256 * 2**20}
"""AMD's Infinity Cache, which lies behind the L2 that the driver tells of (4 MiB of each die): what is read again may be found there.
The figures of `tuner/architectures.yaml`, which a test holds these to; that file is not for the runtime."""


def has_gpu() -> bool:
    return torch.cuda.is_available()


def gpu_count() -> int:
    return torch.cuda.device_count() if has_gpu() else 0


@functools.cache
def describe(index: int) -> Device:
    """The fingerprint of GPU `index`."""
    if torch.version.hip is None:
        return nvidia_device(index)
    properties = torch.cuda.get_device_properties(index)
    arch = properties.gcnArchName.partition(":")[0]
    return Device(
        arch=arch,
        sm_count=properties.multi_processor_count,
        l2_bytes=LAST_LEVEL_CACHE_BYTES.get(arch, properties.L2_cache_size),
        shared_bytes=properties.shared_memory_per_block,
        bandwidth_gbs=bandwidth_gbs(properties.memory_clock_rate, properties.memory_bus_width),
        warp_size=properties.warp_size,
        name=properties.name,
    )


def current_device() -> Device:
    """The fingerprint of the current GPU, or of the interpreter."""
    return INTERPRETER if interpreting() else describe(torch.cuda.current_device())


def cuda_version() -> str:
    """Version of the CUDA or ROCm that this torch was built for, `none` for a CPU build."""
    return torch.version.cuda or torch.version.hip or "none"


@functools.cache
def _capture_info() -> Callable[[int], int | None]:
    """A function that tells which capture a stream is in, by the driver's own number for it; None where the driver can't say."""
    library, symbol = ("libcuda.so.1", "cuStreamGetCaptureInfo_v2")
    if torch.version.hip is not None:
        library, symbol = ("libamdhip64.so", "hipStreamGetCaptureInfo_v2")
    try:
        function = getattr(ctypes.CDLL(library), symbol)
    except (OSError, AttributeError):
        return lambda stream: None
    function.argtypes = [ctypes.c_void_p] * 6
    function.restype = ctypes.c_int

    def ask(stream: int) -> int | None:
        status, identity = ctypes.c_int(), ctypes.c_uint64()
        error = function(stream, ctypes.byref(status), ctypes.byref(identity), None, None, None)
        return identity.value if error == 0 else None

    return ask


def capture_id(stream: int) -> int | None:
    """A number that names the graph capture that `stream` (a raw handle) is part of; None where the driver can't say."""
    return _capture_info()(stream)
