"""The only module that asks a GPU or a driver anything."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

import torch

from tuning_db.model import Device

INTERPRETER = Device(arch="interpreter", sm_count=4, l2_bytes=0, shared_bytes=2**30, bandwidth_gbs=0, name="Triton's interpreter")
"""Stands for the CPU under TRITON_INTERPRET=1."""


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


def has_gpu() -> bool:
    return torch.cuda.is_available()


def gpu_count() -> int:
    return torch.cuda.device_count() if has_gpu() else 0


@functools.cache
def describe(index: int) -> Device:
    """The fingerprint of GPU `index`. Bandwidth is memory clock × 2 (double data rate) × bus width."""
    if torch.version.hip is None:
        return _describe_nvidia(index)
    properties = torch.cuda.get_device_properties(index)
    return Device(
        arch=properties.gcnArchName.partition(":")[0],
        sm_count=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
        shared_bytes=properties.shared_memory_per_block,
        bandwidth_gbs=_bandwidth_gbs(properties.memory_clock_rate, properties.memory_bus_width),
        warp_size=properties.warp_size,
        name=properties.name,
    )


CUDA_ATTRIBUTES = {
    "warp_size": 10,
    "sm_count": 16,
    "clock_khz": 36,
    "bus_bits": 37,
    "l2_bytes": 38,
    "major": 75,
    "minor": 76,
    "shared_bytes": 97,
}
"""Numbers of `CUdevice_attribute` in the CUDA driver API."""


def _describe_nvidia(index: int) -> Device:
    """By the driver alone: torch would set up the GPU for work first, which takes a second."""
    driver = ctypes.CDLL("libcuda.so.1")

    def ask(function: str, *arguments: object) -> None:
        error = getattr(driver, function)(*arguments)
        if error:
            raise RuntimeError(f"{function} of the CUDA driver fails with error {error} for GPU {index}")

    handle, value, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    ask("cuInit", 0)
    ask("cuDeviceGet", ctypes.byref(handle), index)
    ask("cuDeviceGetName", name, len(name), handle)
    found = {}
    for attribute, number in CUDA_ATTRIBUTES.items():
        ask("cuDeviceGetAttribute", ctypes.byref(value), number, handle)
        found[attribute] = value.value
    return Device(
        arch=f"sm_{found['major']}{found['minor']}",
        sm_count=found["sm_count"],
        l2_bytes=found["l2_bytes"],
        shared_bytes=found["shared_bytes"],
        bandwidth_gbs=_bandwidth_gbs(found["clock_khz"], found["bus_bits"]),
        warp_size=found["warp_size"],
        name=name.value.decode(),
    )


def _bandwidth_gbs(clock_khz: int, bus_bits: int) -> int:
    return round(clock_khz * 1e3 * 2 * bus_bits / 8 / 1e9)


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
