"""`add_rmsnorm` as its users call it: results given and not, strides, errors, what a second call costs, and its gradients."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from gradient_oracle import assert_gradients
from kernels import InvalidInput, add_rmsnorm, dispatch, override, plans, residual, residual_plans, rmsnorm, stats
from kernels.api import forget_plans
from oracle import DEVICE, DTYPES, INTERPRETED, Fenced, assert_rmsnorm, assert_sum, fenced_copy, packed_strides, random_weight, random_x
from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, BACKWARD, Config, Problem

X = (4, 40)


def inputs(shape=X, x_dtype=torch.float32, residual_dtype=None, w_dtype=torch.float32):
    x, stream = random_x(shape, x_dtype), random_x(shape, residual_dtype or x_dtype, seed=1)
    return x, stream, random_weight(shape[-1], w_dtype)


def leaves(*args, **kwargs):
    """The same, requiring grad."""
    return [tensor if tensor is None else tensor.clone().requires_grad_() for tensor in inputs(*args, **kwargs)]


def assert_added(results, x, stream, weight, note=""):
    y, total = results
    assert_sum(total, x, stream, note)
    assert_rmsnorm(y, total, weight, note=note)
    assert (y.shape, y.dtype) == (x.shape, x.dtype), note


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """All Problems looked up in this test."""
    seen: list[Problem] = []
    real = dispatch.pick_config

    def noted(problem, *args, **kwargs):
        seen.append(problem)
        return real(problem, *args, **kwargs)

    monkeypatch.setattr(dispatch, "pick_config", noted)
    return seen


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(40,), (1, 1), (7, 129), (2, 3, 5), (2, 3, 4, 5)], ids=str)
def test_shapes(shape, weighted, problems):
    x, stream, weight = inputs(shape, w_dtype=torch.float32 if weighted else None)
    assert_added(add_rmsnorm(x, stream, weight), x, stream, weight)
    assert [(problem.op, problem.layout) for problem in problems] == [(ADD_FORWARD, "contiguous")]


@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_dtypes(x_dtype, residual_dtype, problems):
    x, stream, weight = inputs(X, x_dtype, residual_dtype, torch.bfloat16)
    assert_added(add_rmsnorm(x, stream, weight), x, stream, weight)
    assert {f"torch.{problems[0].x_dtype}", f"torch.{problems[0].y_dtype}"} == {str(residual_dtype), str(x_dtype)}


def test_a_stream_of_fp32_keeps_what_bf16_would_lose():
    x, stream = torch.full(X, 2.0**-10, dtype=torch.bfloat16, device=DEVICE), torch.ones(X, device=DEVICE)
    for _ in range(4):
        _, stream = add_rmsnorm(x, stream)
    assert torch.equal(stream, torch.full(X, 1 + 2.0**-8, device=DEVICE))


def views(base: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of shape (4, 6, 16) of a base of (8, 12, 48)."""
    return {
        "packed": base[:4, :6, :16].contiguous(),
        "sliced": base[:4, :6, 3:19],
        "transposed": base[:6, :4, :16].transpose(0, 1),
        "dense, other order": base[:6, :4, :16].contiguous().transpose(0, 1),
        "columns apart": base[:4, :6, :32:2],
        "expanded": base[0, 0, :16].expand(4, 6, 16),
    }


@pytest.mark.parametrize("of_residual", views(torch.ones(8, 12, 48)))
@pytest.mark.parametrize("of_x", views(torch.ones(8, 12, 48)))
def test_strides(of_x, of_residual):
    x, stream = views(random_x((8, 12, 48), torch.float32))[of_x], views(random_x((8, 12, 48), torch.float32, seed=1))[of_residual]
    weight = random_weight(48, torch.float32)[::3]
    assert_added(add_rmsnorm(x, stream, weight), x, stream, weight)


