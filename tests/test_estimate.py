"""The model's estimates: bounds that hold whatever its constants are, and the orders it must not get wrong."""

import itertools
from dataclasses import replace

import pytest

from kernels.variants import candidates
from tuner.architectures import architectures
from tuner.model import LAUNCH_US, estimate_us, least_us, modelled
from tuning_db.model import Config, Problem, Resources

H100 = architectures()["sm_90"]
LEAN = Resources(registers=32, spill_bytes=0, shared_bytes=0)


def bf16(rows, cols, layout="contiguous", inner_rows=1, op="rmsnorm"):
    return Problem(op, "bfloat16", "bfloat16", "bfloat16", rows, cols, layout, inner_rows)


def backward(rows, cols, op="rmsnorm_backward"):
    return bf16(rows, cols, op=op)


def walking(variant, **params):
    return Config.of(f"backward_{variant}", **params)


BACKWARDS = [
    backward(512, 4096),
    backward(131_072, 128),
    backward(4096, 5000),
    backward(512, 65_536),
    backward(4096, 4096, "add_rmsnorm_backward"),
]


@pytest.mark.parametrize("arch", architectures())
def test_nothing_is_faster_than_the_memory(arch):
    architecture = architectures()[arch]
    for problem in (bf16(1, 64), bf16(4096, 4096), bf16(64, 65_536), bf16(4096, 1000, "strided_axis", 64), *BACKWARDS):
        floor = (2 if problem.is_backward else 1) * LAUNCH_US + problem.bytes_moved / (architecture.device.bandwidth_gbs * 1e3)
        for config in candidates(problem, architecture.device):
            assert estimate_us(problem, config, LEAN, architecture) >= floor
            assert 0 < modelled(problem, config, LEAN, architecture).copy_fraction <= 1


def test_more_registers_never_help():
    problem, config = bf16(8192, 8192), Config.of("whole_row", num_warps=8, weight_first=True)
    times = [estimate_us(problem, config, Resources(registers, 0, 0), H100) for registers in (32, 64, 128, 255)]
    assert times == sorted(times)


@pytest.mark.parametrize("arch", architectures())
@pytest.mark.parametrize(
    "problem", [bf16(8192, 8192), bf16(300_000, 64), bf16(16, 65_536), bf16(4096, 1000, "strided_axis", 64), *BACKWARDS], ids=str
)
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


@pytest.mark.parametrize(
    ("problem", "better", "worse"),
    [
        # Programs enough to hide what each waits for: 147, 183 and 284 µs on an H100.
        (
            backward(32_768, 2048),
            walking("whole_row", num_warps=8, programs_per_sm=4, stages=1),
            walking("whole_row", num_warps=8, programs_per_sm=2, stages=1),
        ),
        (
            backward(32_768, 2048),
            walking("whole_row", num_warps=8, programs_per_sm=2, stages=1),
            walking("whole_row", num_warps=8, programs_per_sm=1, stages=1),
        ),
        # Or rows under way: 185 µs instead of 295.
        (
            backward(32_768, 2048),
            walking("whole_row", num_warps=8, programs_per_sm=1, stages=3),
            walking("whole_row", num_warps=8, programs_per_sm=1, stages=2),
        ),
        # A chunk twice as wide at the same wait: 156 µs instead of 205.
        (
            backward(512, 131_072),
            walking("split_row", block_cols=2048, num_warps=4, programs_per_sm=4, stages=2, maxnreg=128),
            walking("split_row", block_cols=1024, num_warps=4, programs_per_sm=4, stages=2, maxnreg=128),
        ),
        # 5120 columns leave a sixth of three chunks of 2048 unused, three eighths of two of 4096: 59 µs instead of 74.
        (
            backward(4096, 5120),
            walking("split_row", block_cols=2048, num_warps=4, programs_per_sm=4, stages=2, maxnreg=128),
            walking("split_row", block_cols=4096, num_warps=8, programs_per_sm=2, stages=2, maxnreg=128),
        ),
        # Rows that fit one program's registers need no exchange: 66 µs instead of 76.
        (
            backward(4096, 7168),
            walking("whole_row", num_warps=8, programs_per_sm=1, stages=3),
            walking("split_row", block_cols=2048, num_warps=4, programs_per_sm=4, stages=2, maxnreg=128),
        ),
        # A weight of one column a thread gives the tile as narrow loads: 41 µs instead of 96.
        (
            backward(131_072, 128),
            walking("multi_row", rows_per_program=32, num_warps=8, programs_per_sm=2, stages=3),
            walking("multi_row", rows_per_program=16, num_warps=4, programs_per_sm=2, stages=3),
        ),
        # Twice as many partial rows to write and to read, for rows that one program an SM keeps up with: 10.2 µs instead of 11.5.
        (
            backward(512, 4096),
            walking("whole_row", num_warps=16, programs_per_sm=1, stages=3),
            walking("whole_row", num_warps=16, programs_per_sm=2, stages=3),
        ),
    ],
)
def test_orders_of_the_backward(problem, better, worse):
    """As an H100 measured them."""
    assert estimate_us(problem, better, LEAN, H100) < 0.97 * estimate_us(problem, worse, LEAN, H100)


