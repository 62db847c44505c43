"""The table of architectures: a usual board of each, for work without the GPU itself."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

import yaml
from triton.backends.compiler import GPUTarget

from tuning_db.model import Device


@dataclass(frozen=True)
class Architecture:
    """A usual board, what of it is no part of a Device, and the compiler's name for it."""

    device: Device
    registers_per_sm: int
    threads_per_sm: int
    programs_per_sm: int
    target: GPUTarget


@functools.cache
def architectures() -> dict[str, Architecture]:
    """All known architectures by name (`sm_90`, `gfx942`)."""
    table = yaml.safe_load((resources.files("tuner") / "architectures.yaml").read_text(encoding="utf-8"))
    return {arch: _architecture(arch, row) for arch, row in table.items()}


def target_of(arch: str, warp_size: int) -> GPUTarget:
    """Triton's compile target for an architecture."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), warp_size)
    return GPUTarget("hip", arch, warp_size)


def _architecture(arch: str, row: dict[str, int | str]) -> Architecture:
    numbers = {name: int(value) for name, value in row.items() if name not in ("name", "source")}
    device = Device(
        arch=arch,
        sm_count=numbers["sm_count"],
        l2_bytes=numbers["l2_mb"] * 2**20,
        shared_bytes=numbers["shared_kb"] * 2**10,
        bandwidth_gbs=numbers["bandwidth_gbs"],
        warp_size=numbers["warp_size"],
        name=str(row["name"]),
    )
    return Architecture(
        device, numbers["registers_per_sm"], numbers["threads_per_sm"], numbers["programs_per_sm"], target_of(arch, device.warp_size)
    )
