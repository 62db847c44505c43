"""Every forward variant against float64: sizes, dtypes, strides, hard values; interpreted, or on the GPU where there is one."""

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch

from kernels.device import INTERPRETER, current_device, interpreting
from kernels.geometry import Geometry, geometry_of
from kernels.launch import OPTIONS, build_launcher
from kernels.variants import candidates, cluster_row, space
from oracle import (
    DEVICE,
    DEVICE_INDEX,
    DTYPES,
    FORWARD_VARIANTS,
    Fenced,
    assert_rmsnorm,
    dtype_names,
    fenced_copy,
    packed_strides,
    random_weight,
    random_x,
)
from tuning_db.model import Config

ROW_COLS = (1, 2, 3, 7, 127, 128, 129, 1000, 4097)
SPLIT_COLS = (1025, 2049, 4097, 5000, 9216, 9217, 9232, 12289, 40000)
"""Widths that one program doesn't hold. 9217, 9232 and 12289: the last chunk of a row is shorter than all its pieces but one."""

PAIRS = [(x, w) for x in DTYPES for w in (None, *DTYPES)]
"""Every dtype of x with every dtype of the weight."""

SHARING_VARIANTS = ("split_row", "cluster_row")
"""Several programs a row: for rows of as many chunks."""
SHARED_COLS = 4200

ROW_VARIANTS = [name for name, variant in FORWARD_VARIANTS.items() if "contiguous" in variant.LAYOUTS]
STRIDED_VARIANTS = [name for name, variant in FORWARD_VARIANTS.items() if "strided_axis" in variant.LAYOUTS]