def test_rows_are_walked_in_whole_turns():
    """The 133rd row takes 132 programs another turn, the 132nd and the 134th none."""
    config = walking("whole_row", num_warps=8, programs_per_sm=1, stages=1)
    problems = [replace(backward(rows, 4096), w_dtype="none") for rows in (131, 132, 133, 134)]
    times = [estimate_us(problem, config, LEAN, H100) for problem in problems]
    another, turn, none = (after - before for before, after in itertools.pairwise(times))
    assert turn > 10 * max(abs(another), abs(none))


def test_programs_that_share_rows_must_run_at_once():
    """More registers than maxnreg says leave some of them waiting for programs that have not started."""
    config = walking("split_row", block_cols=2048, num_warps=4, programs_per_sm=4, stages=2, maxnreg=128)
    problem = backward(512, 65_536)
    all_at_once, too_large = (estimate_us(problem, config, Resources(registers, 0, 16_432), H100) for registers in (128, 129))
    assert too_large > 10 * all_at_once


def test_without_a_weight_tiles_come_in_vectors_and_nothing_is_summed():
    config = walking("multi_row", rows_per_program=16, num_warps=4, programs_per_sm=2, stages=3)
    weighted = backward(131_072, 128)
    bare = replace(weighted, w_dtype="none")
    assert estimate_us(bare, config, LEAN, H100) + 2 * LAUNCH_US < estimate_us(weighted, config, LEAN, H100)


BOUNDLESS = replace(H100, device=replace(H100.device, bandwidth_gbs=10**9))
"""Memory is no limit: what the programs do with their rows remains."""


def test_a_turn_takes_longer_over_longer_rows():
    """All that is in the threads' registers counts, in however many pieces."""
    config = walking("whole_row", num_warps=4, programs_per_sm=2, stages=1)
    times = [estimate_us(backward(4096, cols), config, LEAN, BOUNDLESS) for cols in (1024, 3072, 5120, 7168)]
    assert all(longer > 1.05 * shorter for shorter, longer in itertools.pairwise(times))


def test_a_turn_takes_longer_over_another_gradient():
    config = walking("whole_row", num_warps=4, programs_per_sm=2, stages=1)
    plain, of_a_sum = (
        estimate_us(backward(4096, 4096, op), config, LEAN, BOUNDLESS) for op in ("rmsnorm_backward", "add_rmsnorm_backward")
    )
    assert of_a_sum > 1.05 * plain


def test_the_second_stage_hides_nothing():
    """The third does. 4096x4096 took 57.6, 63.8 and 43.6 µs on an H100."""
    one, two, three = (walking("whole_row", num_warps=16, programs_per_sm=1, stages=stages) for stages in (1, 2, 3))
    assert estimate_us(backward(4096, 4096), two, LEAN, H100) >= estimate_us(backward(4096, 4096), one, LEAN, H100)
    assert estimate_us(backward(4096, 4096), three, LEAN, H100) < 0.9 * estimate_us(backward(4096, 4096), one, LEAN, H100)


def test_warps_with_rows_of_their_own_wait_for_no_other():
    """131072x128 took 45.7 and 46.3 µs on an H100: as many warps on an SM, with as many elements."""
    eight = walking("multi_row", rows_per_program=16, num_warps=8, programs_per_sm=2, stages=1)
    four = walking("multi_row", rows_per_program=8, num_warps=4, programs_per_sm=4, stages=1)
    times = [estimate_us(backward(131_072, 128), config, LEAN, H100) for config in (eight, four)]
    assert max(times) < 1.03 * min(times)


def test_programs_that_do_not_fit_come_in_waves():
    config = walking("whole_row", num_warps=8, programs_per_sm=4, stages=1)
    four_at_once, two = (estimate_us(backward(4096, 2048), config, Resources(registers, 0, 0), BOUNDLESS) for registers in (64, 128))
    assert two > 1.5 * four_at_once
