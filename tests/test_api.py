"""`rmsnorm` as its users call it: arguments, shapes, strides, out, backends, transforms, threads, and what a second call costs."""

import inspect
import itertools
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from interpreters import run_python
from kernels import InvalidInput, api, dispatch, override, plans, rmsnorm, stats
from kernels.api import forget_plans
from kernels.device import current_device
from kernels.geometry import geometry_of
from kernels.settings import SettingsError, user_database
from kernels.shortcuts import LONG_RUN, NOTHING, Shortcuts
from kernels.variants import VARIANTS, candidates, space
from oracle import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    Fenced,
    assert_rmsnorm,
    expected_rmsnorm,
    fenced_copy,
    packed_strides,
    random_weight,
    random_x,
)
from tuning_db.model import ANY_ROWS, Config, Device, Measurement, Problem, Role, Status, Sweep, Trial
from tuning_db.store import open_for_writing

ROOT = Path(__file__).parents[1]


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layouts of all Problems looked up in this test."""
    seen: list[str] = []
    real = dispatch.choose_and_prepare

    def noted(geometry, *args, **kwargs):
        seen.append(geometry.layout)
        return real(geometry, *args, **kwargs)

    monkeypatch.setattr(dispatch, "choose_and_prepare", noted)
    return seen


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=DEVICE)


X = (4, 8)
OTHER_DEVICE = torch.ones(8, device="meta")

INVALID = {
    "x a list": (lambda: {"x": [1.0]}, "list"),
    "x an array": (lambda: {"x": np.ones((4, 8))}, "ndarray"),
    "x None": (lambda: {"x": None}, "NoneType"),
    "x sparse": (lambda: {"x": ones(*X).to_sparse()}, "sparse_coo"),
    "x of integers": (lambda: {"x": ones(*X, dtype=torch.int64)}, "int64"),
    "x complex": (lambda: {"x": ones(*X, dtype=torch.complex64)}, "complex64"),
    "x without dimensions": (lambda: {"x": ones()}, "no dimensions"),
    "x empty": (lambda: {"x": ones(0, 8)}, r"\(0, 8\)"),
    "x without columns": (lambda: {"x": ones(8, 0)}, r"\(8, 0\)"),
    "axis too large": (lambda: {"axis": 2}, "axis is 2.*2 dimensions"),
    "axis too small": (lambda: {"axis": -3}, "axis is -3"),
    "axis a float": (lambda: {"axis": 1.0}, r"1\.0"),
    "axis a bool": (lambda: {"axis": True}, "True"),
    "axis None": (lambda: {"axis": None}, "None"),
    "axis a tuple": (lambda: {"axis": (0, 1)}, r"\(0, 1\)"),
    "weight too short": (lambda: {"weight": ones(7)}, r"\(7,\).*\(8,\)"),
    "weight of the other axis": (lambda: {"weight": ones(8), "axis": 0}, r"\(8,\).*\(4,\)"),
    "weight of two dimensions": (lambda: {"weight": ones(1, 8)}, r"\(1, 8\)"),
    "weight of integers": (lambda: {"weight": ones(8, dtype=torch.int32)}, "int32"),
    "weight a list": (lambda: {"weight": [1.0] * 8}, "list"),
    "weight a number": (lambda: {"weight": 2.0}, "float"),
    "weight elsewhere": (lambda: {"weight": OTHER_DEVICE}, "meta"),
    "eps negative": (lambda: {"eps": -1e-6}, "-1e-06"),
    "eps NaN": (lambda: {"eps": float("nan")}, "nan"),
    "eps a tensor": (lambda: {"eps": torch.tensor(1e-6)}, "tensor"),
    "eps None": (lambda: {"eps": None}, "None"),
    "eps a string": (lambda: {"eps": "small"}, "small"),
    "backend unknown": (lambda: {"backend": "cuda"}, "cuda"),
    "backend None": (lambda: {"backend": None}, "None"),
    "triton for float64": (lambda: {"x": ones(*X, dtype=torch.float64), "backend": "triton"}, "float64"),
    "out of another shape": (lambda: {"out": ones(8, 4)}, r"\(8, 4\)"),
    "out of another dtype": (lambda: {"out": ones(*X, dtype=torch.float16)}, "float16"),
    "out elsewhere": (lambda: {"out": torch.ones(X, device="meta")}, "meta"),
    "out a list": (lambda: {"out": []}, "list"),
    "out expanded": (lambda: {"out": ones(1, 8).expand(4, 8)}, "stride 0"),
    "out with a gradient due": (lambda: {"x": ones(*X).requires_grad_(), "out": ones(*X)}, "out was given"),
}


@pytest.mark.parametrize("seen_before", [False, True], ids=["first call", "after a good call"])
@pytest.mark.parametrize("name", INVALID)
def test_invalid_input(name, seen_before):
    """Both exception types, and the value seen in the text, whether or not a plan for such tensors is remembered."""
    if seen_before:
        for axis in (0, 1, -1):
            rmsnorm(ones(*X), axis=axis)
    make, pattern = INVALID[name]
    arguments = {"x": ones(*X), **make()}
    for kind in (InvalidInput, ValueError, AssertionError):
        with pytest.raises(kind, match=f"(?s){pattern}"):
            rmsnorm(**arguments)


def test_a_cpu_tensor_needs_the_way_out(monkeypatch):
    monkeypatch.setattr(plans, "interpreting", lambda: False)
    x = torch.randn(4, 8)
    with pytest.raises(InvalidInput, match=r'(?s)cpu.*x\.cuda\(\).*backend="torch"'):
        rmsnorm(x)
    assert_rmsnorm(rmsnorm(x, backend="torch").to(DEVICE), x.to(DEVICE))


@pytest.mark.parametrize("shape", [(1,), (5,), (128,), (3, 1), (4, 7), (2, 3, 5), (2, 3, 4, 5), (2, 1, 3, 2, 5)])
@pytest.mark.parametrize("weighted", [False, True])
def test_any_shape_and_axis(shape, weighted):
    for axis in range(-len(shape), len(shape)):
        x = random_x(shape, torch.float32, axis=axis)
        weight = random_weight(shape[axis], torch.float32) if weighted else None
        y = rmsnorm(x, weight, axis=axis)
        assert y.stride() == torch.empty_like(x).stride()
        assert_rmsnorm(y, x, weight, axis=axis, note=f"axis {axis}")


def strided_views() -> dict[str, torch.Tensor]:
    base = random_x((6, 10, 16), torch.float32, seed=3)
    return {
        "transposed": base[0].t(),
        "permuted": base.permute(2, 0, 1),
        "batch and token swapped": base.transpose(0, 1),
        "sliced columns": base[..., 3:14],
        "every second row": base[:, ::2],
        "every second column": base[..., ::2],
        "offset": base[1:, 2:, 5:],
        "expanded rows": base[0, 0].expand(7, 16),
        "expanded columns": base[0, :, :1].expand(10, 16),
        "expanded batch": base[:1].expand(4, 10, 16),
        "one element after the start": base.flatten()[1:].view(-1)[:320].view(20, 16),
        "diagonal": base[0].diagonal().expand(3, 10),
        "windows that overlap": base.flatten().unfold(0, 16, 5),
        "channels last": base[:, :, :, None].expand(6, 10, 16, 3).contiguous(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("name", strided_views())
def test_strided_inputs(name):
    x = strided_views()[name]
    for axis in range(x.dim()):
        weight = random_weight(x.shape[axis], torch.float32)
        y = rmsnorm(x, weight, axis=axis)
        assert y.stride() == torch.empty_like(x).stride()
        assert_rmsnorm(y, x, weight, axis=axis, note=f"axis {axis}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [1, 3, 8])
def test_misaligned_inputs(dtype, shift):
    """buf[1:], after an aligned call of the same shape has been prepared."""
    x = random_x((5, 64), dtype)
    assert_rmsnorm(rmsnorm(x), x)
    moved = torch.empty(5 * 64 + shift, dtype=dtype, device=DEVICE)[shift:].view(5, 64).copy_(x)
    weight = torch.empty(64 + shift, dtype=dtype, device=DEVICE)[shift:].uniform_(0.5, 1.5)
    assert_rmsnorm(rmsnorm(moved, weight), moved, weight)
    out = torch.empty(5 * 64 + shift, dtype=dtype, device=DEVICE)[shift:].view(5, 64)
    assert_rmsnorm(rmsnorm(x, weight, out=out), x, weight)


def test_a_strided_weight():
    x, weight = random_x((4, 16), torch.float32), random_weight(32, torch.float32)
    for view in (weight[::2], weight[:1].expand(16), weight[16:]):
        assert_rmsnorm(rmsnorm(x, view), x, view)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(4, 33), (5, 1), (1, 6)])
def test_a_negated_view(shape, axis):
    """`.conj().imag` reads as minus what lies in memory."""
    z = torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = z.conj().imag
    assert x.is_neg()
    assert_rmsnorm(rmsnorm(z.imag, axis=axis), z.imag, axis=axis)
    assert_rmsnorm(rmsnorm(x, axis=axis), x, axis=axis)
    weight = torch.complex(torch.zeros(shape[axis]), torch.ones(shape[axis])).to(DEVICE).conj().imag
    assert_rmsnorm(rmsnorm(z.real, weight, axis=axis), z.real, weight, axis=axis)


def test_q_and_k_of_a_packed_qkv_are_read_in_place(lookups, monkeypatch):
    tokens, heads, dim = 6, 4, 16
    qkv = random_x((tokens, 3 * heads * dim), torch.bfloat16)
    q, k, _ = (part.view(tokens, heads, dim) for part in qkv.split(heads * dim, dim=1))
    assert geometry_of(q.shape, q.stride(), packed_strides(q.shape), 2).layout == "two_stride"
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("copied"))
    weight = random_weight(dim, torch.bfloat16)
    for part in (q, k):
        assert_rmsnorm(rmsnorm(part, weight), part, weight)
        rmsnorm(part, weight, out=part)  # in place, inside qkv
    assert set(lookups) == {"two_stride"}


def test_rows_at_three_strides_are_copied(lookups):
    x = random_x((3, 6, 4, 16), torch.float32)[:, :5, :3, :8]
    weight = random_weight(8, torch.float32)
    assert geometry_of(x.shape, x.stride(), packed_strides(x.shape), 3) is None
    for _ in range(2):
        assert_rmsnorm(rmsnorm(x, weight), x, weight)
    out = Fenced(x.shape, x.stride(), x.dtype)
    assert rmsnorm(x, weight, out=out.view) is out.view
    out.assert_intact()
    assert_rmsnorm(out.view, x, weight)
    before = x.clone()
    rmsnorm(x, weight, out=x)
    assert_rmsnorm(x, before, weight)
    assert set(lookups) == {"contiguous"}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("strides", [(64, 1), (70, 1), (1, 5), (128, 2)])
def test_out(dtype, strides):
    x, weight = random_x((5, 64), dtype), random_weight(64, torch.float32)
    out = Fenced(x.shape, strides, dtype)
    assert rmsnorm(x, weight, out=out.view) is out.view
    out.assert_intact()
    assert_rmsnorm(out.view, x, weight)


@pytest.mark.parametrize(("shape", "axis"), [((5, 64), 0), ((5, 64), 1), ((3, 500), 0), ((3, 5000), 1), ((2, 40_000), 1)])
def test_in_place(shape, axis):
    x = random_x(shape, torch.float32, axis=axis)
    before = x.clone()
    assert rmsnorm(x, axis=axis, out=x) is x
    assert_rmsnorm(x, before, axis=axis)


def test_in_place_never_runs_a_variant_that_reads_x_late():
    """For each Problem the ladder may be asked: with a record of split_row as with none, out=x goes to a variant that allows it."""
    problem = Problem("rmsnorm", "float32", "none", "float32", 2, 40_000)
    for config in candidates(problem, current_device()):
        pick = dispatch.pick_config(problem, current_device(), in_place=True, config=config)
        assert VARIANTS[pick.config.variant].IN_PLACE


def overlapping() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    memory = torch.zeros(4 * 64 + 64, device=DEVICE)
    square = torch.zeros(16, 16, device=DEVICE)
    return {
        "one element later": (memory[:256].view(4, 64), memory[1:257].view(4, 64)),
        "one row later": (memory[:256].view(4, 64), memory[64:].view(4, 64)),
        "one row earlier": (memory[64:].view(4, 64), memory[:256].view(4, 64)),
        "the transpose of x": (square, square.t()),
        "x the transpose": (square.t(), square),
    }


@pytest.mark.parametrize("name", overlapping())
def test_out_that_overlaps_in_part_is_refused(name):
    """As torch.add refuses it."""
    x, out = overlapping()[name]
    with pytest.raises(RuntimeError):
        torch.add(x, 1, out=out)
    with pytest.raises(InvalidInput, match="overlap"):
        rmsnorm(x, out=out)


def test_out_beside_x_in_one_memory():
    """Views of one buffer that share no element are fine: k written beside q, even columns into odd ones."""
    memory = random_x((4, 64), torch.float32)
    before = memory.clone()
    rmsnorm(memory[:, :32], out=memory[:, 32:])
    assert torch.equal(memory[:, :32], before[:, :32])
    assert_rmsnorm(memory[:, 32:], before[:, :32])
    rmsnorm(memory[:, ::2], out=memory[:, 1::2])
    assert_rmsnorm(memory[:, 1::2], memory[:, ::2])


@pytest.mark.parametrize("which", ["x", "weight"])
def test_float64_is_pytorchs(which):
    x, weight = random_x((4, 16), torch.float32), random_weight(16, torch.float32)
    x, weight = (x.double(), weight) if which == "x" else (x, weight.double())
    y = rmsnorm(x, weight)
    assert y.dtype == x.dtype
    assert_rmsnorm(y, x, weight)
    assert stats() == {"torch_requested": 1}


@pytest.mark.parametrize("which", ["x", "weight", "both"])
@pytest.mark.parametrize("axis", [0, 1])
def test_inputs_that_require_grad(which, axis):
    """Differentiable, and equal to the same call without gradients; derivatives against the formula's own in float64."""
    x, weight = random_x((4, 16), torch.float32, axis=axis), random_weight((4, 16)[axis], torch.float32)
    x, weight = x + 0.1, weight.clone()
    plain = rmsnorm(x, weight, axis=axis)
    x.requires_grad_(which != "weight")
    weight.requires_grad_(which != "x")
    y = rmsnorm(x, weight, axis=axis)
    assert_rmsnorm(y, x, weight, axis=axis)
    assert_rmsnorm(plain, x, weight, axis=axis)
    leaves = [leaf for leaf in (x, weight) if leaf.requires_grad]
    torch.manual_seed(0)
    direction = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, direction)
    wide = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in (x, weight)]
    rows = wide[0].movedim(axis, -1)
    exact = rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt() * wide[1]
    want = torch.autograd.grad(exact.movedim(-1, axis), [leaf for leaf in wide if leaf.requires_grad], direction.double())
    for a, b in zip(got, want, strict=True):
        # A difference of two terms, each rounded some 30 times in fp32, of the size of the largest derivative.
        assert (a.double() - b).abs().max() <= 64 * 2.0**-24 * b.abs().max()


