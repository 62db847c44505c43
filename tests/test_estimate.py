"""The model's estimates: bounds that hold whatever its constants are, and the orders it must not get wrong."""

import itertools

import pytest

from kernels.variants import candidates
from tuner.architectures import architectures
from tuner.model import LAUNCH_US, estimate_us, least_us, modelled
from tuning_db.model import Config, Problem, Resources

H100 = architectures()["sm_90"]
LEAN = Resources(registers=32, spill_bytes=0, shared_bytes=0)


def bf16(rows, cols, layout="contiguous", inner_rows=1):
    return Problem("rmsnorm", "bfloat16", "bfloat16", "bfloat16", rows, cols, layout, inner_rows)


@pytest.mark.parametrize("arch", architectures())
def test_nothing_is_faster_than_the_memory(arch):
    architecture = architectures()[arch]
    for problem in (bf16(1, 64), bf16(4096, 4096), bf16(64, 65_536), bf16(4096, 1000, "strided_axis", 64)):
        floor = LAUNCH_US + problem.bytes_moved / (architecture.device.bandwidth_gbs * 1e3)
        for config in candidates(problem, architecture.device):
            assert estimate_us(problem, config, LEAN, architecture) >= floor
            assert 0 < modelled(problem, config, LEAN, architecture).copy_fraction <= 1


def test_more_registers_never_help():
    problem, config = bf16(8192, 8192), Config.of("whole_row", num_warps=8, weight_first=True)
    times = [estimate_us(problem, config, Resources(registers, 0, 0), H100) for registers in (32, 64, 128, 255)]
    assert times == sorted(times)


@pytest.mark.parametrize("arch", architectures())
@pytest.mark.parametrize("problem", [bf16(8192, 8192), bf16(300_000, 64), bf16(16, 65_536), bf16(4096, 1000, "strided_axis", 64)], ids=str)
def test_no_binary_goes_below_the_bound(problem, arch):
    """Else a sweep without a GPU would leave out what could win."""
    architecture = architectures()[arch]
    for config in candidates(problem, architecture.device):
        bound = least_us(problem, config, architecture)
        for registers, shared_bytes in itertools.product((16, 17, 32, 64, 128, 255), (0, 1000, 60_000)):
            assert estimate_us(problem, config, Resources(registers, 0, shared_bytes), architecture) >= bound


@pytest.mark.parametrize(
    ("problem", "better", "worse"),
    [
        # One warp walks 4096 elements, eight share them.
        (bf16(1, 4096), {"num_warps": 8}, {"num_warps": 1}),
        # A column at a time brings a sector of 32 bytes for two.
        (
            bf16(65_536, 4096, "strided_axis", 4096),
            {"block_cols": 256, "block_inner": 32, "num_warps": 8},
            {"block_cols": 4096, "block_inner": 1, "num_warps": 8},
        ),
        # Few wide rows: many programs a row, or one.
        (bf16(1, 131_072), Config.of("split_row", block_cols=2048, max_pieces=1, num_warps=8, weight_first=True), {"num_warps": 32}),
    ],
)
def test_orders(problem, better, worse):
    def config(params):
        if isinstance(params, Config):
            return params
        if "block_inner" in params:
            return Config.of("strided_axis", **params)
        if problem.cols > 32_768:
            return Config.of("looped", block_cols=16_384, **params)
        return Config.of("whole_row", weight_first=True, **params)

    assert estimate_us(problem, config(better), LEAN, H100) < estimate_us(problem, config(worse), LEAN, H100)
