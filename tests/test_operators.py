"""`rmsnorm` in the graphs of torch.compile and torch.export: one operator, the eager call's bits and strides, and no recompiling."""

import importlib
import io
import os
import shutil

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend

from gradient_oracle import assert_gradients
from graphs import skip_where_pytorch_cannot, targets
from interpreters import run_python
from kernels import RMSNorm, dispatch, override, rmsnorm, stats
from oracle import DEVICE, DTYPES, assert_rmsnorm, random_weight, random_x
from tuning_db.model import Config

FORWARD, BACKWARD = "tuned_rmsnorm.rmsnorm_forward.default", "tuned_rmsnorm.rmsnorm_backward.default"


@pytest.fixture(autouse=True)
def _compiles_anew() -> None:
    importlib.import_module("kernels.operators")  # torch.ops knows the operators from then on
    torch._dynamo.reset()


def inputs(shape=(6, 64), x_dtype=torch.float32, w_dtype=torch.float32, axis=-1):
    """x, weight and a direction for the gradient, x and weight requiring grad."""
    x, weight = random_x(shape, x_dtype, axis=axis).requires_grad_(), random_weight(shape[axis], w_dtype)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(x_dtype).to(DEVICE)
    return x, weight if weight is None else weight.clone().requires_grad_(), dy


def gradients(y, dy, *tensors):
    return torch.autograd.grad(y, [tensor for tensor in tensors if tensor is not None and tensor.requires_grad], dy)


def assert_as_eager(function, x, weight, dy, backend="aot_eager"):
    """The compiled function gives the eager one's bits and strides, forward and backward."""
    y, want = torch.compile(function, fullgraph=True, backend=backend)(x, weight), function(x, weight)
    for got, expected in zip((y, *gradients(y, dy, x, weight)), (want, *gradients(want, dy, x, weight)), strict=True):
        assert torch.equal(got, expected)
        assert got.stride() == expected.stride()
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("w_dtype", [None, torch.float32])
def test_the_graphs_hold_one_operator_each(axis, w_dtype):
    x, weight, dy = inputs(w_dtype=w_dtype, axis=axis)
    backend = AotEagerAndRecordGraphs()
    y = torch.compile(lambda x, weight: rmsnorm(x, weight, axis=axis), fullgraph=True, backend=backend)(x, weight)
    assert_rmsnorm(y, x, weight, axis=axis)
    found = gradients(y, dy, x, weight)
    assert_gradients(found[0], None if weight is None else found[1], dy, x, weight, axis=axis)
    assert targets(backend.fw_graphs) == [FORWARD]
    assert targets(backend.bw_graphs) == [BACKWARD]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["both", "x", "weight"])
def test_as_eager(which, dtype):
    x, weight, dy = inputs(x_dtype=dtype)
    x.requires_grad_(which != "weight")
    weight.requires_grad_(which != "x")
    assert_as_eager(lambda x, weight: rmsnorm(x, weight, 1e-5), x, weight, dy)


@pytest.mark.parametrize("mode", [{"weight_offset": 1.0}, {"casting": "llama"}, {"weight_offset": 1.0, "casting": "gemma"}], ids=str)
def test_numerics_modes(mode):
    x, weight, dy = inputs(x_dtype=torch.bfloat16)
    assert_as_eager(lambda x, weight: rmsnorm(x, weight, **mode), x, weight, dy)
    norm = RMSNorm(64, dtype=torch.bfloat16, device=DEVICE, **mode)
    assert_as_eager(lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, x), x, weight, dy)


LAYOUTS = {
    "transposed": lambda base: base[0, 0].t(),
    "sliced columns": lambda base: base[0, 0, :, 3:14],
    "expanded": lambda base: base[0, :, :1].expand(4, 6, 16),
    "three strides": lambda base: base[:, :3, :5, :11],
    "three strides, permuted": lambda base: base[:, :3, :5, :11].transpose(0, 2),
    "a weight that is expanded": lambda base: base[0, 0],
}


def laid_out(layout, axis):
    """x, weight and dy of a layout."""
    x = LAYOUTS[layout](random_x((2, 4, 6, 16), torch.float32)).detach().requires_grad_()
    memory = random_weight(x.shape[axis], torch.float32).clone()
    weight = (memory[:1].expand_as(memory) if "weight" in layout else memory).detach().requires_grad_()
    return x, weight, torch.randn_like(x)


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, axis):
    assert_as_eager(lambda x, weight: rmsnorm(x, weight, axis=axis), *laid_out(layout, axis))


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_where_the_ladder_says_pytorch(layout, axis, monkeypatch):
    """What PyTorch returns at strides of its own is brought to those that the graph was made for."""
    monkeypatch.setattr(dispatch, "heuristic_config", lambda *_: None)
    x, weight, dy = laid_out(layout, axis)
    y = torch.compile(lambda x, weight: rmsnorm(x, weight, axis=axis), fullgraph=True, backend="aot_eager")(x, weight)
    assert y.stride() == torch.empty_like(x).stride()
    assert_rmsnorm(y, x, weight, axis=axis)
    assert_gradients(*gradients(y, dy, x, weight), dy, x, weight, axis=axis)
    assert set(stats()) == {"torch"}
    plain = [tensor.detach() for tensor in (dy, x, weight)]
    torch.library.opcheck(torch.ops.tuned_rmsnorm.rmsnorm_forward.default, (*plain[1:], 1e-6, axis, 0.0, False, False, "auto"))
    torch.library.opcheck(torch.ops.tuned_rmsnorm.rmsnorm_backward.default, (*plain, 1e-6, axis, 0.0, False, True, True))


