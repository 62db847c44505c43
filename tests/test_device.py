"""What is said of a GPU that nobody here has: AMD's fingerprint from made-up properties, what an architecture and a driver can."""

import ctypes
from types import SimpleNamespace

import pytest

from kernels import device as gpus
from kernels import driver, launch
from tuner.architectures import architectures


def properties(arch: str) -> SimpleNamespace:
    return SimpleNamespace(
        gcnArchName=f"{arch}:sramecc+:xnack-",
        multi_processor_count=304,
        L2_cache_size=4 * 2**20,
        shared_memory_per_block=64 * 2**10,
        memory_clock_rate=1_300_000,
        memory_bus_width=8192,
        warp_size=64,
        name="AMD Instinct",
    )


@pytest.mark.parametrize(("arch", "l2_mb"), [("gfx90a", 4), ("gfx942", 256), ("gfx950", 256)])
def test_the_last_cache_before_memory_counts(monkeypatch: pytest.MonkeyPatch, arch: str, l2_mb: int) -> None:
    """Behind the L2 of an MI300 lie 256 MiB: buffers that span three times the L2 alone would all be found there."""
    monkeypatch.setattr(gpus.torch.version, "hip", "6.4")
    monkeypatch.setattr(gpus.torch.cuda, "get_device_properties", lambda index: properties(arch))
    found = gpus.describe.__wrapped__(0)
    assert (found.arch, found.l2_bytes, found.warp_size) == (arch, l2_mb * 2**20, 64)


@pytest.mark.parametrize("arch", gpus.LAST_LEVEL_CACHE_BYTES)
def test_the_table_of_architectures_says_the_same(arch: str) -> None:
    assert architectures()[arch].device.l2_bytes == gpus.LAST_LEVEL_CACHE_BYTES[arch]


def test_the_table_names_the_source_of_every_figure() -> None:
    import yaml

    from tuner import architectures as module

    table = yaml.safe_load(module.resources.files("tuner").joinpath("architectures.yaml").read_text(encoding="utf-8"))
    columns = {tuple(row) for row in table.values()}
    assert len(columns) == 1
    assert all(len(row["source"]) > 20 for row in table.values())
    assert all(row["warp_size"] == (64 if arch.startswith("gfx9") else 32) for arch, row in table.items())


@pytest.mark.parametrize(
    ("arch", "expected"),
    [("sm_80", False), ("sm_89", False), ("sm_90", True), ("sm_120", True), ("gfx942", False), (gpus.INTERPRETER.arch, False)],
)
def test_who_has_programmatic_dependent_launch(monkeypatch: pytest.MonkeyPatch, arch: str, expected: bool) -> None:
    monkeypatch.setattr(launch, "_TRITON", (3, 6))
    assert launch.has_pdl(arch) is expected
    monkeypatch.setattr(launch, "_TRITON", (3, 4))  # which can't compile its instructions
    assert launch.has_pdl(arch) is False


@pytest.mark.parametrize(("error", "expected"), [(0, 12040), (3, 0)])
def test_the_drivers_version(monkeypatch: pytest.MonkeyPatch, error: int, expected: int) -> None:
    def get(version: object) -> int:
        ctypes.cast(version, ctypes.POINTER(ctypes.c_int))[0] = 12040
        return error

    monkeypatch.setattr(driver.ctypes, "CDLL", lambda _: SimpleNamespace(cuDriverGetVersion=get))
    assert driver.driver_version.__wrapped__() == expected


def test_without_a_driver_it_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise OSError

    monkeypatch.setattr(driver.ctypes, "CDLL", missing)
    assert driver.driver_version.__wrapped__() == 0
