"""`add_rmsnorm` in the graphs of torch.compile and torch.export, as test_operators.py has `rmsnorm`."""

import importlib
import io
import os
import shutil

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend

from gradient_oracle import assert_gradients
from graphs import skip_where_pytorch_cannot, targets
from kernels import add_rmsnorm, dispatch, override, rmsnorm, stats
from oracle import DEVICE, DTYPES, assert_rmsnorm, assert_sum, random_weight, random_x
from tuning_db.model import Config

OPERATORS = torch.ops.tuned_rmsnorm
FORWARD, BACKWARD = "tuned_rmsnorm.add_rmsnorm_forward.default", "tuned_rmsnorm.add_rmsnorm_backward.default"
PLAIN = 0.0, False
PAIRS = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
"""Dtypes of x and residual."""


@pytest.fixture(autouse=True)
def _compiles_anew() -> None:
    importlib.import_module("kernels.residual_operators")  # torch.ops knows the operators from then on
    torch._dynamo.reset()


def inputs(shape=(6, 64), x_dtype=torch.float32, residual_dtype=None, w_dtype=torch.float32):
    """x, residual and weight, requiring grad."""
    x, residual = random_x(shape, x_dtype), random_x(shape, residual_dtype or x_dtype, seed=1)
    weight = random_weight(shape[-1], w_dtype)
    return [None if tensor is None else tensor.clone().requires_grad_() for tensor in (x, residual, weight)]


def plain(*args, **kwargs):
    """The same, without."""
    return [None if tensor is None else tensor.detach() for tensor in inputs(*args, **kwargs)]


def gradients(results, *tensors):
    """Of the results that require grad, in directions of their own."""
    used = [result for result in results if result.requires_grad]
    directions = [torch.randn(r.shape, generator=torch.Generator().manual_seed(3)).to(r.dtype).to(r.device) for r in used]
    return torch.autograd.grad(used, [tensor for tensor in tensors if tensor is not None and tensor.requires_grad], directions)


def assert_as_eager(function, *tensors, backend="aot_eager"):
    """The compiled function gives the eager one's bits and strides, forward and backward."""
    got, want = torch.compile(function, fullgraph=True, backend=backend)(*tensors), function(*tensors)
    for result, expected in zip((*got, *gradients(got, *tensors)), (*want, *gradients(want, *tensors)), strict=True):
        assert torch.equal(result, expected)
        assert result.dtype == expected.dtype
        assert result.stride() == expected.stride()


@pytest.mark.parametrize("w_dtype", [None, torch.float32])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_graphs_hold_one_operator_each(pair, w_dtype):
    x, residual, weight = inputs((6, 64), *pair, w_dtype)
    backend = AotEagerAndRecordGraphs()
    y, total = torch.compile(lambda *tensors: add_rmsnorm(*tensors), fullgraph=True, backend=backend)(x, residual, weight)
    assert_sum(total, x, residual)
    assert_rmsnorm(y, total, weight)
    dy, dsum = torch.randn_like(y), torch.randn_like(total)
    dx, dresidual, *dw = torch.autograd.grad((y, total), [t for t in (x, residual, weight) if t is not None], (dy, dsum))
    assert_gradients(dresidual, dw[0] if dw else None, dy, total.detach(), weight, dsum=dsum, daddend=dx)
    assert targets(backend.fw_graphs) == [FORWARD]
    assert targets(backend.bw_graphs) == [BACKWARD]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1,), (2,)], ids=str)
def test_as_eager(wanted, dtype):
    tensors = inputs(x_dtype=dtype, residual_dtype=torch.float32)
    for at, tensor in enumerate(tensors):
        tensor.requires_grad_(at in wanted)
    assert_as_eager(lambda x, residual, weight: add_rmsnorm(x, residual, weight, 1e-5), *tensors)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_one_of_the_results_is_used(used, pair):
    """The norm alone is differentiated by the plain backward of the sum; the sum alone passes its gradient on, without an operator."""
    x, residual, _ = inputs((6, 64), *pair)
    backend = AotEagerAndRecordGraphs()
    assert_as_eager(lambda x, residual: (add_rmsnorm(x, residual)[used] * 2,), x, residual, backend=backend)
    (graph,) = backend.bw_graphs
    calls = [node for node in graph.graph.nodes if str(node.target) == BACKWARD]
    assert [node.args[0] for node in calls] == ([None] if used == 0 else [])