@pytest.mark.parametrize("marked", [True, False])
def test_rows_are_dynamic(marked):
    """Compiled once where the user says so, else a second time when the number of rows first changes; the module in the same way."""
    for norm in (rmsnorm, RMSNorm(64, device=DEVICE), RMSNorm((4, 16), device=DEVICE)):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(norm, fullgraph=True, backend=counter)
        for rows in (6, 8, 3, 17):
            x = random_x((rows, 64), torch.float32)
            x = x.view(rows, 4, 16) if getattr(norm, "normalized_shape", None) == (4, 16) else x
            if marked:
                torch._dynamo.mark_dynamic(x, 0)
            assert torch.equal(compiled(x), norm(x))
        assert counter.frame_count == (1 if marked else 2)


@pytest.mark.parametrize("eps", [1e-6, 0.1, 1])
def test_eps_is_rounded_once(eps):
    """The operator gets the number itself, and the kernel makes fp32 of it; so does the eager call."""
    x, weight, dy = inputs()
    x = (x.detach() * 1e-3).requires_grad_()
    backend = AotEagerAndRecordGraphs()
    assert_as_eager(lambda x, weight: rmsnorm(x, weight, eps), x, weight, dy, backend)
    (node,) = [node for node in backend.fw_graphs[0].graph.nodes if str(node.target) == FORWARD]
    assert node.args[2] == float(eps)


@pytest.mark.skipif(
    DEVICE.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor for the CPU needs a C++ compiler"
)
def test_inductor_on_dynamic_rows():
    """Whole: forward and backward graphs by the default backend, with operations around the norm."""

    def model(x, weight):
        return rmsnorm(torch.flip(rmsnorm(x, weight), (0,)), weight, 1e-5)

    weight = inputs()[1]
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in (6, 9):
        x, _, dy = inputs((rows, 64))
        torch._dynamo.mark_dynamic(x, 0)
        y, want = compiled(x, weight), model(x, weight)
        assert torch.equal(y, want)
        for got, expected in zip(gradients(y, dy, x, weight), gradients(want, dy, x, weight), strict=True):
            assert torch.equal(got, expected)  # dw is a sum of two, so in either order
    assert counter.frame_count == 1


def operator_calls():
    x, weight, dy = inputs()
    plain = [tensor.detach() for tensor in (x, weight, dy)]
    for of_x, of_weight in ((x, weight), (x, None), (plain[0], weight), (plain[0].bfloat16(), plain[1])):
        yield "rmsnorm", (of_x, of_weight, 1e-6, -1, 0.0, False, False, "auto")
    yield "rmsnorm", (x, weight, 1e-6, -1, 0.0, False, False, "torch")
    yield "rmsnorm", (x, weight, 1e-6, -1, 1.0, True, False, "auto")
    yield "rmsnorm_forward", (*plain[:2], 1e-6, -1, 0.0, False, False, "auto")
    yield "rmsnorm_forward", (plain[0].t(), None, 1e-6, -2, 0.0, False, True, "triton")
    yield "rmsnorm_out", (*plain[:2], 1e-6, -1, 0.0, False, False, "auto", torch.empty_like(plain[0]))
    for wants in ((True, True), (True, False), (False, True)):
        yield "rmsnorm_backward", (plain[2], *plain[:2], 1e-6, -1, 0.0, False, *wants)
    yield "rmsnorm_backward", (plain[2].t(), plain[0].t(), plain[1], 1e-6, -2, 0.0, False, True, True)


def test_opcheck():
    """torch's own test of an operator: schema, fake results, autograd, and all of it with dynamic shapes."""
    for name, arguments in operator_calls():
        torch.library.opcheck(getattr(torch.ops.tuned_rmsnorm, name).default, arguments)


def test_an_operator_can_be_differentiated_twice():
    def penalty(function):
        x, weight, dy = inputs()
        first = torch.autograd.grad(function(x, weight), (x, weight), dy, create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in first), (x, weight))

    got = penalty(lambda x, weight: torch.ops.tuned_rmsnorm.rmsnorm(x, weight, 1e-6, -1, 0.0, False, False, "auto"))
    for ours, want in zip(got, penalty(rmsnorm), strict=True):
        assert torch.equal(ours, want)


