"""Every backward variant against float64 gradients: sizes, dtypes, strides, hard values; interpreted, or on the GPU where there is one."""

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch

from gradient_oracle import assert_gradients
from kernels.backward_launch import build_backward_launcher
from kernels.device import current_device
from kernels.geometry import Geometry
from kernels.launch import OPTIONS
from kernels.variants import candidates, space
from kernels.variants.backward_common import MAX_TURNS, REGISTERS_PER_SM, walkers
from oracle import (
    BACKWARD_VARIANTS,
    DEVICE,
    DEVICE_INDEX,
    DTYPES,
    Fenced,
    dtype_names,
    fenced_copy,
    packed_strides,
    random_weight,
    random_x,
)
from tuning_db.model import BACKWARD, Config

COLS = (1, 2, 3, 7, 127, 128, 129, 1000, 4097)
SPLIT_COLS = (1025, 2049, 4097, 5000, 9216, 9217)
PAIRS = [(x, w) for x in DTYPES for w in (None, *DTYPES)]
SM_COUNT = 3
"""Of the launches in these tests: few programs, so that each walks several rows, and rows are left over at the end."""


def geometry(dy: torch.Tensor, x: torch.Tensor) -> Geometry:
    rows, cols = x.shape
    return Geometry("contiguous", rows, cols, 0, 0, x.stride(0), 1, 0, dy.stride(0), 1)


def legal(variant: str, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None) -> list[Config]:
    problem = geometry(dy, x).problem(*dtype_names(x, weight, dy), op=BACKWARD)
    return distinct([config for config in candidates(problem, current_device()) if config.variant == variant])


def distinct(configs: Sequence[Config]) -> list[Config]:
    """One config for each set of constexprs that the interpreter tells apart: it knows no warps and no stages."""
    first: dict[tuple[object, ...], Config] = {}
    for config in configs:
        first.setdefault(constexprs(config), config)
    return list(first.values())


def constexprs(config: Config) -> tuple[object, ...]:
    return (config.variant, *(item for item in config.items if item[0] not in (*OPTIONS, "stages")))


def check(
    configs: Sequence[Config], dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6, shift: int = 0
) -> None:
    """Each config computes dx and dw, writes all of both and nothing else, and leaves dy and x as they are."""
    assert configs
    dx = Fenced(x.shape, packed_strides(x.shape), x.dtype, shift)
    dw = None if weight is None else Fenced(weight.shape, (1,), weight.dtype, shift)
    before = dy.clone(), x.clone()
    for config in configs:
        note = f"{config}, x {tuple(x.shape)} {x.dtype} strides {x.stride()}, dy strides {dy.stride()}:"
        for fence in (dx, dw):
            if fence is not None:
                fence.memory.fill_(math.nan)
        launch = build_backward_launcher(config, geometry(dy, x), dtype_names(x, weight, dy), DEVICE_INDEX, sm_count=SM_COUNT)
        launch(dx.view, None if dw is None else dw.view, dy, x, weight, eps)
        dx.assert_intact(note)
        if dw is not None:
            dw.assert_intact(note)
        assert_gradients(dx.view, None if dw is None else dw.view, dy, x, weight, eps, note=note)
        assert torch.equal(dy, before[0]), note
        assert torch.equal(x, before[1]), note


