"""Numerics modes: bit for bit the roundings of Llama's and Gemma's norms, gradients with a weight offset, and what else a mode meets.

Of `rmsnorm` and of `add_rmsnorm`.
"""

import functools
import itertools

import pytest
import torch

from gradient_oracle import assert_gradients
from kernels import InvalidInput, add_rmsnorm, rmsnorm
from kernels.add_launch import build_add_launcher
from kernels.backward_launch import build_backward_launcher
from kernels.device import INTERPRETER, current_device
from kernels.geometry import Geometry, geometry_of
from kernels.launch import build_launcher
from kernels.numerics import CASTINGS, Numerics
from kernels.variants import VARIANTS, candidates, cluster_row
from oracle import (
    BACKWARD_VARIANTS,
    DEVICE,
    DEVICE_INDEX,
    DTYPES,
    FORWARD_VARIANTS,
    INTERPRETED,
    SUM_BACKWARD_VARIANTS,
    SUM_VARIANTS,
    dtype_names,
    random_weight,
    random_x,
)
from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, Config

MODES = {"plain": {}, "llama": {"casting": "llama"}, "gemma": {"casting": "gemma", "weight_offset": 1.0}, "half": {"weight_offset": -0.5}}
ROUNDED = [
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter cuts bf16 off instead of rounding")),
]


@pytest.fixture(autouse=True)
def _clusters_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_variants.py."""
    monkeypatch.setattr(cluster_row, "ARCHES", (*cluster_row.ARCHES, INTERPRETER.arch))


@pytest.fixture(autouse=True)
def _compiles_anew() -> None:
    torch._dynamo.reset()


def by_formula(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_offset: float = 0.0,
    casting: str = "fp32",
    axis: int = -1,
    y_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x / rms · (weight + offset) in PyTorch's operations, rounded as the mode says: the formulas of LlamaRMSNorm and GemmaRMSNorm."""
    rows = x.float().movedim(axis, -1)
    normalized = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6)
    if casting == "llama":
        normalized = normalized.to(x.dtype).float()
    return (normalized * (weight_offset + weight.float())).to(y_dtype or x.dtype).movedim(-1, axis)


def legal(variant: str, geometry: Geometry, dtypes: tuple[str, str, str], op: str | None = None) -> list[Config]:
    problem = geometry.problem(*dtypes, op=op or VARIANTS[variant].OPS[0])
    return [config for config in candidates(problem, current_device()) if config.variant == variant]


def exact_x(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Small integers: their squares add up without rounding in any order, so that all who divide by a power of two form one rstd."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", FORWARD_VARIANTS)
def test_kernels_round_where_they_should(variant, mode, dtype):
    """Bit for bit, the weight in x's dtype and in fp32."""
    shape, axis = ((512, 3), 0) if variant == "strided_axis" else ((3, 4096 if variant in ("split_row", "cluster_row") else 2048), 1)
    x = exact_x(shape, dtype)
    arguments = MODES[mode]
    numerics = Numerics(arguments.get("weight_offset", 0.0), arguments.get("casting") == "llama")
    for w_dtype, at in ((dtype, 0), (torch.float32, -1)):
        weight, y = random_weight(shape[axis], w_dtype), torch.full_like(x, torch.nan)
        geometry, dtypes = geometry_of(shape, x.stride(), y.stride(), axis), dtype_names(x, weight, y)
        config = legal(variant, geometry, dtypes)[at]
        build_launcher(config, geometry, dtypes, DEVICE_INDEX, numerics=numerics)(y, x, weight, 1e-6)
        assert torch.equal(y, by_formula(x, weight, axis=axis, **arguments)), f"{config}, weight {w_dtype}"


PAIRS = {"fp16": (torch.float16,) * 2, "an fp32 stream": (torch.float16, torch.float32), "an fp16 stream": (torch.float32, torch.float16)}
"""Dtypes of x and residual."""


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", SUM_VARIANTS)
def test_kernels_of_sums_round_where_they_should(variant, mode, pair):
    """Bit for bit the norm of the sum, whose dtype is the residual's, rounded to x's."""
    shape = (3, 4096 if variant in ("split_row", "cluster_row") else 2048)
    x, residual = (exact_x(shape, dtype, seed) for seed, dtype in enumerate(PAIRS[pair]))
    arguments, weight = MODES[mode], random_weight(shape[1], torch.float16)
    numerics = Numerics(arguments.get("weight_offset", 0.0), arguments.get("casting") == "llama")
    y, total = torch.full_like(x, torch.nan), torch.full_like(residual, torch.nan)
    geometry, dtypes = geometry_of(shape, residual.stride(), x.stride(), 1), dtype_names(residual, weight, x)
    config = legal(variant, geometry, dtypes, ADD_FORWARD)[0]
    build_add_launcher(config, geometry, dtypes, DEVICE_INDEX, numerics)(y, total, x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, by_formula(total, weight, y_dtype=x.dtype, **arguments)), config