def test_no_grad_runs_the_kernel(lookups):
    x = random_x((4, 16), torch.float32).requires_grad_()
    with torch.no_grad():
        assert not rmsnorm(x).requires_grad
    with torch.inference_mode():
        y = rmsnorm(x, torch.nn.Parameter(torch.ones(16, device=DEVICE)))
    assert_rmsnorm(y, x)
    assert len(lookups) == 2
    assert rmsnorm(x).requires_grad  # the plans above are not this call's


def test_inference_tensors(lookups):
    with torch.inference_mode():
        x = random_x((4, 16), torch.float32)
        assert_rmsnorm(rmsnorm(x, out=torch.empty_like(x)), x)
    assert_rmsnorm(rmsnorm(x), x)
    assert lookups


@pytest.mark.parametrize("shape", [(4, 16), (3,), (0, 16), (4, 0), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_backend_torch(shape, dtype):
    """Any device, any float dtype, empty or not."""
    x, weight = torch.randn(shape).to(dtype), torch.rand(shape[-1]).to(dtype)
    y = rmsnorm(x, weight, backend="torch")
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    # tolerance() allows for the interpreter in bf16; PyTorch rounds to nearest everywhere, which is within that.
    assert_rmsnorm(y, x, weight)


def test_backend_triton(lookups):
    x = random_x((4, 16), torch.float32)
    assert_rmsnorm(rmsnorm(x, backend="triton"), x)
    assert lookups == ["contiguous"]


def test_the_environment_names_the_backend(monkeypatch):
    x = random_x((4, 16), torch.float32)
    monkeypatch.setenv("RMSNORM_BACKEND", "torch")
    assert_rmsnorm(rmsnorm(x), x)
    assert stats() == {"torch_requested": 1}
    rmsnorm(x, backend="triton")  # the argument wins
    assert stats() == {"torch_requested": 1, "heuristic": 1}
    forget_plans()
    monkeypatch.setenv("RMSNORM_BACKEND", "cutlass")
    with pytest.raises(SettingsError, match=r"cutlass.*auto, triton, torch"):
        rmsnorm(x)


@pytest.mark.parametrize("cols", [64, 1000, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariant(cols, dtype):
    """The bits of a row are the same alone, among 3 and among 65 rows."""
    x, weight = random_x((65, cols), dtype), random_weight(cols, dtype)
    among_65 = rmsnorm(x, weight, batch_invariant=True)
    assert_rmsnorm(among_65, x, weight)
    for rows in (1, 3, 17):
        assert torch.equal(rmsnorm(x[:rows], weight, batch_invariant=True), among_65[:rows])
    configs = set()
    for rows in (1, 64, 4096, 10**6):
        nest = geometry_of((rows, cols), (cols, 1), (cols, 1), 1)
        name = str(dtype).removeprefix("torch.")
        device_index = -1 if INTERPRETED else 0
        configs.add(dispatch.choose_and_prepare(nest, (name, name, name), device_index, in_place=False, batch_invariant=True).pick.config)
    assert len(configs) == 1


@pytest.mark.parametrize("planned", [False, True], ids=["first call", "after a plain call"])
@pytest.mark.parametrize("over", ["x", "weight", "both", "x along columns"])
def test_vmap(over, planned):
    xs, weights = random_x((3, 5, 16), torch.float32), random_x((3, 16), torch.float32, seed=2)
    if planned:
        rmsnorm(xs[0], weights[0])
    x_dim = {"x": 0, "both": 0, "x along columns": 1}.get(over)
    w_dim = 0 if over in ("weight", "both") else None
    x = xs if x_dim is not None else xs[0]
    weight = weights if w_dim == 0 else weights[0]
    y = torch.func.vmap(rmsnorm, in_dims=(x_dim, w_dim), out_dims=0)(x, weight)
    for i in range(y.shape[0]):
        x_i = xs[0] if x_dim is None else xs.select(x_dim, i)
        assert_rmsnorm(y[i], x_i, weights[i] if w_dim == 0 else weights[0])


def test_a_transform_leaves_no_plan_behind(lookups):
    """A first call under vmap decides nothing for the plain calls after it: they run a kernel."""
    xs = random_x((3, 5, 16), torch.float32)
    torch.func.vmap(rmsnorm)(xs)
    assert_rmsnorm(rmsnorm(xs[0]), xs[0])
    assert lookups == ["contiguous"]


DERIVATIVES = {
    "jvp": lambda x, direction: torch.func.jvp(rmsnorm, (x,), (direction,))[1],
    "dual tensor": lambda x, direction: dual_tangent(rmsnorm, x, direction),
}


def dual_tangent(function, x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor | None:
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(function(torch.autograd.forward_ad.make_dual(x, direction))).tangent


@pytest.mark.parametrize("planned", [False, True], ids=["first call", "after a plain call"])
@pytest.mark.parametrize("way", DERIVATIVES)
def test_forward_mode_derivatives(way, planned):
    x, direction = random_x((3, 16), torch.float32), random_x((3, 16), torch.float32, seed=5)
    if planned:
        rmsnorm(x)
    want = torch.func.jvp(lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), (x.double(),), (direction.double(),))[1]
    got = DERIVATIVES[way](x, direction)
    assert got is not None
    # A difference of two terms of the size of the largest, each rounded some 30 times in fp32.
    assert (got - want).abs().max() <= 64 * 2.0**-24 * want.abs().max()


@pytest.mark.parametrize("planned", [False, True], ids=["first call", "after a plain call"])
def test_func_grad(planned):
    x, direction = random_x((3, 16), torch.float32), random_x((3, 16), torch.float32, seed=5)
    if planned:
        rmsnorm(x)
    got = torch.func.grad(lambda x: (rmsnorm(x) * direction).sum())(x)
    plain = x.clone().requires_grad_()
    (rmsnorm(plain, backend="torch") * direction).sum().backward()
    # Two ways to the same difference of two terms, each rounded some 30 times in fp32.
    assert (got - plain.grad).abs().max() <= 64 * 2.0**-24 * plain.grad.abs().max()


@pytest.mark.parametrize("needs_grad", [False, True])
def test_autocast_keeps_the_dtype(needs_grad):
    x, weight = random_x((4, 16), torch.float32), random_weight(16, torch.float32)
    x.requires_grad_(needs_grad)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = rmsnorm(x, weight)
    assert y.dtype == torch.float32
    assert_rmsnorm(y, x, weight)


@pytest.mark.parametrize("axis", [-1, 0])
def test_torch_compile(axis):
    x, weight = random_x((4, 16), torch.float32, axis=axis), random_weight((4, 16)[axis], torch.float32)

    def model(x, weight):
        return rmsnorm(x * 2, weight, 1e-5, axis) + 1

    y = torch.compile(model, fullgraph=True, backend="eager")(x, weight)
    want = expected_rmsnorm(x * 2, weight, 1e-5, axis) + 1
    assert (y.double() - want).abs().max() <= 2.0**-20 * want.abs().max()  # within 16 fp32 roundings of the largest element


def test_a_tensor_subclass_keeps_its_own_operations():
    class Logged(torch.Tensor):
        pass

    x = random_x((4, 16), torch.float32)
    rmsnorm(x)
    y = rmsnorm(x.as_subclass(Logged))
    assert isinstance(y, Logged)
    assert_rmsnorm(y.as_subclass(torch.Tensor), x)


def test_stats_counts_kinds_of_calls():
    assert stats() == {}
    for _ in range(3):
        rmsnorm(ones(4, 8))
    assert stats() == {"heuristic": 1}
    rmsnorm(ones(5, 8))
    rmsnorm(ones(4, 8), backend="torch")
    with override(Config.of("looped", block_cols=2048, num_warps=4)):
        rmsnorm(ones(4, 8))
    rmsnorm(ones(4, 8))
    assert stats() == {"heuristic": 2, "torch_requested": 1, "override": 1}


def test_override_runs_the_config(monkeypatch):
    """And a config that is not legal is not run."""
    ran = []
    real = dispatch.build_launcher
    monkeypatch.setattr(dispatch, "build_launcher", lambda config, *rest: ran.append(config) or real(config, *rest))
    x = random_x((4, 200), torch.float32)
    looped = Config.of("looped", block_cols=2048, num_warps=4)
    with override(looped):
        assert_rmsnorm(rmsnorm(x), x)
    with override(Config.of("looped", block_cols=3, num_warps=4)):
        assert_rmsnorm(rmsnorm(x), x)
    assert ran[0] == looped
    assert ran[1].params.get("block_cols") != 3


def torch_launcher(config, geometry, dtypes, device_index, allocate, numerics):
    """Stands in for build_launcher where the interpreter, which is not thread-safe, would get in the way. Two-dimensional x only."""
    del config, geometry, dtypes, device_index, allocate, numerics

    def launch(y, x, weight, eps):
        return (torch.empty_like(x) if y is None else y).copy_(expected_rmsnorm(x, weight, eps))

    return launch


def test_eight_threads_first_calling_at_once(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(dispatch, "build_launcher", torch_launcher)
    monkeypatch.setattr(api, "MAX_PLANS", 5)  # so that the table is also emptied while others read it
    xs = [random_x((rows, 16), torch.float32) for rows in range(1, 9)]
    together, faults = threading.Barrier(8), []

    def work():
        together.wait()
        try:
            for x in itertools.chain(*[xs] * 5):
                assert_rmsnorm(rmsnorm(x), x)
                stats()
        except BaseException as fault:  # carried to the test's own thread, which raises it
            faults.append(fault)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


def test_the_plan_table_is_bounded(monkeypatch):
    monkeypatch.setattr(api, "MAX_PLANS", 4)
    for rows in range(1, 12):
        x = random_x((rows, 8), torch.float32)
        assert_rmsnorm(rmsnorm(x), x)
        assert 1 <= len(api._plans) <= 4


def test_a_second_call_looks_nothing_up(monkeypatch):
    x, weight, other = random_x((4, 16), torch.float32), random_weight(16, torch.float32), random_x((4, 16), torch.float32, seed=9)
    rmsnorm(x, weight)

    def looked_up(*_, **__):
        raise AssertionError("looked up again")

    for name in ("choose_and_prepare", "pick_config", "record_index", "build_launcher"):
        monkeypatch.setattr(dispatch, name, looked_up)
    monkeypatch.setattr(plans, "prepare", looked_up)
    assert_rmsnorm(rmsnorm(other, weight), other, weight)
    assert_rmsnorm(rmsnorm(other, weight, 1e-3), other, weight, 1e-3)  # eps is no part of a plan


def test_a_second_call_opens_and_imports_nothing():
    source = """
    import os, sys, torch
    from kernels import rmsnorm
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    x = torch.randn(4, 16, device=device)
    weight = torch.randn(16, device=device)
    rmsnorm(x, weight)
    events, watched = [], True
    sys.addaudithook(lambda event, args: events.append((event, str(args)[:200])) if watched else None)
    before = set(sys.modules)
    rmsnorm(x, weight)
    watched = False
    kinds = ("open", "import", "os.", "sqlite3", "subprocess", "socket", "ctypes.dlopen", "compile", "exec")
    print([event for event in events if event[0].startswith(kinds)], set(sys.modules) - before)
    """
    assert run_python(source) == "[] set()\n"


@pytest.mark.parametrize("revision", ["this", "another"])
def test_a_record_decides(revision, monkeypatch):
    """From a trial in the user's database to the config that runs; one of another revision is ignored."""
    x = random_x((4, 200), torch.float32)
    problem = geometry_of(x.shape, x.stride(), x.stride(), 1).problem("float32", "none", "float32")
    config = Config.of("looped", block_cols=2048, num_warps=8)
    device, version = current_device(), VARIANTS["looped"].REVISION + (revision == "another")
    trial = Trial(
        uid="t1", sweep_uid="s1", race_uid="r1", device_uid=device.uid, problem=problem, config=config, role=Role.CANDIDATE,
        status=Status.OK, final=True, created_at="2025-01-01T00:00:00Z", revision=version, source_hash="", triton_version="",
        torch_version="", measurement=Measurement("graph", 2.0, 1.9, 2.1, 0.9, 30),
    )  # fmt: skip
    user_database().parent.mkdir(parents=True)
    with open_for_writing(user_database()) as database:
        database.add_device(device)
        database.add_sweep(Sweep("s1", device.uid, "2025-01-01T00:00:00Z", "", "host", "[]", "running", "", ""))
        database.add_trials([trial])
    ran = []
    real = dispatch.build_launcher
    monkeypatch.setattr(dispatch, "build_launcher", lambda config, *rest: ran.append(config) or real(config, *rest))
    assert_rmsnorm(rmsnorm(x), x)
    assert (ran == [config]) == (revision == "this")
    assert stats() == ({"exact": 1} if revision == "this" else {"heuristic": 1})


def test_the_readme_import():
    """`from kernels import rmsnorm` is the function, with the specification's signature first."""
    names = list(inspect.signature(rmsnorm).parameters)
    assert names[:4] == ["x", "weight", "eps", "axis"]
    defaults = [inspect.signature(rmsnorm).parameters[name].default for name in names[1:4]]
    assert defaults == [None, 1e-6, -1]


def test_fenced_copy_is_a_fence():
    """The tests' own net: a read past the end of such a copy would give NaN."""
    x = fenced_copy(ones(3, 4))
    assert x.as_strided((13,), (1,), x.storage_offset())[12].isnan()


def test_without_triton_pytorch_serves_every_device():
    """As on macOS and Windows: the packages import, and a CPU tensor needs no backend argument."""
    source = """
    import importlib.abc, sys, torch

    class Hidden(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "triton" or name.startswith("triton."):
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Hidden())
    import importlib.util
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "triton" else found(name, package)
    import benchmarks, kernels, tuner, tuning_db
    from kernels import InvalidInput, rmsnorm, stats
    x = torch.randn(3, 8)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(rmsnorm(x), want)
    assert stats() == {"torch_requested": 1}, stats()
    try:
        rmsnorm(x, backend="triton")
    except InvalidInput as error:
        assert "not installed" in str(error)
    else:
        raise AssertionError("no error")
    """
    run_python(source, interprets=False)


def test_out_bumps_the_version():
    """A backward that needs what `out` overwrote raises, as after PyTorch's own in-place operations."""
    a = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    b = a * 1.0
    c = (b * b).sum()
    with torch.no_grad():
        rmsnorm(b, out=b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        c.backward()


def test_out_that_requires_grad_is_refused():
    x = torch.randn(3, 8, device=DEVICE)
    rmsnorm(x, out=torch.empty_like(x))
    with pytest.raises(InvalidInput, match="requires grad"):
        rmsnorm(x, out=torch.empty_like(x).requires_grad_())


def test_out_slices_of_a_pool_share_a_plan():
    pool = torch.randn(40, 4, 64, device=DEVICE)
    forget_plans()
    for i in range(20):
        rmsnorm(pool[2 * i], out=pool[2 * i + 1])
    assert sum(stats().values()) == 1


@pytest.mark.parametrize(("rows", "cols", "refused"), [(2, 0, True), (1, -10, True), (0, 64, True), (0, 70, False), (6, 0, False)])
def test_out_that_shares_rows_with_x(rows, cols, refused):
    """x and out are windows of one matrix, `rows` down and `cols` right of each other."""
    matrix = torch.randn(12, 160, device=DEVICE)
    x, out = matrix[:6, 10:80], matrix[rows : rows + 6, 10 + cols : 80 + cols]
    want = expected_rmsnorm(x.clone(), None)
    if refused:
        with pytest.raises(InvalidInput, match="overlaps"):
            rmsnorm(x, out=out)
    else:
        rmsnorm(x, out=out)
        torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=0)


def test_batch_invariant_takes_no_config_for_few_rows():
    device = Device("sm_90", 132, 50 << 20, 227 << 10, 3352)
    few = Problem("rmsnorm", "bfloat16", "bfloat16", "bfloat16", 4, 32_768)
    assert dispatch.pick_config(few, device).config.variant == "cluster_row"
    assert dispatch.pick_config(replace(few, rows=ANY_ROWS), device).config.variant == "split_row"


@pytest.mark.parametrize(("axis", "shape"), [(0, (40, 6)), (1, (3, 40, 2))])
def test_batch_invariant_of_another_axis_has_the_bits_of_adjacent_rows(axis, shape):
    x, weight = random_x(shape, torch.bfloat16), random_weight(40, torch.bfloat16)
    y = rmsnorm(x, weight, axis=axis, batch_invariant=True)
    adjacent = rmsnorm(x.movedim(axis, -1).contiguous(), weight, batch_invariant=True)
    assert torch.equal(y, adjacent.movedim(-1, axis))
    assert y.stride() == x.stride()
    out = torch.full_like(x, torch.nan)
    assert rmsnorm(x, weight, axis=axis, batch_invariant=True, out=out) is out
    assert torch.equal(out, y)


@pytest.mark.parametrize("part", [slice(None, 4096), slice(None, 3000)], ids=["packed", "part of wider rows"])
def test_batch_invariant_over_its_own_input_has_the_same_bits(part):
    """Also where the config's kernel may not write over what it reads."""
    x = random_x((2, 4096), torch.float32)[:, part]
    original = x.clone()
    split = next(config for config in sorted(space("split_row"), key=str) if config.params["max_pieces"] == 2)
    with override(split):
        elsewhere = rmsnorm(x, batch_invariant=True)
        assert rmsnorm(x, batch_invariant=True, out=x) is x
    assert torch.equal(x, elsewhere)
    assert_rmsnorm(x, original)


def test_batch_invariant_of_a_qkv_slice():
    qkv = random_x((5, 3, 2, 128), torch.float32)
    q = qkv[:, 0]
    every = rmsnorm(q, batch_invariant=True)
    for tokens in (1, 2, 3):
        assert torch.equal(rmsnorm(q[:tokens], batch_invariant=True), every[:tokens])


def test_meta_tensors():
    assert rmsnorm(torch.empty(3, 8, device="meta"), backend="torch").shape == (3, 8)


OTHER_KINDS = {
    "rows": lambda x, weight: (random_x((5, 64), torch.float32), weight),
    "strides": lambda x, weight: (random_x((64, 4), torch.float32).t(), weight),
    "dtype": lambda x, weight: (x.half(), weight),
    "dtype of the weight": lambda x, weight: (x, weight.half()),
    "no weight": lambda x, weight: (x, None),
    "a lazy minus sign": lambda x, weight: (torch.complex(x, x).conj().imag, weight),
    "a Parameter": lambda x, weight: (x, torch.nn.Parameter(weight)),
    "requires grad": lambda x, weight: (x.clone().requires_grad_(), weight),
}


@pytest.mark.parametrize("other", OTHER_KINDS)
def test_the_latest_kind_of_call_serves_no_other(other):
    """A kind that came in a long run is tried first from then on; what follows it, and it again, are served as they would be alone."""
    x, weight = random_x((4, 64), torch.float32), random_weight(64, torch.float32)
    changed = OTHER_KINDS[other](x, weight)
    runs = LONG_RUN + 3
    for tensors in [(x, weight)] * runs + [changed] * runs + [(x, weight), changed] * 2:
        y = rmsnorm(*tensors)
        assert y.requires_grad == any(tensor is not None and tensor.requires_grad for tensor in tensors)
        assert_rmsnorm(y, *tensors)


def test_the_latest_kind_of_call_knows_whether_gradients_are_recorded():
    x = random_x((4, 64), torch.float32).requires_grad_()
    for recording in [True] * (LONG_RUN + 3) + [False] * (LONG_RUN + 3) + [True, False] * 2:
        with torch.set_grad_enabled(recording):
            assert rmsnorm(x).requires_grad == recording


def test_the_latest_kind_of_call_is_forgotten_with_the_plans(lookups):
    x = random_x((4, 64), torch.float32)
    for _ in range(2):
        for _ in range(LONG_RUN + 3):
            rmsnorm(x)
        forget_plans()
    assert len(lookups) == 2


def test_a_run_of_calls_is_found_by_one_check(monkeypatch):
    """And shapes in turn are not tried in vain."""
    x, other = random_x((4, 64), torch.float32), random_x((5, 64), torch.float32)
    searches = []
    find = Shortcuts.find
    monkeypatch.setattr(Shortcuts, "find", lambda *arguments: searches.append(1) or find(*arguments))
    for _ in range(LONG_RUN + 20):
        rmsnorm(x)
    assert len(searches) <= LONG_RUN + 3
    rmsnorm(other)
    searches.clear()
    for _ in range(10):
        rmsnorm(other)
        rmsnorm(x)
        assert api._plain_shortcuts.latest is NOTHING
    assert len(searches) == 20


@pytest.mark.parametrize("module", [False, True])
def test_a_nested_tensor_is_an_error(module):
    """Not the end of the process, which it is for PyTorch's check of a tensor without strides; also after many ordinary calls."""
    source = f"""
    import torch
    import kernels
    from oracle import DEVICE
    x, nested = torch.ones(4, 8, device=DEVICE), torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)], device=DEVICE)
    norm = kernels.RMSNorm(8, device=DEVICE) if {module} else lambda x: kernels.rmsnorm(x, torch.ones(8, device=DEVICE))
    for _ in range({LONG_RUN} + 3):
        norm(x)
    try:
        norm(nested)
    except (kernels.InvalidInput, RuntimeError):
        print("an error")
    """
    assert run_python(source, where=ROOT / "tests") == "an error\n"
