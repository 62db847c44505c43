"""What NVIDIA's driver says of its GPUs, without torch, which takes seconds to import and one to set up a GPU for work."""

from __future__ import annotations

import ctypes
import functools

from tuning_db.model import Device

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


class DriverError(RuntimeError):
    """The driver refuses; the text says what, with its number for the reason."""


@functools.cache
def driver_version() -> int:
    """The newest CUDA that NVIDIA's driver serves: 12030 is 12.3. 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def first_nvidia_device() -> Device | None:
    """The fingerprint of GPU 0, or None where there is no NVIDIA GPU or no driver."""
    try:
        return nvidia_device(0)
    except (OSError, DriverError):
        return None


def nvidia_device(index: int) -> Device:
    """The fingerprint of a GPU. Raises OSError without the driver's library, DriverError without such a GPU."""
    driver = ctypes.CDLL("libcuda.so.1")

    def ask(function: str, *arguments: object) -> None:
        error = getattr(driver, function)(*arguments)
        if error:
            raise DriverError(f"{function} of the CUDA driver fails with error {error} for GPU {index}")

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
        bandwidth_gbs=bandwidth_gbs(found["clock_khz"], found["bus_bits"]),
        warp_size=found["warp_size"],
        name=name.value.decode(),
    )


def bandwidth_gbs(clock_khz: int, bus_bits: int) -> int:
    """Memory clock × 2 (double data rate) × bus width, in 10^9 bytes/s."""
    return round(clock_khz * 1e3 * 2 * bus_bits / 8 / 1e9)