TRANSFORMS = {
    "vmap": lambda x, weight: torch.func.vmap(lambda row: rmsnorm(row, weight))(x),
    "grad": lambda x, weight: torch.func.grad(lambda x: rmsnorm(x, weight).square().sum())(x),
    "jvp": lambda x, weight: torch.func.jvp(lambda x: rmsnorm(x, weight), (x,), (x,))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_pytorchs(transform):
    x, weight = (tensor.detach() for tensor in inputs()[:2])
    skip_where_pytorch_cannot(transform, x, weight)
    backend = AotEagerAndRecordGraphs()
    y = torch.compile(TRANSFORMS[transform], fullgraph=True, backend=backend)(x, weight)
    assert torch.equal(y, TRANSFORMS[transform](x, weight))
    assert not [name for name in targets(backend.fw_graphs) if "tuned_rmsnorm" in name]


@pytest.mark.parametrize("in_place", [False, True])
def test_out(in_place):
    x, weight = (tensor.detach() for tensor in inputs()[:2])
    out = x.clone() if in_place else torch.empty_like(x)

    def model(x, weight, out):
        return rmsnorm(out if in_place else x, weight, out=out)

    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x, weight, out)
    assert y is out
    assert torch.equal(out, rmsnorm(x, weight))


def test_out_and_gradients_exclude_each_other():
    x, weight, _ = inputs()
    with pytest.raises(RuntimeError, match="out was given, but an input or out requires grad"):
        torch.compile(lambda x, weight, out: rmsnorm(x, weight, out=out), backend="aot_eager")(x, weight, torch.empty_like(x))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast(DEVICE.type, dtype=torch.bfloat16)])
def test_contexts(context):
    x, weight, _ = inputs()

    def model(x, weight):
        return rmsnorm(x, weight)

    with context():
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x, weight)
        want = model(x, weight)
    assert torch.equal(y, want)
    assert (y.dtype, y.requires_grad, y.is_inference()) == (want.dtype, want.requires_grad, want.is_inference())


@pytest.mark.parametrize("way", ["argument", "environment", "float64"])
def test_what_pytorch_serves_stays_traceable(way, monkeypatch):
    x, weight, _ = inputs()
    if way == "environment":
        monkeypatch.setenv("RMSNORM_BACKEND", "torch")
    if way == "float64":
        x = x.double()
    backend = AotEagerAndRecordGraphs()
    function = torch.compile(
        lambda x, weight: rmsnorm(x, weight, backend="torch" if way == "argument" else "auto"), fullgraph=True, backend=backend
    )
    y = function(x, weight)
    assert_rmsnorm(y, x, weight)
    y.sum().backward()
    assert not [name for name in targets(backend.fw_graphs + backend.bw_graphs) if "tuned_rmsnorm" in name]


def test_the_config_is_that_of_the_eager_call(monkeypatch):
    """By the same lookup, at run time: an override is seen by code compiled before it."""
    ran = []
    real = dispatch.build_launcher
    monkeypatch.setattr(dispatch, "build_launcher", lambda config, *rest: ran.append(config) or real(config, *rest))
    x, weight = (tensor.detach() for tensor in inputs((4, 200))[:2])
    compiled = torch.compile(lambda x, weight: rmsnorm(x, weight), fullgraph=True, backend="aot_eager")
    compiled(x, weight)
    looped = Config.of("looped", block_cols=2048, num_warps=4)
    with override(looped):
        assert_rmsnorm(compiled(x, weight), x, weight)
    compiled(x, weight)
    with torch.no_grad():  # as the code of a graph runs
        rmsnorm(x, weight)
    assert ran[0] != looped
    assert ran[1:] == [looped]
    assert stats() == {"heuristic": 1, "override": 1}


BAD = {
    "weight has shape (7,)": {"weight": torch.ones(7, device=DEVICE)},
    "axis is 3": {"axis": 3},
    "eps is -1.0": {"eps": -1.0},
    "backend is 'cuda'": {"backend": "cuda"},
}


@pytest.mark.parametrize("text", BAD)
def test_bad_input_is_named(text):
    x = random_x((4, 8), torch.float32)
    with pytest.raises((RuntimeError, ValueError)) as raised:
        torch.compile(lambda x: rmsnorm(x, **BAD[text]), fullgraph=True, backend="aot_eager")(x)
    assert text in str(raised.value)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    norm = RMSNorm(64, device=DEVICE)
    program = torch.export.export(norm, (random_x((6, 64), torch.float32),), dynamic_shapes=({0: torch.export.Dim("rows")},), strict=strict)
    assert targets([program]) == ["tuned_rmsnorm.rmsnorm.default"]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = random_x((9, 64), torch.float32, seed=5)
    assert torch.equal(torch.export.load(file).module()(x), norm(x))


def test_eager_calls_register_nothing():
    source = """
    import os, sys, torch
    from kernels import add_rmsnorm, rmsnorm
    x = torch.randn(4, 16, device="cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda", requires_grad=True)
    for _ in range(2):
        rmsnorm(x).sum().backward()
        add_rmsnorm(x, x)[0].sum().backward()
    assert not [name for name in sys.modules if name.startswith("kernels.") and "operator" in name]
    import kernels.operators
    torch.ops.tuned_rmsnorm.rmsnorm, torch.ops.tuned_rmsnorm.add_rmsnorm
    """
    run_python(source)