@pytest.fixture(autouse=True)
def _clusters_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs the programs of a cluster one after another, each reading the whole row: right, but not in place."""
    monkeypatch.setattr(cluster_row, "ARCHES", (*cluster_row.ARCHES, INTERPRETER.arch))


def launch(config: Config, x: torch.Tensor, weight: torch.Tensor | None, y: torch.Tensor, eps: float = 1e-6, axis: int = -1) -> None:
    build_launcher(config, geometry(x, y, axis), dtype_names(x, weight, y), DEVICE_INDEX)(y, x, weight, eps)


def geometry(x: torch.Tensor, y: torch.Tensor, axis: int) -> Geometry:
    found = geometry_of(x.shape, x.stride(), y.stride(), axis % x.dim())
    assert found is not None
    return found


def distinct(configs: Sequence[Config]) -> list[Config]:
    """One config for each set of constexprs: num_warps means nothing to the interpreter. test_gpu.py runs them all."""
    first: dict[tuple[object, ...], Config] = {}
    for config in configs:
        first.setdefault(constexprs(config), config)
    return list(first.values())


def constexprs(config: Config) -> tuple[object, ...]:
    return (config.variant, *(item for item in config.items if item[0] not in OPTIONS))


def legal(variant: str, x: torch.Tensor, weight: torch.Tensor | None, y: torch.Tensor, axis: int = -1) -> list[Config]:
    problem = geometry(x, y, axis).problem(*dtype_names(x, weight, y))
    return distinct([config for config in candidates(problem, current_device()) if config.variant == variant])


def spread(configs: Sequence[Config], count: int = 3) -> list[Config]:
    """`count` configs, evenly over the list, the last always among them."""
    if len(configs) <= count:
        return list(configs)
    if count == 1:
        return [configs[-1]]
    return [configs[i * (len(configs) - 1) // (count - 1)] for i in range(count)]


def check(configs: Sequence[Config], x: torch.Tensor, weight: torch.Tensor | None, y: Fenced, eps: float = 1e-6, axis: int = -1) -> None:
    """Each config computes RMSNorm of x into y, writes all of y, and nothing else."""
    assert configs
    for config in configs:
        y.memory.fill_(math.nan)
        launch(config, x, weight, y.view, eps, axis)
        note = f"{config}, x {tuple(x.shape)} {x.dtype} strides {x.stride()}:"
        y.assert_intact(note)
        assert_rmsnorm(y.view, x, weight, eps, axis, note)


def size_cases() -> Iterator[tuple[str, int, int, tuple[torch.dtype, torch.dtype | None]]]:
    for variant in ROW_VARIANTS:
        pairs = itertools.cycle(PAIRS)
        for cols in SPLIT_COLS if variant in SHARING_VARIANTS else ROW_COLS:
            if (variant == "multi_row" and cols > FORWARD_VARIANTS[variant].MAX_COLS) or (variant == "cluster_row" and cols < 4096):
                continue  # no config of it is valid there
            for rows in (1, 2) if variant in SHARING_VARIANTS else (1, 2, 65):
                yield variant, rows, cols, next(pairs)


@pytest.mark.parametrize(("variant", "rows", "cols", "pair"), list(size_cases()))
def test_sizes(variant, rows, cols, pair):
    x = fenced_copy(random_x((rows, cols), pair[0], seed=cols))
    weight = random_weight(cols, pair[1])
    y = Fenced(x.shape, packed_strides(x.shape), x.dtype)
    configs = legal(variant, x, weight, y.view)
    if variant == "split_row":
        # Interpreted, all programs of a row but its last read the whole row, so that time grows with the square of the split.
        configs = [config for config in configs if cols <= 10 * config.params["block_cols"] * config.params["max_pieces"]]
    check(configs if rows * cols < 10_000 and rows < 65 else spread(configs, 2 if rows < 65 else 1), x, weight, y)


@pytest.mark.parametrize(("x_dtype", "w_dtype"), PAIRS)
@pytest.mark.parametrize("variant", ROW_VARIANTS)
def test_dtypes(variant, x_dtype, w_dtype):
    cols = SHARED_COLS if variant in SHARING_VARIANTS else 129
    x = fenced_copy(random_x((5, cols), x_dtype))
    weight = random_weight(cols, w_dtype)
    y = Fenced(x.shape, packed_strides(x.shape), x_dtype)
    check(spread(legal(variant, x, weight, y.view), 2), x, weight, y)


@pytest.mark.parametrize("variant", FORWARD_VARIANTS)
def test_result_of_another_dtype(variant):
    shape, axis = ((5, SHARED_COLS if variant in SHARING_VARIANTS else 2100), -1) if variant in ROW_VARIANTS else ((33, 5), 0)
    x = random_x(shape, torch.bfloat16, axis=axis)
    weight = random_weight(shape[axis], torch.float16)
    y = Fenced(shape, packed_strides(shape), torch.float32)
    check(legal(variant, x, weight, y.view, axis)[:1], x, weight, y, axis=axis)


def x_layouts(cols: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shape and strides by name: what a row variant reads in place."""
    return {
        "odd row stride": ((5, cols), (cols + 3, 1)),
        "padded to 16": ((5, cols), (-(-cols // 16) * 16 + 16, 1)),
        "q of packed qkv": ((3, 2, cols), (6 * cols + 16, cols, 1)),
        "heads first": ((2, 3, cols), (cols, 6 * cols, 1)),
        "one row for all": ((5, cols), (0, 1)),
        "one row for each head": ((3, 2, cols), (cols, 0, 1)),
    }


@pytest.mark.parametrize("cols", [96, 100, 127])
@pytest.mark.parametrize("layout", x_layouts(1))
@pytest.mark.parametrize("variant", ROW_VARIANTS)
def test_strides_of_rows(variant, layout, cols):
    if variant in SHARING_VARIANTS:
        cols += 4100  # no config splits a row of less than two chunks
    shape, strides = x_layouts(cols)[layout]
    x = fenced_copy(random_x(shape, torch.bfloat16), strides) if 0 not in strides else one_row_for_many(shape, strides)
    weight = random_weight(cols, torch.bfloat16)
    for y_strides, at in ((packed_strides(shape), 0), (packed_strides((*shape[:-1], cols + 5)), -1)):
        y = Fenced(shape, y_strides, x.dtype)
        check([legal(variant, x, weight, y.view)[at]], x, weight, y)


def one_row_for_many(shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """Expanded along the dimensions of stride 0."""
    source = random_x([1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True)], torch.bfloat16)
    return fenced_copy(source).expand(shape)


@pytest.mark.parametrize("shift", [1, 4, 5])
@pytest.mark.parametrize("variant", ROW_VARIANTS)
def test_misaligned_pointers(variant, shift):
    """Addresses that are multiples of 2 or 8 bytes only."""
    cols = 4160 if variant in SHARING_VARIANTS else 96
    x = fenced_copy(random_x((5, cols), torch.float16), shift=shift)
    weight = random_weight(cols, torch.float16)
    y = Fenced(x.shape, packed_strides(x.shape), x.dtype, shift=3)
    check(spread(legal(variant, x, weight, y.view), 2), x, weight, y)


def axis_views(cols: int, inner: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Shape, strides and axis by name: the elements of a row lie apart."""
    return {
        "axis 0": ((cols, inner), (inner + 2, 1), 0),
        "axis 1 of 3": ((2, cols, inner), (cols * inner, inner, 1), 1),
        "every second column": ((inner, cols), (2 * cols, 2), 1),
    }


@pytest.mark.parametrize("inner", [1, 2, 65])
@pytest.mark.parametrize("cols", [2, *ROW_COLS[2:]])
@pytest.mark.parametrize("view", axis_views(2, 1))
@pytest.mark.parametrize("variant", STRIDED_VARIANTS)
def test_axis_sizes(variant, view, cols, inner):
    shape, strides, axis = axis_views(cols, inner)[view]
    pair = PAIRS[(cols + inner) % len(PAIRS)]
    x = fenced_copy(random_x(shape, pair[0], axis=axis), strides)
    if geometry(x, x, axis).layout != "strided_axis":
        pytest.skip("with one row of adjacent elements this is no strided axis: the row variants serve it")
    weight = random_weight(cols, pair[1])
    y = Fenced(shape, strides, x.dtype)
    configs = legal(variant, x, weight, y.view, axis)
    largest = max(configs, key=lambda config: config.params["block_cols"] * config.params["block_inner"])
    check(spread(configs, 2) if cols * inner < 10_000 else [largest], x, weight, y, axis=axis)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_every_axis_of_permuted_memory(axis, order):
    """Four dimensions in any order in memory; x and y alike."""
    shape = (2, 3, 4, 5)
    strides = [0] * 4
    for size, stride in zip(reversed(order), reversed(packed_strides([shape[d] for d in order])), strict=True):
        strides[size] = stride
    x = fenced_copy(random_x(shape, torch.float32, axis=axis), strides)
    loops = geometry_of(shape, x.stride(), x.stride(), axis)
    if loops is None:
        pytest.skip("the rows need three strides: rmsnorm copies such an x first, which test_api.py checks")
    y = Fenced(shape, strides, x.dtype)
    weight = random_weight(shape[axis], torch.float32)
    variant = "strided_axis" if loops.layout == "strided_axis" else "multi_row"
    check(spread(legal(variant, x, weight, y.view, axis), 2), x, weight, y, axis=axis)


SMALL_PROBLEMS = [
    ((shape, axis), dtype)
    for shape, axis in (
        *(((3, cols), 1) for cols in (40, 1000, 2500, 5000, 9000, 17000, 33000)),
        *(((300, cols), 1) for cols in (2, 40)),
        *((shape, 0) for shape in ((10, 2), (40, 20), (130, 40), (40, 130), (140, 130), (20, 260), (600, 40), (2100, 2))),
    )
    for dtype in (torch.float16, torch.float32)
]
"""Ordered so that each config finds a cheap one that it is legal for."""


@pytest.mark.parametrize("config", distinct([config for name in FORWARD_VARIANTS for config in sorted(space(name), key=str)]), ids=str)
def test_every_config(config):
    """Each set of constexprs in each space, at a small problem that is legal for it."""
    for (shape, axis), dtype in SMALL_PROBLEMS:
        x = torch.empty(shape, dtype=dtype)
        weight = torch.empty(shape[axis], dtype=dtype)
        twins = [other for other in legal(config.variant, x, weight, x, axis) if constexprs(other) == constexprs(config)]
        if twins:
            x = fenced_copy(random_x(shape, dtype, axis=axis))
            y = Fenced(shape, packed_strides(shape), dtype)
            check(twins, x, random_weight(shape[axis], dtype), y, axis=axis)
            return
    pytest.skip("legal for none of SMALL_PROBLEMS on this device; test_compile.py holds that it is legal for some problem somewhere")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("variant", FORWARD_VARIANTS)
def test_a_bad_row_leaves_the_others_alone(variant, value):
    """NaN or infinity in row 1: its result is what the formula gives, the bits of all other rows are those without it."""
    axis = 1 if variant in ROW_VARIANTS else 0
    shape = (5, SHARED_COLS if variant in SHARING_VARIANTS else 2100) if axis else (33, 5)
    x = random_x(shape, torch.float32, axis=axis)
    clean, bad = Fenced(shape, packed_strides(shape), x.dtype), Fenced(shape, packed_strides(shape), x.dtype)
    config = legal(variant, x, None, clean.view, axis)[0]
    launch(config, x, None, clean.view, axis=axis)
    x.movedim(axis, -1)[1, 3] = value
    launch(config, x, None, bad.view, axis=axis)
    bad.assert_intact()
    assert_rmsnorm(bad.view, x, axis=axis)
    others = [0, 2, 3, 4]
    assert torch.equal(bad.view.movedim(axis, -1)[others], clean.view.movedim(axis, -1)[others])


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e6])
@pytest.mark.parametrize("variant", FORWARD_VARIANTS)
def test_eps(variant, eps):
    """A row of zeros gives zeros with any eps but 0, where the formula divides 0 by 0."""
    axis = 1 if variant in ROW_VARIANTS else 0
    shape = (4, SHARED_COLS if variant in SHARING_VARIANTS else 2100) if axis else (33, 4)
    x = random_x(shape, torch.float32, axis=axis)
    y = Fenced(shape, packed_strides(shape), x.dtype)
    check(legal(variant, x, None, y.view, axis)[:1], x, None, y, eps, axis)
    zero_row = y.view.movedim(axis, -1)[3]
    assert zero_row.isnan().all() if eps == 0 else (zero_row == 0).all()


@pytest.mark.parametrize("variant", FORWARD_VARIANTS)
def test_in_place(variant):
    """Where a variant says that y may be x, that gives the same bits as y beside x."""
    if not FORWARD_VARIANTS[variant].IN_PLACE:
        pytest.skip("the variant says that it can't, so the dispatcher never picks it for out=x")
    if variant == "cluster_row" and interpreting():
        pytest.skip("the interpreter has no clusters, and the dispatcher never picks them there")
    axis = 1 if variant in ROW_VARIANTS else 0
    shape = (5, 5000) if axis and variant != "multi_row" else (5, 300) if axis else (600, 5)
    x = fenced_copy(random_x(shape, torch.bfloat16, axis=axis))
    weight = random_weight(shape[axis], torch.float32)
    apart = Fenced(shape, packed_strides(shape), x.dtype)
    for config in spread(legal(variant, x, weight, x, axis)):
        launch(config, x, weight, apart.view, axis=axis)
        same = x.clone()
        launch(config, same, weight, same, axis=axis)
        assert torch.equal(same, apart.view), str(config)


def test_parts_of_a_row_agree():
    """All programs that share a row scale it by the same number: a row of equal values stays one."""
    x = torch.full((2, 12_289), 3.0, device=DEVICE)
    y = Fenced(x.shape, packed_strides(x.shape), x.dtype)
    for config in [config for variant in SHARING_VARIANTS for config in legal(variant, x, None, y.view)]:
        y.memory.fill_(math.nan)
        launch(config, x, None, y.view)
        y.assert_intact(config)
        assert (y.view == y.view[0, 0]).all(), str(config)