def test_numerics_modes():
    """One after another, so that each must be remembered apart from the others."""
    for mode in ({}, {"weight_offset": 1.0}, {"casting": "llama"}, {"weight_offset": -0.5, "casting": "gemma"}):
        assert_as_eager(lambda *tensors, mode=mode: add_rmsnorm(*tensors, **mode), *inputs(x_dtype=torch.float16))


def test_two_gradients_of_one_input_do_not_share_memory():
    x, residual, weight = inputs()
    y, total = torch.compile(lambda *tensors: add_rmsnorm(*tensors), fullgraph=True, backend="aot_eager")(x, residual, weight)
    (y.sum() + total.sum()).backward()
    x.grad.zero_()
    assert residual.grad.abs().sum() > 0


def test_a_sum_that_was_overwritten_is_noticed():
    y, total = torch.compile(lambda *tensors: add_rmsnorm(*tensors), fullgraph=True, backend="aot_eager")(*inputs())
    with torch.no_grad():
        total.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


LAYOUTS = {
    "packed": lambda base: base[:, :3, :5, :11].contiguous(),
    "sliced": lambda base: base[:, :3, :5, :11],
    "dense, other order": lambda base: base[:, :3, :5, :11].contiguous().transpose(1, 2).contiguous().transpose(1, 2),
    "dense, columns first": lambda base: base[:, :3, :5, :11].permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "expanded": lambda base: base[:, :1, :5, :11].expand(2, 3, 5, 11),
}


def laid_out(of_x, of_residual):
    bases = [random_x((2, 4, 6, 16), torch.float32, seed=seed) for seed in (0, 1)]
    views = [LAYOUTS[name](base).detach() for name, base in zip((of_x, of_residual), bases, strict=True)]
    return [tensor.requires_grad_() for tensor in (*views, random_weight(33, torch.float32)[::3].detach())]


