"""Every variant that serves add_rmsnorm, forward and backward, against float64; interpreted, or on the GPU where there is one."""

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch

from gradient_oracle import assert_gradients
from kernels.add_launch import build_add_launcher
from kernels.backward_launch import build_backward_launcher
from kernels.device import current_device
from kernels.geometry import Geometry, geometry_of
from kernels.launch import OPTIONS, build_launcher
from kernels.variants import VARIANTS, candidates
from oracle import (
    DEVICE,
    DEVICE_INDEX,
    DTYPES,
    SUM_BACKWARD_VARIANTS,
    SUM_VARIANTS,
    Fenced,
    assert_rmsnorm,
    assert_sum,
    dtype_names,
    fenced_copy,
    packed_strides,
    random_weight,
    random_x,
)
from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, LAYOUTS_OF, OPS, Config

ROW_COLS = (1, 3, 7, 127, 128, 1000, 4097)
SPLIT_COLS = (1025, 4097, 9217)
SHARED_COLS = 1040
"""Of rows that programs share: as few as they can, for the interpreter's sake."""
PAIRS = list(itertools.product(DTYPES, DTYPES))
"""Every dtype of x with every dtype of the residual."""
SM_COUNT = 3
"""Of backward launches: few programs, so that each walks several rows."""


def sharing(variant: str) -> bool:
    return variant.endswith("split_row")


def nest(x: torch.Tensor, residual: torch.Tensor) -> Geometry:
    found = geometry_of(x.shape, residual.stride(), x.stride(), x.dim() - 1)
    assert found is not None
    return found


def distinct(configs: Sequence[Config]) -> list[Config]:
    """One config for each set of constexprs that the interpreter tells apart."""
    first: dict[tuple[object, ...], Config] = {}
    for config in configs:
        first.setdefault((config.variant, *(item for item in config.items if item[0] not in (*OPTIONS, "stages"))), config)
    return list(first.values())


def legal(variant: str, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, op: str = ADD_FORWARD) -> list[Config]:
    """In a backward x stands for dy, residual for the sum."""
    problem = nest(x, residual).problem(*dtype_names(residual, weight, x), op=op)
    return distinct([config for config in candidates(problem, current_device()) if config.variant == variant])