def test_what_lies_as_its_result_does_is_read_in_place(monkeypatch):
    x, stream = (views(random_x((8, 12, 48), torch.float32, seed=seed))["dense, other order"] for seed in (0, 1))
    monkeypatch.setattr(residual_plans, "_copying_plan", None)
    y, total = add_rmsnorm(x, stream)
    assert_added((y, total), x, stream, None)
    assert y.stride() == x.stride()
    slices = views(random_x((8, 12, 48), torch.float32))["sliced"], views(random_x((8, 12, 48), torch.float32, seed=1))["sliced"]
    assert_added(add_rmsnorm(slices[0].clone(), slices[1].clone()), *slices, None)
    x, stream = slices[0].clone(), slices[1].clone()
    add_rmsnorm(slices[0], slices[1], out=slices[0], residual_out=slices[1])
    assert_added((slices[0], slices[1]), x, stream, None)


def test_negated_views():
    """The imaginary part of a conjugate has a lazy minus sign."""
    x, stream = (torch.randn(4, 16, dtype=torch.complex64, device=DEVICE).conj().imag for _ in range(2))
    assert x.is_neg()
    assert_added(add_rmsnorm(x, stream), x.resolve_neg(), stream.resolve_neg(), None)
    plain = x.resolve_neg()
    assert_added(add_rmsnorm(plain, stream), plain, stream.resolve_neg(), None)