@pytest.mark.parametrize("of_residual", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
def test_layouts(of_x, of_residual):
    x, residual, weight = laid_out(of_x, of_residual)
    y, total = add_rmsnorm(x, residual, weight)
    assert (y.stride(), total.stride()) == (torch.empty_like(x).stride(), torch.empty_like(residual).stride())
    assert_as_eager(lambda *tensors: add_rmsnorm(*tensors), x, residual, weight)


@pytest.mark.parametrize("of_x", LAYOUTS)
def test_strides_where_the_ladder_says_pytorch(of_x, monkeypatch):
    """What PyTorch returns at strides of its own is brought to those that the graph was made for."""
    monkeypatch.setattr(dispatch, "heuristic_config", lambda *_: None)
    tensors = laid_out(of_x, "dense, columns first")
    results = torch.compile(lambda *tensors: add_rmsnorm(*tensors), fullgraph=True, backend="aot_eager")(*tensors)
    x, residual, weight = (tensor.detach() for tensor in tensors)
    for result, source in zip(results, (x, residual), strict=True):
        assert result.stride() == torch.empty_like(source).stride()
    assert_sum(results[1], x, residual)
    assert_rmsnorm(results[0], results[1], weight)
    dy, dsum = torch.randn_like(x), torch.randn_like(residual)
    dx, dresidual, dw = torch.autograd.grad(results, tensors, (dy, dsum))
    assert_gradients(dresidual, dw, dy, results[1].detach(), weight, dsum=dsum, daddend=dx)
    assert set(stats()) == {"torch"}
    torch.library.opcheck(OPERATORS.add_rmsnorm_forward.default, (x, residual, weight, 1e-6, *PLAIN, False, "auto"))
    torch.library.opcheck(OPERATORS.add_rmsnorm_backward.default, (residual, x, residual, weight, 1e-6, *PLAIN, True, True))


@pytest.mark.parametrize("marked", [True, False])
def test_rows_are_dynamic(marked):
    """Compiled once where the user says so, else a second time when the number of rows first changes."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(add_rmsnorm, fullgraph=True, backend=counter)
    for rows in (6, 8, 3, 17):
        x, residual, weight = plain((rows, 64))
        if marked:
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(residual, 0)
        for got, want in zip(compiled(x, residual, weight), add_rmsnorm(x, residual, weight), strict=True):
            assert torch.equal(got, want)
    assert counter.frame_count == (1 if marked else 2)


@pytest.mark.skipif(
    DEVICE.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor for the CPU needs a C++ compiler"
)
def test_inductor_on_dynamic_rows():
    """Two blocks of a residual stream, and one whose sum is formed in place in a tensor that the graph made."""

    def model(x, residual, weight):
        for _ in range(2):
            y, residual = add_rmsnorm(x, residual, weight)
            x = torch.flip(y, (0,))
        return x, residual

    def serving(x, residual, weight):
        x, residual = torch.flip(x, (0,)), torch.flip(residual, (0,))
        return add_rmsnorm(x, residual, weight, out=x, residual_out=residual)

    counter = CompileCounterWithBackend("inductor")
    compiled, served = (torch.compile(function, fullgraph=True, backend=counter) for function in (model, serving))
    for rows in (6, 9):
        tensors = inputs((rows, 64))
        for tensor in tensors[:2]:
            torch._dynamo.mark_dynamic(tensor, 0)
        got, want = compiled(*tensors), model(*tensors)
        for ours, expected in zip((*got, *gradients(got, *tensors)), (*want, *gradients(want, *tensors)), strict=True):
            assert torch.equal(ours, expected)  # dw is a sum of two, so in either order
        with torch.no_grad():
            for ours, expected in zip(served(*tensors), serving(*tensors), strict=True):
                assert torch.equal(ours, expected)
    assert counter.frame_count == 2


def operator_calls():
    x, residual, weight = inputs()
    own = plain()
    mixed = plain(x_dtype=torch.float16, residual_dtype=torch.float32)
    rest = (1e-6, *PLAIN, False, "auto")
    for tensors in ((x, residual, weight), (x, own[1], None), (own[0], own[1], weight), inputs(x_dtype=torch.bfloat16), mixed):
        yield "add_rmsnorm", (*tensors, *rest)
    yield "add_rmsnorm", (x, residual, weight, 1e-6, *PLAIN, False, "torch")
    yield "add_rmsnorm", (x, residual, weight, 1e-6, 1.0, True, False, "auto")
    for tensors in (own, mixed):
        yield "add_rmsnorm_forward", (*tensors, *rest)
        yield "add_rmsnorm_out", (*tensors, *rest, torch.empty_like(tensors[0]), torch.empty_like(tensors[1]))
    for wants in ((True, True), (True, False), (False, True)):
        for tensors in (own, mixed):
            dsum, (dy, total, weight) = torch.randn_like(tensors[1]), tensors
            yield "add_rmsnorm_backward", (dsum, dy, total, weight, 1e-6, *PLAIN, *wants)
            yield "add_rmsnorm_backward", (None, dy, total, weight, 1e-6, *PLAIN, *wants)


def test_opcheck():
    """torch's own test of an operator: schema, fake results, autograd, and all of it with dynamic shapes."""
    for name, arguments in operator_calls():
        torch.library.opcheck(getattr(OPERATORS, name).default, arguments)


def test_an_operator_can_be_differentiated_twice():
    def penalty(function):
        tensors = inputs()
        y, total = function(*tensors)
        first = torch.autograd.grad(y.square().sum() + total.cos().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in first), tensors)

    got = penalty(lambda *tensors: OPERATORS.add_rmsnorm(*tensors, 1e-6, 1.0, False, False, "auto"))
    for ours, want in zip(got, penalty(lambda *tensors: add_rmsnorm(*tensors, weight_offset=1.0)), strict=True):
        assert torch.equal(ours, want)


TRANSFORMS = {
    "vmap": lambda x, residual, weight: torch.func.vmap(lambda *rows: add_rmsnorm(*rows, weight))(x, residual),
    "grad": lambda x, residual, weight: torch.func.grad(lambda x: add_rmsnorm(x, residual, weight)[0].square().sum())(x)[None],
    "jvp": lambda x, residual, weight: torch.func.jvp(lambda x: add_rmsnorm(x, residual, weight), (x,), (x,))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_pytorchs(transform):
    tensors = plain()
    skip_where_pytorch_cannot(transform, tensors[0], tensors[2])
    backend = AotEagerAndRecordGraphs()
    got = torch.compile(TRANSFORMS[transform], fullgraph=True, backend=backend)(*tensors)
    for ours, want in zip(got, TRANSFORMS[transform](*tensors), strict=True):
        assert torch.equal(ours, want)
    assert not [name for name in targets(backend.fw_graphs) if "tuned_rmsnorm" in name]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("given", ["out", "residual_out", "both", "in place"])
def test_given_results(given, pair):
    x, residual, weight = plain((6, 64), *pair)
    want = add_rmsnorm(x, residual, weight)
    if given == "in place":
        results = {"out": x, "residual_out": residual}
    else:
        results = {"out": torch.empty_like(x), "residual_out": torch.empty_like(residual)}
        results = {name: result for name, result in results.items() if given in (name, "both")}

    def model(x, residual, weight, results):
        if given == "in place":
            results = {"out": x, "residual_out": residual}
        return add_rmsnorm(x, residual, weight, **results)

    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x, residual, weight, results)
    for name, result, expected in zip(("out", "residual_out"), got, want, strict=True):
        assert torch.equal(result, expected)
        assert name not in results or result is results[name]