def random_dy(x: torch.Tensor, seed: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return fenced_copy(torch.randn(x.shape, generator=generator).to(x.dtype).to(DEVICE))


def size_cases() -> Iterator[tuple[str, int, int, tuple[torch.dtype, torch.dtype | None]]]:
    for variant in BACKWARD_VARIANTS:
        pairs = itertools.cycle(PAIRS)
        for cols in SPLIT_COLS if variant == "backward_split_row" else COLS:
            if variant == "backward_multi_row" and cols > BACKWARD_VARIANTS[variant].MAX_COLS:
                continue  # no config of it is valid there
            for rows in (1, 2, 7) if variant == "backward_split_row" else (1, 2, 65):
                yield variant, rows, cols, next(pairs)


@pytest.mark.parametrize(("variant", "rows", "cols", "pair"), list(size_cases()))
def test_sizes(variant, rows, cols, pair):
    x, weight = fenced_copy(random_x((rows, cols), pair[0], seed=cols)), random_weight(cols, pair[1])
    configs = legal(variant, random_dy(x), x, weight)
    check(configs if rows * cols < 5000 else configs[-2:], random_dy(x), x, weight)


@pytest.mark.parametrize(("x_dtype", "w_dtype"), PAIRS)
@pytest.mark.parametrize("variant", BACKWARD_VARIANTS)
def test_dtypes(variant, x_dtype, w_dtype):
    cols = 2100 if variant == "backward_split_row" else 129
    x, weight = fenced_copy(random_x((9, cols), x_dtype)), random_weight(cols, w_dtype)
    check(legal(variant, random_dy(x), x, weight)[:2], random_dy(x), x, weight)


@pytest.mark.parametrize("variant", BACKWARD_VARIANTS)
def test_dy_of_another_dtype(variant):
    x = random_x((5, 2100 if variant == "backward_split_row" else 200), torch.bfloat16)
    dy = random_dy(x).float() * 1.001
    check(legal(variant, dy, x, None)[:1], dy, x, None)


@pytest.mark.parametrize("config", distinct([config for name in BACKWARD_VARIANTS for config in sorted(space(name), key=str)]), ids=str)
def test_every_config(config):
    """Each set of constexprs in each space, at a small problem that is legal for it."""
    for (rows, cols), dtype in itertools.product(((5, 40), (70, 40), (70, 1000), (300, 2), (3, 2000), (3, 4000), (3, 9000)), DTYPES[1:]):
        x, weight = random_x((rows, cols), dtype), random_weight(cols, dtype)
        found = [twin for twin in legal(config.variant, x, x, weight) if constexprs(twin) == constexprs(config)]
        if found:
            check(found, random_dy(x), x, weight)
            return
    pytest.skip("legal for none of these problems on this device; test_compile.py holds that it is legal for some problem somewhere")


def strided(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of two dimensions by name, as the kernels read them in place."""
    rows, cols = values.shape
    return {
        "packed": fenced_copy(values),
        "odd row stride": fenced_copy(values, (cols + 3, 1)),
        "padded to 16": fenced_copy(values, (-(-cols // 16) * 16 + 16, 1)),
        "one row for all": fenced_copy(values[:1]).expand(rows, cols),
    }


@pytest.mark.parametrize("of_dy", strided(torch.ones(1, 1)))
@pytest.mark.parametrize("of_x", ["packed", "odd row stride", "one row for all"])
@pytest.mark.parametrize("variant", BACKWARD_VARIANTS)
def test_strides_of_rows(variant, of_x, of_dy):
    cols = 2080 if variant == "backward_split_row" else 96
    x = strided(random_x((7, cols), torch.bfloat16))[of_x]
    dy = strided(random_dy(x))[of_dy]
    check(legal(variant, dy, x, None)[:1], dy, x, random_weight(cols, torch.bfloat16))


@pytest.mark.parametrize("shift", [1, 4, 5])
@pytest.mark.parametrize("variant", BACKWARD_VARIANTS)
def test_misaligned_pointers(variant, shift):
    """Addresses that are multiples of 2 or 8 bytes only."""
    cols = 2080 if variant == "backward_split_row" else 96
    x = fenced_copy(random_x((5, cols), torch.float16), shift=shift)
    check(legal(variant, x, x, None)[-1:], random_dy(x), x, random_weight(cols, torch.float16), shift=shift)


@pytest.mark.parametrize("variant", BACKWARD_VARIANTS)
def test_a_gradient_that_is_not_wanted(variant):
    """It is not stored, and the other keeps its bits."""
    cols = 2080 if variant == "backward_split_row" else 200
    x, weight = random_x((9, cols), torch.float32), random_weight(cols, torch.float32)
    dy = random_dy(x)
    (config, *_) = legal(variant, dy, x, weight)
    arguments = (config, geometry(dy, x), dtype_names(x, weight, dy), DEVICE_INDEX)
    both, alone = (torch.full_like(x, math.nan), torch.full_like(weight, math.nan)), (torch.empty_like(x), torch.empty_like(weight))
    build_backward_launcher(*arguments)(*both, dy, x, weight, 1e-6)
    build_backward_launcher(*arguments, wants_dw=False)(alone[0], None, dy, x, weight, 1e-6)
    build_backward_launcher(*arguments, wants_dx=False)(None, alone[1], dy, x, weight, 1e-6)
    assert_gradients(*both, dy, x, weight)
    assert torch.equal(alone[0], both[0])
    assert torch.equal(alone[1], both[1])


@pytest.mark.parametrize("variant", BACKWARD_VARIANTS)
def test_the_same_bits_from_run_to_run(variant):
    cols = 2080 if variant == "backward_split_row" else 300
    x, weight = random_x((10 if variant == "backward_split_row" else 70, cols), torch.float32), random_weight(cols, torch.float32)
    dy = random_dy(x)
    for config in legal(variant, dy, x, weight)[:2]:
        launch = build_backward_launcher(config, geometry(dy, x), dtype_names(x, weight, dy), DEVICE_INDEX, sm_count=SM_COUNT)
        results = []
        for _ in range(2):
            dx, dw = torch.full_like(x, math.nan), torch.full_like(weight, math.nan)
            launch(dx, dw, dy, x, weight, 1e-6)
            results.append((dx, dw))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("variant", BACKWARD_VARIANTS)
def test_a_bad_row_leaves_the_dx_of_others_alone(variant, value):
    cols = 2080 if variant == "backward_split_row" else 100
    x, weight = random_x((9, cols), torch.float32), random_weight(cols, torch.float32)
    dy = random_dy(x)
    launch = build_backward_launcher(legal(variant, dy, x, weight)[0], geometry(dy, x), dtype_names(x, weight, dy), DEVICE_INDEX)
    clean, bad, dw = torch.empty_like(x), torch.empty_like(x), torch.empty_like(weight)
    launch(clean, dw, dy, x, weight, 1e-6)
    x[1, 3] = value
    launch(bad, dw, dy, x, weight, 1e-6)
    assert_gradients(bad, dw, dy, x, weight)
    others = [0, *range(2, 9)]
    assert torch.equal(bad[others], clean[others])


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e6])
@pytest.mark.parametrize("variant", BACKWARD_VARIANTS)
def test_eps(variant, eps):
    cols = 2080 if variant == "backward_split_row" else 100
    x = random_x((6, cols), torch.float32)
    if eps < 1e-6:
        x[3] += 1.0  # the fourth row is zero, whose rstd of 1e6 or infinity the formula in fp32 can't hold
    check(legal(variant, x, x, None)[:1], random_dy(x), x, random_weight(cols, torch.float32), eps)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
@pytest.mark.parametrize("variant", BACKWARD_VARIANTS)
def test_extreme_values(variant, scale):
    """Values whose squares fp32 still holds, though the cube of rstd does not."""
    cols = 1100 if variant == "backward_split_row" else 100
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn((6, cols), generator=generator) * scale / 10).to(DEVICE)
    check(legal(variant, x, x, None)[:1], random_dy(x), x, random_weight(cols, torch.float32))


@pytest.mark.parametrize("rows_per_turn", [1, 2, 16])
@pytest.mark.parametrize("most", [1, 132, 1056])
@pytest.mark.parametrize("rows", [1, 2, 131, 133, 512, 65_537, 1_179_648])
def test_walkers(rows, most, rows_per_turn):
    """No accumulator takes in more than MAX_TURNS terms, there are no more programs than that or `most` asks for, and none is idle."""
    programs = walkers({"rows": rows}, rows_per_turn, most)
    tiles = -(-rows // rows_per_turn)
    assert 1 <= programs <= min(tiles, max(most, -(-tiles // MAX_TURNS)))
    assert -(-tiles // programs) <= max(-(-tiles // most), 1)
    assert -(-tiles // programs) <= MAX_TURNS


@pytest.mark.parametrize("config", sorted(space("backward_split_row"), key=str), ids=str)
def test_programs_that_wait_for_each_other_fit_an_sm(config):
    """All programs of a group must run at once: no config may use more registers than let programs_per_sm of them onto an SM."""
    threads = int(config.params["num_warps"]) * 32
    assert int(config.params["maxnreg"]) * threads * int(config.params["programs_per_sm"]) <= REGISTERS_PER_SM


def test_many_partial_rows():
    """More than a program of `column_sum` adds up in one turn."""
    x, weight = random_x((1200, 5), torch.float32), random_weight(5, torch.float32)
    dy = random_dy(x)
    config = Config.of("backward_multi_row", rows_per_program=2, programs_per_sm=8, stages=1, num_warps=1)
    launch = build_backward_launcher(config, geometry(dy, x), dtype_names(x, weight, dy), DEVICE_INDEX, sm_count=75)
    dx, dw = torch.full_like(x, math.nan), torch.full_like(weight, math.nan)
    launch(dx, dw, dy, x, weight, 1e-6)
    assert_gradients(dx, dw, dy, x, weight)