def inputs(
    shape: Sequence[int], x_dtype: torch.dtype, residual_dtype: torch.dtype, w_dtype: torch.dtype | None = torch.float32, shift: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    x = fenced_copy(random_x(shape, x_dtype, seed=shape[-1]), shift=shift)
    residual = fenced_copy(random_x(shape, residual_dtype, seed=shape[-1] + 1), shift=shift)
    return x, residual, random_weight(shape[-1], w_dtype)


def check(configs: Sequence[Config], x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, shift: int = 0) -> None:
    """Each config writes all of both results, nothing else, and leaves what it reads as it was."""
    assert configs
    y, total = Fenced(x.shape, x.stride(), x.dtype, shift), Fenced(x.shape, residual.stride(), residual.dtype, shift)
    before = x.clone(), residual.clone()
    for config in configs:
        note = f"{config}, {tuple(x.shape)} {x.dtype} + {residual.dtype}, strides {x.stride()} and {residual.stride()}:"
        for fence in (y, total):
            fence.memory.fill_(math.nan)
        launch = build_add_launcher(config, nest(x, residual), dtype_names(residual, weight, x), DEVICE_INDEX)
        launch(y.view, total.view, x, residual, weight, 1e-6)
        for fence in (y, total):
            fence.assert_intact(note)
        assert_sum(total.view, x, residual, note)
        assert_rmsnorm(y.view, total.view, weight, note=note)
        assert torch.equal(x, before[0]), note
        assert torch.equal(residual, before[1]), note


def cases(variants: Sequence[str]) -> Iterator[tuple[str, int, int, tuple[torch.dtype, torch.dtype]]]:
    for variant in variants:
        pairs = itertools.cycle(PAIRS)
        for cols in SPLIT_COLS if sharing(variant) else ROW_COLS:
            if cols <= getattr(VARIANTS[variant], "MAX_COLS", cols):
                for rows in (1, 2) if sharing(variant) else (1, 33):
                    yield variant, rows, cols, next(pairs)


@pytest.mark.parametrize(("variant", "rows", "cols", "pair"), list(cases(tuple(SUM_VARIANTS))))
def test_sizes(variant, rows, cols, pair):
    x, residual, weight = inputs((rows, cols), *pair)
    configs = legal(variant, x, residual, weight)
    if variant == "split_row":
        # Interpreted, all programs of a row but its last read the whole row, so that time grows with the square of the split.
        configs = [config for config in configs if cols <= 5 * config.params["block_cols"] * config.params["max_pieces"]]
    check(configs if rows * cols < 5000 else configs[-2:], x, residual, weight)


@pytest.mark.parametrize("w_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("variant", SUM_VARIANTS)
def test_dtypes(variant, pair, w_dtype):
    x, residual, weight = inputs((5, SHARED_COLS if sharing(variant) else 129), *pair, w_dtype)
    check(legal(variant, x, residual, weight)[-1:], x, residual, weight)


def layouts(cols: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shape and strides by name."""
    return {
        "odd row stride": ((5, cols), (cols + 3, 1)),
        "padded to 16": ((5, cols), (-(-cols // 16) * 16 + 16, 1)),
        "q of packed qkv": ((3, 2, cols), (6 * cols + 16, cols, 1)),
        "heads first": ((2, 3, cols), (cols, 6 * cols, 1)),
    }


@pytest.mark.parametrize("of_x", [True, False])
@pytest.mark.parametrize("layout", layouts(1))
@pytest.mark.parametrize("variant", SUM_VARIANTS)
def test_strides_of_rows(variant, layout, of_x):
    """Of x and y, or of residual and sum, while the others are packed."""
    shape, strides = layouts(SHARED_COLS if sharing(variant) else 96)[layout]
    values, others = random_x(shape, torch.bfloat16), fenced_copy(random_x(shape, torch.float16, seed=5))
    x, residual = (fenced_copy(values, strides), others) if of_x else (others, fenced_copy(values, strides))
    weight = random_weight(shape[-1], torch.bfloat16)
    check(legal(variant, x, residual, weight)[:1], x, residual, weight)


@pytest.mark.parametrize("shift", [1, 4, 5])
@pytest.mark.parametrize("variant", SUM_VARIANTS)
def test_misaligned_pointers(variant, shift):
    """Addresses that are multiples of 2 or 8 bytes only."""
    x, residual, weight = inputs((5, SHARED_COLS if sharing(variant) else 96), torch.float16, torch.float16, torch.float16, shift)
    check(legal(variant, x, residual, weight)[-1:], x, residual, weight, shift)


@pytest.mark.parametrize("which", ["both", "out", "residual_out"])
@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("variant", [name for name, variant in SUM_VARIANTS.items() if variant.IN_PLACE])
def test_in_place(variant, pair, which):
    """The same bits as with results of their own."""
    x, residual, weight = inputs((5, 300 if variant == "multi_row" else 5000), *pair)
    for config in legal(variant, x, residual, weight)[-2:]:
        launch = build_add_launcher(config, nest(x, residual), dtype_names(residual, weight, x), DEVICE_INDEX)
        y, total, own_x, own_residual = (torch.empty_like(t) for t in (x, residual, x, residual))
        launch(y, total, x, residual, weight, 1e-6)
        own_x.copy_(x)
        own_residual.copy_(residual)
        out = own_x if which != "residual_out" else torch.empty_like(x)
        residual_out = own_residual if which != "out" else torch.empty_like(residual)
        launch(out, residual_out, own_x, own_residual, weight, 1e-6)
        assert torch.equal(out, y), str(config)
        assert torch.equal(residual_out, total), str(config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", SUM_VARIANTS)
def test_the_bits_are_those_of_the_sum_and_then_its_norm(variant, dtype):
    x, residual, weight = inputs((3, SHARED_COLS if sharing(variant) else 200), dtype, dtype)
    config = legal(variant, x, residual, weight)[0]
    y, total, unfused = torch.empty_like(x), torch.empty_like(residual), torch.empty_like(x)
    build_add_launcher(config, nest(x, residual), dtype_names(residual, weight, x), DEVICE_INDEX)(y, total, x, residual, weight, 1e-6)
    if DEVICE.type == "cuda" or dtype != torch.bfloat16:  # the interpreter cuts fp32 off where torch rounds to bf16
        assert torch.equal(total, x + residual)
    build_launcher(config, nest(x, residual), dtype_names(total, weight, unfused), DEVICE_INDEX)(unfused, total, weight, 1e-6)
    assert torch.equal(y, unfused)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("variant", SUM_VARIANTS)
def test_a_bad_row_leaves_the_others_alone(variant, value):
    x, residual, weight = inputs((5, SHARED_COLS if sharing(variant) else 200), torch.float32, torch.float32)
    launch = build_add_launcher(legal(variant, x, residual, weight)[0], nest(x, residual), dtype_names(residual, weight, x), DEVICE_INDEX)
    clean, bad, total = torch.empty_like(x), torch.empty_like(x), torch.empty_like(residual)
    launch(clean, total, x, residual, weight, 1e-6)
    residual[1, 3] = value
    launch(bad, total, x, residual, weight, 1e-6)
    assert_sum(total, x, residual)
    assert_rmsnorm(bad, total, weight)
    others = [0, 2, 3, 4]
    assert torch.equal(bad[others], clean[others])


def gradient_inputs(
    shape: tuple[int, int], y_dtype: torch.dtype, x_dtype: torch.dtype, shift: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dy, the sum, and its gradient."""
    total = fenced_copy(random_x(shape, x_dtype, seed=shape[1]), shift=shift)
    dy, dsum = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) for seed in (7, 8))
    return fenced_copy(dy.to(y_dtype), shift=shift), total, fenced_copy(dsum.to(x_dtype), shift=shift)


def check_gradients(
    configs: Sequence[Config], dy: torch.Tensor, total: torch.Tensor, dsum: torch.Tensor, weight: torch.Tensor | None, shift: int = 0
) -> None:
    """Each config writes all gradients, nothing else, and leaves what it reads as it was."""
    assert configs
    packed = packed_strides(total.shape)
    dx = Fenced(total.shape, packed, total.dtype, shift)
    daddend = None if dy.dtype == total.dtype else Fenced(total.shape, packed, dy.dtype, shift)
    dw = None if weight is None else Fenced(weight.shape, (1,), weight.dtype, shift)
    fences = [fence for fence in (dx, daddend, dw) if fence is not None]
    before = dy.clone(), total.clone(), dsum.clone()
    for config in configs:
        note = f"{config}, {tuple(total.shape)} {total.dtype}, dy {dy.dtype} strides {dy.stride()}:"
        for fence in fences:
            fence.memory.fill_(math.nan)
        launch = build_backward_launcher(
            config, nest(dy, total), dtype_names(total, weight, dy), DEVICE_INDEX, adds=True, sm_count=SM_COUNT
        )
        given = [None if fence is None else fence.view for fence in (dw, daddend)]
        launch(dx.view, given[0], dy, total, weight, 1e-6, dsum, given[1])
        for fence in fences:
            fence.assert_intact(note)
        assert_gradients(dx.view, given[0], dy, total, weight, note=note, dsum=dsum, daddend=given[1])
        for own, was in zip((dy, total, dsum), before, strict=True):
            assert torch.equal(own, was), note


@pytest.mark.parametrize(("variant", "rows", "cols", "pair"), list(cases(tuple(SUM_BACKWARD_VARIANTS))))
def test_gradients_of_sizes(variant, rows, cols, pair):
    dy, total, dsum = gradient_inputs((rows, cols), *pair)
    weight = random_weight(cols, pair[0])
    configs = legal(variant, dy, total, weight, ADD_BACKWARD)
    check_gradients(configs if rows * cols < 5000 else configs[-1:], dy, total, dsum, weight)


@pytest.mark.parametrize("w_dtype", [None, torch.float32])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("variant", SUM_BACKWARD_VARIANTS)
def test_gradients_of_dtypes(variant, pair, w_dtype):
    cols = SHARED_COLS if sharing(variant) else 129
    dy, total, dsum = gradient_inputs((9, cols), *pair)
    weight = random_weight(cols, w_dtype)
    check_gradients(legal(variant, dy, total, weight, ADD_BACKWARD)[:1], dy, total, dsum, weight)


@pytest.mark.parametrize("strides", [(1050, 1), (0, 1)])
@pytest.mark.parametrize("variant", SUM_BACKWARD_VARIANTS)
def test_gradients_of_strides(variant, strides):
    cols = SHARED_COLS if sharing(variant) else 96
    dy, total, dsum = gradient_inputs((7, cols), torch.bfloat16, torch.bfloat16)
    weight = random_weight(cols, torch.bfloat16)
    dy = fenced_copy(dy, strides) if strides[0] else fenced_copy(dy[:1]).expand(7, cols)
    total = fenced_copy(total, (cols + 16, 1))
    check_gradients(legal(variant, dy, total, weight, ADD_BACKWARD)[:1], dy, total, dsum, weight)


@pytest.mark.parametrize("shift", [1, 4])
@pytest.mark.parametrize("variant", SUM_BACKWARD_VARIANTS)
def test_gradients_of_misaligned_pointers(variant, shift):
    cols = SHARED_COLS if sharing(variant) else 96
    dy, total, dsum = gradient_inputs((5, cols), torch.float16, torch.float32, shift)
    weight = random_weight(cols, torch.float16)
    check_gradients(legal(variant, dy, total, weight, ADD_BACKWARD)[-1:], dy, total, dsum, weight, shift)


def test_the_layouts_of_an_op_are_those_of_its_variants():
    for op in OPS:
        served = {layout for variant in VARIANTS.values() if op in variant.OPS for layout in variant.LAYOUTS}
        assert set(LAYOUTS_OF[op]) == served