def test_given_results_and_gradients_exclude_each_other():
    x, residual, weight = inputs()
    compiled = torch.compile(lambda *tensors, out: add_rmsnorm(*tensors, out=out), backend="aot_eager")
    with pytest.raises(RuntimeError, match="out or residual_out given, but an input or result requires grad"):
        compiled(x, residual, weight, out=torch.empty_like(x))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast(DEVICE.type, dtype=torch.bfloat16)])
def test_contexts(context):
    tensors = inputs()

    def model(*tensors):
        return add_rmsnorm(*tensors)

    with context():
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(*tensors)
        want = model(*tensors)
    for ours, expected in zip(got, want, strict=True):
        assert torch.equal(ours, expected)
        flags = [(t.dtype, t.requires_grad, t.is_inference()) for t in (ours, expected)]
        assert flags[0] == flags[1]


@pytest.mark.parametrize("way", ["argument", "environment", "float64"])
def test_what_pytorch_serves_stays_traceable(way, monkeypatch):
    x, residual, weight = inputs(residual_dtype=torch.float64 if way == "float64" else torch.float32)
    if way == "environment":
        monkeypatch.setenv("RMSNORM_BACKEND", "torch")
    backend = AotEagerAndRecordGraphs()
    choice = "torch" if way == "argument" else "auto"
    y, total = torch.compile(lambda *tensors: add_rmsnorm(*tensors, backend=choice), fullgraph=True, backend=backend)(x, residual, weight)
    assert torch.equal(total, x + residual)
    assert_rmsnorm(y, total, weight)
    (y.sum() + total.sum()).backward()
    assert not [name for name in targets(backend.fw_graphs + backend.bw_graphs) if "tuned_rmsnorm" in name]


def test_the_config_is_that_of_the_eager_call(monkeypatch):
    """By the same lookup, at run time: an override is seen by code compiled before it."""
    ran = []
    real = dispatch.build_add_launcher
    monkeypatch.setattr(dispatch, "build_add_launcher", lambda config, *rest: ran.append(config) or real(config, *rest))
    tensors = plain((4, 200))
    compiled = torch.compile(lambda *tensors: add_rmsnorm(*tensors), fullgraph=True, backend="aot_eager")
    compiled(*tensors)
    looped = Config.of("looped", block_cols=2048, num_warps=4)
    with override(looped):
        compiled(*tensors)
    compiled(*tensors)
    with torch.no_grad():  # as the code of a graph runs
        add_rmsnorm(*tensors)
    assert ran[0] != looped
    assert ran[1:] == [looped]
    assert stats() == {"heuristic": 1, "override": 1}


BAD = {
    "residual has shape": {"residual": torch.ones(64, device=DEVICE)},
    "weight has shape (7,)": {"weight": torch.ones(7, device=DEVICE)},
    "residual_out is (64, 6)": {"residual_out": torch.ones(64, 6, device=DEVICE)},
    "eps is -1.0": {"eps": -1.0},
    "backend is 'cuda'": {"backend": "cuda"},
}


@pytest.mark.parametrize("text", BAD)
def test_bad_input_is_named(text):
    x, residual, _ = plain()
    with pytest.raises((RuntimeError, ValueError)) as raised:
        torch.compile(lambda x, residual: add_rmsnorm(**{"x": x, "residual": residual, **BAD[text]}), fullgraph=True, backend="aot_eager")(
            x, residual
        )
    assert text in str(raised.value)


class Block(torch.nn.Module):
    def forward(self, x, residual):
        y, residual = add_rmsnorm(x, residual)
        return rmsnorm(y), residual


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    rows = torch.export.Dim("rows")
    program = torch.export.export(Block(), tuple(plain()[:2]), dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
    assert targets([program]) == ["tuned_rmsnorm.add_rmsnorm.default", "tuned_rmsnorm.rmsnorm.default"]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x, residual, _ = plain((9, 64))
    for got, want in zip(torch.export.load(file).module()(x, residual), Block()(x, residual), strict=True):
        assert torch.equal(got, want)