@pytest.mark.parametrize("strides", [None, (48, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("given", ["out", "residual_out", "both"])
def test_given_results(given, strides):
    x, stream, weight = inputs()
    fences = {name: Fenced(X, strides or packed_strides(X), torch.float32) for name in ("out", "residual_out") if given in (name, "both")}
    for _ in range(2):
        y, total = add_rmsnorm(x, stream, weight, **{name: fence.view for name, fence in fences.items()})
        assert_added((y, total), x, stream, weight)
        for name, result in (("out", y), ("residual_out", total)):
            if name in fences:
                assert result is fences[name].view
                fences[name].assert_intact(name)


@pytest.mark.parametrize("residual_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [X, (3, 5000), (2, 70_000)], ids=str)
def test_in_place(shape, residual_dtype):
    """As fused_add_rms_norm is called in serving: y into x, the sum into residual. The second call takes the shortcut."""
    for seed in (3, 4):
        x, stream = random_x(shape, torch.float16, seed=seed), random_x(shape, residual_dtype, seed=seed + 5)
        weight = random_weight(shape[-1], torch.float16)
        was_x, was_stream = x.clone(), stream.clone()
        y, total = add_rmsnorm(x, stream, weight, out=x, residual_out=stream)
        assert y is x
        assert total is stream
        assert_added((y, total), was_x, was_stream, weight)


def test_in_place_never_runs_a_variant_that_reads_late():
    """split_row's programs may read a row again after others have stored their part."""
    x, stream, _ = inputs((2, 9000))
    with override(Config.of("split_row", block_cols=1024, max_pieces=4, weight_first=False, num_warps=4)):
        add_rmsnorm(x, stream)
        add_rmsnorm(x, stream, residual_out=stream)
    assert stats() == {"override": 1, "heuristic": 1}


def overlaps():
    pool = torch.zeros(8, 40, device=DEVICE)
    x, stream = torch.zeros(X, device=DEVICE), torch.zeros(X, device=DEVICE)
    return {
        "y over the stream": (x, stream, {"out": stream}, "out overlaps residual"),
        "the sum over x": (x, stream, {"residual_out": x}, "residual_out overlaps x"),
        "both into one": (x, stream, {"out": pool[:4], "residual_out": pool[2:6]}, "residual_out overlaps out"),
        "y a row on": (pool[:4], stream, {"out": pool[1:5]}, "out overlaps x in part"),
        "the sum a row on": (x, pool[:4], {"residual_out": pool[1:5]}, "residual_out overlaps residual in part"),
        "x is the stream": (x, x, {"out": x, "residual_out": x}, "out overlaps residual"),
        "x a row on from the stream": (pool[1:5], pool[:4], {"out": pool[1:5], "residual_out": pool[:4]}, "out overlaps residual"),
        "an expanded sum": (x, stream, {"residual_out": pool[:1].expand(4, 40)}, "residual_out has stride 0"),
    }


@pytest.mark.parametrize("name", overlaps())
def test_results_that_overlap_are_refused(name):
    """Also after a call of the same kind with memory of its own is remembered."""
    x, stream, given, words = overlaps()[name]
    for seen_before in (False, True):
        if seen_before:
            own_x, own_stream = torch.ones(X, device=DEVICE), torch.ones(X, device=DEVICE)
            add_rmsnorm(own_x, own_stream)
            add_rmsnorm(own_x, own_stream, out=own_x, residual_out=own_stream)
            add_rmsnorm(own_x, own_stream, **{key: torch.empty(X, device=DEVICE) for key in given})
        with pytest.raises(InvalidInput, match=words):
            add_rmsnorm(x, stream, **given)


def test_halves_of_one_memory_in_place():
    """They interleave without an element in common."""
    pool = random_x((4, 80), torch.float32)
    x, stream = pool[:, :40], pool[:, 40:]
    was = x.clone(), stream.clone()
    add_rmsnorm(x, stream, out=x, residual_out=stream)
    assert_added((x, stream), *was, None)


def test_x_may_be_the_stream_where_nothing_is_overwritten():
    x, _, weight = inputs()
    for _ in range(2):
        assert_added(add_rmsnorm(x, x, weight), x, x, weight)


INVALID = {
    "x a list": (lambda: {"x": [1.0]}, "x is a list"),
    "x None": (lambda: {"x": None}, "NoneType"),
    "residual None": (lambda: {"residual": None}, "residual is a NoneType"),
    "residual a number": (lambda: {"residual": 1.0}, "residual is a float"),
    "residual sparse": (lambda: {"residual": torch.ones(X).to_sparse()}, "sparse_coo"),
    "residual of integers": (lambda: {"residual": torch.ones(X, dtype=torch.int32, device=DEVICE)}, "int32"),
    "residual of another shape": (lambda: {"residual": torch.ones(40, device=DEVICE)}, r"residual has shape \(40,\), x \(4, 40\)"),
    "residual elsewhere": (lambda: {"residual": torch.ones(X, device="meta")}, "residual is on meta"),
    "weight too short": (lambda: {"weight": torch.ones(7, device=DEVICE)}, r"\(7,\)"),
    "eps negative": (lambda: {"eps": -1.0}, r"-1\.0"),
    "x empty": (lambda: {"x": torch.ones(0, 40, device=DEVICE), "residual": torch.ones(0, 40, device=DEVICE)}, "x is empty"),
    "out of another dtype": (lambda: {"out": torch.ones(X, dtype=torch.float16, device=DEVICE)}, "out is .*float16"),
    "residual_out of another shape": (lambda: {"residual_out": torch.ones(40, 4, device=DEVICE)}, r"residual_out is \(40, 4\)"),
    "residual_out of x's dtype": (
        lambda: {"residual": torch.ones(X, dtype=torch.float16, device=DEVICE), "residual_out": torch.ones(X, device=DEVICE)},
        "residual_out is .*residual asks for",
    ),
    "out a list": (lambda: {"out": []}, "list"),
    "backend unknown": (lambda: {"backend": "cuda"}, "cuda"),
    "triton for float64": (lambda: {"residual": torch.ones(X, dtype=torch.float64, device=DEVICE), "backend": "triton"}, "float64"),
    "out with a gradient due": (
        lambda: {"residual": torch.ones(X, device=DEVICE).requires_grad_(), "out": torch.ones(X, device=DEVICE)},
        "out given, but an input or result requires grad",
    ),
    "results that require grad": (lambda: {"residual_out": torch.ones(X, device=DEVICE).requires_grad_()}, "residual_out given"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_input(name):
    make, pattern = INVALID[name]
    arguments = {"x": torch.ones(X, device=DEVICE), "residual": torch.ones(X, device=DEVICE), **make()}
    for _ in range(2):
        with pytest.raises(InvalidInput, match=f"(?s){pattern}"):
            add_rmsnorm(**arguments)
        add_rmsnorm(torch.ones(X, device=DEVICE), torch.ones(X, device=DEVICE))


def test_a_cpu_tensor_needs_the_way_out(monkeypatch):
    monkeypatch.setattr(plans, "interpreting", lambda: False)
    x, stream = torch.randn(X), torch.randn(X)
    with pytest.raises(InvalidInput, match=r'(?s)cpu.*x\.cuda\(\).*backend="torch"'):
        add_rmsnorm(x, stream)
    assert_added(add_rmsnorm(x, stream, backend="torch"), x, stream, None)


@pytest.mark.parametrize("which", ["x", "residual", "both"])
def test_float64_is_pytorchs(which):
    x, stream, weight = inputs()
    x, stream = x.double() if which != "residual" else x, stream.double() if which != "x" else stream
    y, total = add_rmsnorm(x, stream, weight)
    assert (y.dtype, total.dtype) == (x.dtype, stream.dtype)
    assert_rmsnorm(y, total, weight)
    assert stats() == {"torch_requested": 1}


@pytest.mark.parametrize("shape", [(0, 40), (3, 0, 40)], ids=str)
def test_an_empty_batch_by_pytorch(shape):
    x = torch.ones(shape, device=DEVICE)
    y, total = add_rmsnorm(x, x, torch.ones(40, device=DEVICE), backend="torch")
    assert y.shape == total.shape == shape


def test_a_second_call_looks_nothing_up(monkeypatch):
    """With results given, without, and in place."""
    x, stream, weight = inputs()
    y, total = torch.empty_like(x), torch.empty_like(stream)
    calls = [
        lambda: add_rmsnorm(x, stream, weight),
        lambda: add_rmsnorm(x, stream, out=x, residual_out=stream),
        lambda: add_rmsnorm(x, stream, weight, out=y, residual_out=total),
    ]
    for call in calls:
        call()
    monkeypatch.setattr(residual_plans, "prepare", None)
    for call in calls:
        call()
    monkeypatch.setattr(residual, "_plan", None)
    for call in calls[:2]:
        call()  # found by the check of its tensors alone


def test_the_plan_table_is_bounded(monkeypatch):
    monkeypatch.setattr(residual, "MAX_PLANS", 4)
    for rows in range(1, 12):
        x, stream, _ = inputs((rows, 8))
        assert_added(add_rmsnorm(x, stream), x, stream, None)
    assert len(residual._plans) <= 4


def test_stats_counts_both_functions_and_forgets_both():
    x, stream, _ = inputs()
    add_rmsnorm(x, stream)
    rmsnorm(x)
    assert stats() == {"heuristic": 2}
    forget_plans()
    assert stats() == {}


def test_given_results_bump_their_versions():
    x, stream, _ = inputs()
    versions = x._version, stream._version
    add_rmsnorm(x, stream, out=x, residual_out=stream)
    assert (x._version, stream._version) == (versions[0] + 1, versions[1] + 1)


def test_inference_tensors():
    with torch.inference_mode():
        x, stream, weight = inputs()
        was = x.clone(), stream.clone()
        for _ in range(2):
            assert_added(add_rmsnorm(x, stream, weight), x, stream, weight)
        add_rmsnorm(x, stream, weight, out=x, residual_out=stream)
        assert_added((x, stream), *was, weight)


def test_batch_invariant():
    x, stream, weight = inputs((70, 300), torch.float16)
    y, total = add_rmsnorm(x, stream, weight, batch_invariant=True)
    for rows in (1, 5, 33):
        part = add_rmsnorm(x[:rows].clone(), stream[:rows].clone(), weight, batch_invariant=True)
        assert torch.equal(part[0], y[:rows])
        assert torch.equal(part[1], total[:rows])


def test_autocast_keeps_the_dtypes():
    x, stream, weight = inputs(X, torch.float16, torch.float32, torch.float16)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert_added(add_rmsnorm(x, stream, weight), x, stream, weight)
        assert_added(add_rmsnorm(x, stream, weight, backend="torch"), x, stream, weight)


def test_transforms():
    """vmap, grad and forward-mode derivatives, before and after a plan is remembered."""
    x, stream, weight = inputs((3, 5, 16))
    for _ in range(2):
        batched = torch.func.vmap(lambda x, stream: add_rmsnorm(x, stream, weight[:16]))(x, stream)
        assert_added(batched, x, stream, weight[:16])
        gradient = torch.func.grad(lambda x: add_rmsnorm(x, stream, weight[:16])[0].sum())(x)
        assert_gradients(gradient, None, torch.ones_like(x), x + stream, weight[:16])
        _, tangents = torch.func.jvp(lambda x: add_rmsnorm(x, stream), (x,), (torch.ones_like(x),))
        assert torch.equal(tangents[1], torch.ones_like(x))
        add_rmsnorm(x, stream, weight[:16])


# --- gradients


def directions(y, total):
    return [torch.randn(t.shape, generator=torch.Generator().manual_seed(3)).to(t.dtype).to(t.device) for t in (y, total)]


@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40,), (2, 3, 129)], ids=str)
def test_gradients(shape, x_dtype, residual_dtype, problems):
    x, stream, weight = leaves(shape, x_dtype, residual_dtype, x_dtype)
    y, total = add_rmsnorm(x, stream, weight)
    dy, dsum = directions(y, total)
    dx, dstream, dw = torch.autograd.grad((y, total), (x, stream, weight), (dy, dsum))
    assert_gradients(dstream, dw, dy, total.detach(), weight, dsum=dsum, daddend=dx)
    assert [problem.op for problem in problems] == [ADD_FORWARD, ADD_BACKWARD]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_some_of_the_inputs_require_grad(wanted):
    """What is wanted has the bits that it has among all gradients."""
    everything = leaves()
    y, total = add_rmsnorm(*everything)
    dy, dsum = directions(y, total)
    whole = torch.autograd.grad((y, total), everything, (dy, dsum))
    some = [tensor.detach().requires_grad_(at in wanted) for at, tensor in enumerate(everything)]
    y, total = add_rmsnorm(*some)
    if wanted == (2,):
        assert total.requires_grad  # it is a result of the same node of the graph
    found = torch.autograd.grad((y, total), [some[at] for at in wanted], (dy, dsum))
    for at, gradient in zip(wanted, found, strict=True):
        assert torch.equal(gradient, whole[at])


@pytest.mark.parametrize("pair", [(torch.float32, torch.float32), (torch.float16, torch.float32)], ids=str)
def test_one_of_the_results_is_used(pair, problems):
    """The norm alone is the plain backward of the sum; the sum alone passes its gradient on."""
    x, stream, weight = leaves(X, *pair, pair[0])
    y, total = add_rmsnorm(x, stream, weight)
    dy, dsum = directions(y, total)
    dx, dstream, dw = torch.autograd.grad(y, (x, stream, weight), dy, retain_graph=True)
    assert_gradients(dstream, dw, dy, total.detach(), weight)
    assert torch.equal(dx, dstream.to(dx.dtype))
    assert [problem.op for problem in problems] == [ADD_FORWARD, BACKWARD]
    dx, dstream = torch.autograd.grad(total, (x, stream), dsum)
    assert torch.equal(dstream, dsum)
    assert torch.equal(dx, dsum.to(x.dtype))
    assert len(problems) == 2


def test_gradients_of_odd_strides():
    """Expanded, transposed and reused gradients; none is written to."""
    x, stream, weight = leaves((6, 4, 16))
    y, total = add_rmsnorm(x, stream, weight)
    base = torch.randn(4, 6, 16, device=DEVICE)
    for dy in (base.transpose(0, 1), base[:1, 0, :].expand(6, 4, 16), base[0, 0, 0].expand(6, 4, 16)):
        for dsum in (dy, base.transpose(0, 1)):
            before = dy.clone(), dsum.clone()
            dx, dstream, dw = torch.autograd.grad((y, total), (x, stream, weight), (dy, dsum), retain_graph=True)
            assert_gradients(dstream, dw, dy, total.detach(), weight, dsum=dsum)
            assert torch.equal(dx, dstream)
            assert torch.equal(dy, before[0])
            assert torch.equal(dsum, before[1])


def chain(function, x, stream, weight):
    """Two blocks of a residual stream."""
    for scale in (0.5, 2.0):
        y, stream = function(x, stream, weight)
        x = torch.tanh(y) * scale
    return x.sum() + stream.square().sum()


def unfused(x, stream, weight):
    total = x + stream
    return F.rms_norm(total, total.shape[-1:], weight, 1e-6), total


def test_a_chain_of_blocks_accumulates_in_place_of_nothing():
    """Gradients that meet are added up to what PyTorch's own operations give, in float64."""
    x, stream, weight = leaves()
    chain(add_rmsnorm, x, stream, weight).backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, stream, weight)]
    chain(unfused, *wide).backward()
    for own, want in zip((x, stream, weight), wide, strict=True):
        torch.testing.assert_close(own.grad.double(), want.grad, rtol=1e-4, atol=1e-4 * float(want.grad.abs().max()))


def test_two_gradients_of_one_input_do_not_share_memory():
    x, stream, weight = leaves()
    y, total = add_rmsnorm(x, stream, weight)
    (y.sum() + total.sum()).backward()
    x.grad.zero_()
    assert stream.grad.abs().sum() > 0


def test_second_derivatives():
    """By PyTorch's operations, against float64."""
    x, stream, weight = leaves((3, 8))
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, stream, weight)]
    seconds = []
    for function, given in ((add_rmsnorm, (x, stream, weight)), (unfused, wide)):
        y, total = function(*given)
        first = torch.autograd.grad((y.sin().sum() + total.cos().sum()), given, create_graph=True)
        seconds.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), given))
    for own, want in zip(*seconds, strict=True):
        scale = float(want.abs().max())
        torch.testing.assert_close(own.double(), want, rtol=1e-3, atol=1e-4 * scale)