def test_the_modes_differ():
    """Otherwise the tests beside this one would tell nothing."""
    x, weight = exact_x((5, 2048), torch.float16), random_weight(2048, torch.float16)
    for one, other in itertools.combinations(MODES.values(), 2):
        assert not torch.equal(by_formula(x, weight, **one), by_formula(x, weight, **other))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_pytorch_rounds_where_it_should(mode, dtype):
    """Whatever the values: x̂ is formed by the same operations."""
    if mode == "plain":
        pytest.skip("F.rms_norm serves it, whose order of additions is its own")
    x, weight = random_x((6, 1000), dtype).cpu(), random_weight(1000, dtype).cpu()
    assert torch.equal(rmsnorm(x, weight, backend="torch", **MODES[mode]), by_formula(x, weight, **MODES[mode]))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_float32_and_float64_are_not_rounded_on_the_way(backend):
    for dtype in (torch.float32, torch.float64):
        x, weight = random_x((4, 33), dtype), random_weight(33, dtype)
        if backend == "torch":  # on a GPU F.rms_norm, which serves one of the two there, has an order of additions of its own
            x, weight = x.cpu(), weight.cpu()
        for offset in (0.0, 1.0):
            llama = rmsnorm(x, weight, casting="llama", weight_offset=offset, backend=backend)
            assert torch.equal(llama, rmsnorm(x, weight, casting="gemma", weight_offset=offset, backend=backend))


@pytest.mark.parametrize("mode", ["llama", "gemma"])
def test_transformers_classes(mode):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = {"llama": LlamaRMSNorm, "gemma": GemmaRMSNorm}[mode]
    for dtype, backend in itertools.product((torch.float16, torch.bfloat16), ("auto", "torch")):
        if INTERPRETED and backend == "auto" and dtype == torch.bfloat16:
            continue  # the interpreter cuts bf16 off instead of rounding
        norm = theirs(2048, eps=1e-6).to(DEVICE, dtype)
        with torch.no_grad():
            norm.weight.copy_(random_weight(2048, dtype))
            x = exact_x((5, 2048), dtype)
            assert torch.equal(rmsnorm(x, norm.weight, backend=backend, **MODES[mode]), norm(x)), f"{dtype}, {backend}"


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_modes_of_one_shape_do_not_mix(calls):
    """Prepared, found by the full key, and found by the check of the tensors."""
    x, weight = exact_x((5, 2048), torch.float16), random_weight(2048, torch.float16)
    for _ in range(calls):
        results = {mode: rmsnorm(x, weight, **arguments) for mode, arguments in MODES.items()}
    for mode, y in results.items():
        assert torch.equal(y, by_formula(x, weight, **MODES[mode])), mode
    explicit = rmsnorm(x, weight, weight_offset=float("0"), casting="".join(["fp", "32"]))  # equal to the defaults, other objects
    assert torch.equal(explicit, results["plain"])


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("variant", BACKWARD_VARIANTS)
def test_gradients_with_an_offset(variant, x_dtype):
    """As those of the sum of weight and offset, which is exact here: multiples of 2⁻⁷ from 0 to 1, less a half."""
    cols = 2100 if variant == "backward_split_row" else 130
    x, dy = random_x((5, cols), x_dtype), random_x((5, cols), x_dtype, seed=1)
    for w_dtype, at in ((x_dtype, 0), (torch.float32, -1)):
        weight = (torch.arange(cols, device=DEVICE) % 128 / 128).to(w_dtype)
        geometry, dtypes = geometry_of(x.shape, x.stride(), dy.stride(), 1), dtype_names(x, weight, dy)
        dx, dw = torch.full_like(x, torch.nan), torch.full_like(weight, torch.nan)
        config = legal(variant, geometry, dtypes)[at]
        build_backward_launcher(config, geometry, dtypes, DEVICE_INDEX, numerics=Numerics(-0.5, True))(dx, dw, dy, x, weight, 1e-6)
        assert_gradients(dx, dw, dy, x, weight - 0.5, note=config)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("variant", SUM_BACKWARD_VARIANTS)