def test_checkpointing_and_saved_tensor_hooks():
    x, stream, weight = leaves()
    y, total = add_rmsnorm(x, stream, weight)
    dy, dsum = directions(y, total)
    want = torch.autograd.grad((y, total), (x, stream, weight), (dy, dsum))
    again = checkpoint(add_rmsnorm, x, stream, weight, use_reentrant=False)
    for own, other in zip(torch.autograd.grad(again, (x, stream, weight), (dy, dsum)), want, strict=True):
        assert torch.equal(own, other)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t.half(), lambda t: t.float()):
        y, total = add_rmsnorm(x, stream, weight)
    assert seen == [X, (40,)]  # the sum and the weight, nothing else
    found = torch.autograd.grad((y, total), (x, stream, weight), (dy, dsum))
    assert_gradients(found[1], None, dy, total.detach().half().float(), weight.detach().half().float(), dsum=dsum)


def test_a_sum_that_was_overwritten_is_noticed():
    x, stream, weight = leaves()
    y, total = add_rmsnorm(x, stream, weight)
    with torch.no_grad():
        total.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_backward_in_another_thread_runs_the_override_of_its_forward(monkeypatch):
    config = Config.of("backward_whole_row", num_warps=1, programs_per_sm=8, stages=1)
    x, stream, weight = leaves((5, 256))
    with override(config):
        y, total = add_rmsnorm(x, stream, weight)
    launched = []
    real = dispatch.build_backward_launcher
    monkeypatch.setattr(dispatch, "build_backward_launcher", lambda own, *a, **k: launched.append(own) or real(own, *a, **k))
    thread = threading.Thread(target=lambda: (y.sum() + total.sum()).backward())
    thread.start()
    thread.join(60)
    assert launched == [config]
    assert stream.grad is not None


def test_no_backward_variant_leaves_it_to_pytorch(monkeypatch):
    real = dispatch.heuristic_config
    monkeypatch.setattr(dispatch, "heuristic_config", lambda problem, *a: None if problem.is_backward else real(problem, *a))
    if INTERPRETED:
        monkeypatch.setattr(dispatch, "interpreting", lambda: False)  # where PyTorch is never picked
    x, stream, weight = leaves(X, torch.float16, torch.float32, torch.float16)
    y, total = add_rmsnorm(x, stream, weight)
    dy, dsum = directions(y, total)
    dx, dstream, dw = torch.autograd.grad((y, total), (x, stream, weight), (dy, dsum))
    assert_gradients(dstream, dw, dy, total.detach(), weight, dsum=dsum)
    assert torch.equal(dx, dstream.half())


def test_fenced_inputs_are_read_within_their_fences():
    x, stream, weight = inputs((5, 129), torch.float16)
    assert_added(add_rmsnorm(fenced_copy(x, shift=1), fenced_copy(stream, shift=3), weight), x, stream, weight)