def test_gradients_of_sums_with_an_offset(variant, x_dtype):
    cols = 2100 if variant == "backward_split_row" else 130
    total, dy, dsum = (random_x((5, cols), x_dtype, seed=seed) for seed in range(3))
    weight = (torch.arange(cols, device=DEVICE) % 128 / 128).to(x_dtype)
    geometry, dtypes = geometry_of(total.shape, total.stride(), dy.stride(), 1), dtype_names(total, weight, dy)
    dx, dw = torch.full_like(total, torch.nan), torch.full_like(weight, torch.nan)
    config = legal(variant, geometry, dtypes, ADD_BACKWARD)[0]
    launch = build_backward_launcher(config, geometry, dtypes, DEVICE_INDEX, adds=True, numerics=Numerics(-0.5, True))
    launch(dx, dw, dy, total, weight, 1e-6, dsum, None)
    assert_gradients(dx, dw, dy, total, weight - 0.5, note=config, dsum=dsum)


@pytest.mark.parametrize("casting", CASTINGS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_autograd(backend, casting):
    """First and second derivatives in fp32, where no casting rounds, are those of the sum of weight and offset."""
    x, dy = (random_x((5, 40), torch.float32, seed=seed).requires_grad_() for seed in (0, 1))
    weight = (torch.arange(40, device=DEVICE) / 64).requires_grad_()
    y = rmsnorm(x, weight, weight_offset=1.0, casting=casting, backend=backend)
    dx, dw = torch.autograd.grad(y, (x, weight), dy, create_graph=True)
    assert_gradients(dx, dw, dy, x, weight + 1)
    assert_gradients(*torch.autograd.grad(y, (x, weight), dy.detach(), retain_graph=True), dy, x, weight + 1)

    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight, dy)]
    rows = wide[0] * torch.rsqrt(wide[0].square().mean(-1, keepdim=True) + 1e-6) * (wide[1] + 1)
    wide_dx, wide_dw = torch.autograd.grad(rows, wide[:2], wide[2], create_graph=True)
    second = torch.autograd.grad(dx[:2].sum() + dw.sum(), (x, weight, dy))
    exact = torch.autograd.grad(wide_dx[:2].sum() + wide_dw.sum(), wide)
    for got, want in zip(second, exact, strict=True):  # sums of some 200 terms, each of a dozen fp32 roundings
        assert ((got - want).abs() <= 4096 * 2.0**-24 * want.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("casting", CASTINGS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_autograd_of_sums(backend, casting):
    """As `test_autograd`; the sum is formed of integers, without rounding."""
    x, residual = (exact_x((5, 40), torch.float32, seed).requires_grad_() for seed in (0, 1))
    dy, dsum = (random_x((5, 40), torch.float32, seed=seed).requires_grad_() for seed in (2, 3))
    weight = (torch.arange(40, device=DEVICE) / 64).requires_grad_()
    y, total = add_rmsnorm(x, residual, weight, weight_offset=1.0, casting=casting, backend=backend)
    inputs = x, residual, weight
    for is_second in (False, True):
        directions = (dy, dsum) if is_second else (dy.detach(), dsum.detach())
        dx, dresidual, dw = torch.autograd.grad((y, total), inputs, directions, create_graph=is_second, retain_graph=True)
        assert_gradients(dx, dw, dy, total, weight + 1, dsum=dsum)
        assert torch.equal(dresidual, dx)

    wide = [tensor.detach().double().requires_grad_() for tensor in (*inputs, dy, dsum)]
    wide_total = wide[0] + wide[1]
    rows = wide_total * torch.rsqrt(wide_total.square().mean(-1, keepdim=True) + 1e-6) * (wide[2] + 1)
    wide_dx, wide_dw = torch.autograd.grad((rows, wide_total), (wide[0], wide[2]), wide[3:], create_graph=True)
    second = torch.autograd.grad(dx[:2].sum() + dw.sum(), (*inputs, dy, dsum))
    exact = torch.autograd.grad(wide_dx[:2].sum() + wide_dw.sum(), wide)
    for got, want in zip(second, exact, strict=True):  # the bound of `test_autograd`
        assert ((got - want).abs() <= 4096 * 2.0**-24 * want.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("mode", MODES)
def test_what_wraps_a_call(mode):
    """torch.compile, vmap, an axis, an `out` and a lazily copied input: all go by ways of their own, and round alike."""
    x, weight = exact_x((4, 5, 64), torch.float16), random_weight(64, torch.float16)
    want, arguments = by_formula(x, weight, **MODES[mode]), MODES[mode]
    if mode != "plain":  # F.rms_norm adds in an order of its own
        compiled = torch.compile(lambda x, weight: rmsnorm(x, weight, **arguments), fullgraph=True, backend="eager")
        assert torch.equal(compiled(x, weight), want)
        assert torch.equal(torch.func.vmap(lambda x: rmsnorm(x, weight, **arguments))(x), want)
    out = torch.empty_like(x)
    assert rmsnorm(x, weight, out=out, **arguments) is out
    assert torch.equal(out, want)
    assert torch.equal(rmsnorm(x.movedim(-1, 0), weight, axis=0, **arguments), want.movedim(-1, 0))
    strided = torch.empty((4, 2, 5, 3, 64), dtype=x.dtype, device=DEVICE)[:, 0, :, 0].copy_(x).unsqueeze(0).expand(3, -1, -1, -1)
    assert torch.equal(rmsnorm(strided, weight, **arguments), want.expand(3, -1, -1, -1))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("mode", MODES)
def test_what_wraps_a_call_of_a_sum(mode, pair):
    """As `test_what_wraps_a_call`, a second call by the shortcut, and PyTorch's own way."""
    (x, residual), weight = (exact_x((4, 5, 64), dtype, seed) for seed, dtype in enumerate(PAIRS[pair])), random_weight(64, torch.float16)
    arguments, total = MODES[mode], x + residual
    total = total.to(residual.dtype)
    want = by_formula(total, weight, y_dtype=x.dtype, **arguments)

    def check(results, order=lambda tensor: tensor):
        assert torch.equal(results[0], order(want))
        assert torch.equal(results[1], order(total))

    call = functools.partial(add_rmsnorm, weight=weight, **arguments)
    for _ in range(2):
        check(call(x, residual))
    out, residual_out = torch.empty_like(x), torch.empty_like(residual)
    check(call(x, residual, out=out, residual_out=residual_out))
    for _ in range(2):
        own_x, own_residual = x.clone(), residual.clone()
        check(call(own_x, own_residual, out=own_x, residual_out=own_residual))
    if mode != "plain":  # F.rms_norm adds in an order of its own
        check(call(x, residual, backend="torch"))
        check(torch.compile(call, fullgraph=True, backend="eager")(x, residual))
        check(torch.func.vmap(call)(x, residual))
    apart = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in (x, residual)]
    check(call(*apart))


def test_modes_of_one_sum_do_not_mix():
    x, residual, weight = exact_x((5, 2048), torch.float16), exact_x((5, 2048), torch.float16, 1), random_weight(2048, torch.float16)
    for _ in range(3):  # prepared, remembered, and found by the check of the tensors
        results = {mode: add_rmsnorm(x, residual, weight, **arguments)[0] for mode, arguments in MODES.items()}
    for mode, y in results.items():
        assert torch.equal(y, by_formula(x + residual, weight, **MODES[mode])), mode


@pytest.mark.parametrize("function", [rmsnorm, add_rmsnorm], ids=lambda function: function.__name__)
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"casting": "bf16"}, "casting is 'bf16'; use one of fp32, llama, gemma"),
        ({"casting": None}, "casting is None"),
        ({"weight_offset": float("nan")}, "weight_offset is nan; pass a finite number"),
        ({"weight_offset": float("inf")}, "weight_offset is inf"),
        ({"weight_offset": True}, "weight_offset is True"),
        ({"weight_offset": "1"}, "weight_offset is '1'"),
        ({"weight": None, "weight_offset": 1}, "weight_offset is 1.0, but there is no weight"),
    ],
    ids=str,
)
def test_bad_modes(arguments, words, compiles, function):
    call = torch.compile(function, backend="eager") if compiles else function
    tensors = {"x": torch.ones(2, 8, device=DEVICE), "weight": torch.ones(8, device=DEVICE)}
    if function is add_rmsnorm:
        tensors["residual"] = torch.ones(2, 8, device=DEVICE)
    error = (InvalidInput, RuntimeError) if compiles else InvalidInput  # what an operator refuses, PyTorch says
    for _ in range(2):
        with pytest.raises(error, match=words):
            call(**{**tensors, **arguments})


def test_a_tensor_as_offset():
    with pytest.raises(InvalidInput, match="weight_offset is a tensor, which would make every call wait"):
        rmsnorm(torch.ones(2, 8, device=DEVICE), torch.ones(8, device=DEVICE), weight_offset=torch.ones(()))
