"""`rmsnorm` under autograd: gradients of any layout, what is saved, what a second backward costs, and everything that wraps a backward."""

import importlib
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from gradient_oracle import assert_gradients, expected_gradients, root_mean_square_error
from kernels import InvalidInput, RMSNorm, dispatch, override, rmsnorm
from kernels.autograd import MAX_EPS
from kernels.reference import rmsnorm_backward_torch
from kernels.shortcuts import LONG_RUN
from kernels.variants import candidates
from oracle import DEVICE, DTYPES, INTERPRETED, assert_rmsnorm, random_weight, random_x
from tuning_db.model import BACKWARD, Config, Problem

backward = importlib.import_module("kernels.backward")
PAIRS = [(x, w) for x in DTYPES for w in (None, x, torch.float32)]


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configs of all backwards prepared in this test."""
    seen: list[Config] = []
    real = dispatch.build_backward_launcher

    def noted(config, *args, **kwargs):
        seen.append(config)
        return real(config, *args, **kwargs)

    monkeypatch.setattr(dispatch, "build_backward_launcher", noted)
    return seen


def leaves(shape, x_dtype=torch.float32, w_dtype=None, axis=-1):
    """x and a weight (None for dtype None) that require grad."""
    x = random_x(shape, x_dtype, axis=axis)
    weight = random_weight(shape[axis], w_dtype)
    return x.requires_grad_(), weight if weight is None else weight.clone().requires_grad_()


def direction(x: torch.Tensor, seed: int = 3) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype).to(x.device)


def gradients(y: torch.Tensor, dy: torch.Tensor, *inputs: torch.Tensor | None, **kwargs: bool):
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, dy, **kwargs))
    return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in inputs]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7, 1), (3, 5, 40), (2, 129), (2, 3, 4, 5)], ids=str)
def test_shapes_and_dtypes(shape, pair, backwards):
    for axis in range(len(shape)):
        x, weight = leaves(shape, *pair, axis=axis)
        y, dy = rmsnorm(x, weight, axis=axis), direction(x)
        assert_rmsnorm(y, x, weight, axis=axis)
        assert_gradients(*gradients(y, dy, x, weight), dy, x, weight, axis=axis, note=f"axis {axis}")
    assert len(backwards) == len(shape)


def views(base: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of shape (4, 6, 16) of a base of (8, 12, 48), all different in how they lie."""
    return {
        "packed": base[:4, :6, :16].contiguous(),
        "padded rows": base[:1, :, :16].reshape(12, 16).repeat(2, 2)[:, :16].view(4, 6, 16),
        "sliced": base[:4, :6, 3:19],
        "transposed": base[:6, :4, :16].transpose(0, 1),
        "last two swapped": base[:4, :12, :6].permute(0, 2, 1).repeat(1, 1, 2)[..., :16],
        "axis first in memory": base[:4, :6, :16].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "every second column": base[:4, :6, :32:2],
        "expanded rows": base[0, 0, :16].expand(4, 6, 16),
        "expanded batch": base[:1, :6, :16].expand(4, 6, 16),
        "expanded columns": base[:4, :6, :1].expand(4, 6, 16),
        "one number": base[0, 0, 0].expand(4, 6, 16),
    }


@pytest.mark.parametrize("of_dy", views(torch.ones(8, 12, 48)))
@pytest.mark.parametrize("of_x", ["packed", "sliced", "transposed", "axis first in memory", "every second column", "expanded batch"])
def test_strides(of_x, of_dy):
    """Any x with any dy; dy is used again afterwards."""
    base = random_x((8, 12, 48), torch.float32, seed=1)
    x, dy = views(base)[of_x], views(direction(base))[of_dy]
    x = x.detach().requires_grad_()
    weight = random_weight(16, torch.float32).clone().requires_grad_()
    before = dy.clone()
    dx, dw = gradients(rmsnorm(x, weight), dy, x, weight)
    assert_gradients(dx, dw, dy, x, weight)
    assert torch.equal(dy, before)
    assert not any(stride == 0 for size, stride in zip(dx.shape, dx.stride(), strict=True) if size > 1)


def test_a_negated_gradient():
    """The imaginary part of a conjugate has a lazy minus sign, that of x too."""
    x = torch.randn(4, 16, dtype=torch.complex64, device=DEVICE).conj().imag.detach().requires_grad_()
    dy = torch.randn(4, 16, dtype=torch.complex64, device=DEVICE).conj().imag
    assert x.is_neg()
    assert dy.is_neg()
    (dx,) = gradients(rmsnorm(x), dy, x)
    assert_gradients(dx, None, dy.resolve_neg(), x.resolve_neg(), None)


def test_a_strided_weight():
    memory = random_weight(80, torch.float32).clone().requires_grad_()
    for weight in (memory[::2], memory[:1].expand(40), memory[40:]):
        x, _ = leaves((5, 40))
        assert_gradients(*gradients(rmsnorm(x, weight), direction(x), x, weight), direction(x), x, weight)


@pytest.mark.parametrize("which", ["x", "weight"])
def test_one_of_two_requires_grad(which, backwards):
    x, weight = leaves((5, 40), torch.float32, torch.float32)
    dy = direction(x)
    both = gradients(rmsnorm(x, weight), dy, x, weight)
    (weight if which == "x" else x).requires_grad_(False)
    dx, dw = gradients(rmsnorm(x, weight), dy, x, weight)
    kept, gone = (dx, dw) if which == "x" else (dw, dx)
    assert gone is None
    assert torch.equal(kept, both[0 if which == "x" else 1])
    assert len(backwards) == 2


def test_only_x_and_weight_are_saved():
    """As they are: no copy, no rstd, no y."""
    x, weight = leaves((5, 40), torch.float32, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        rmsnorm(x, weight).sum().backward()
    assert saved == [x.data_ptr(), weight.data_ptr()]
    assert_gradients(x.grad, weight.grad, torch.ones_like(x), x, weight)


def test_hooks_that_give_other_strides_back():
    x, weight = leaves((5, 40), torch.float32, torch.float32)

    def unpack(tensor):
        return tensor if tensor.dim() == 1 else F.pad(tensor, (0, 3))[:, :40]

    for _ in range(2):
        y = rmsnorm(x, weight)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            other = rmsnorm(x, weight)
        for result in (y, other):
            assert_gradients(*gradients(result, direction(x), x, weight), direction(x), x, weight)


@pytest.mark.parametrize("which", ["x", "weight"])
def test_a_change_after_the_call_is_seen(which):
    x, weight = leaves((5, 40), torch.float32, torch.float32)
    inner = [(x * 1).detach().requires_grad_(), (weight * 1).detach().requires_grad_()]
    y = rmsnorm(*inner)
    with torch.no_grad():
        inner[0 if which == "x" else 1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_second_backward_looks_nothing_up(monkeypatch, backwards):
    x, weight = leaves((5, 40), torch.float32, torch.float32)
    gradients(rmsnorm(x, weight), direction(x), x, weight)
    monkeypatch.setattr(dispatch, "choose_and_prepare_backward", None)
    dx, dw = gradients(rmsnorm(x, weight), direction(x), x, weight)
    assert_gradients(dx, dw, direction(x), x, weight)
    assert len(backwards) == 1


def test_the_plans_of_one_call_are_bounded(monkeypatch):
    monkeypatch.setattr(backward, "MAX_PLANS", 2)
    x, _ = leaves((5, 40))
    for pad in range(5):
        dy = F.pad(direction(x), (0, pad))[:, :40]
        assert_gradients(*gradients(rmsnorm(x), dy, x), None, dy, x, None)


def test_override_reaches_the_backward_in_whatever_thread_it_runs(backwards):
    x, weight = leaves((64, 40), torch.float32, torch.float32)
    legal = candidates(Problem(BACKWARD, *("float32",) * 3, 64, 40), dispatch.device_of(x.get_device()))
    chosen = next(config for config in legal if config.variant == "backward_whole_row")
    with override(chosen):
        y = rmsnorm(x, weight)
    found = []
    thread = threading.Thread(target=lambda: found.append(gradients(y, direction(x), x, weight)))
    thread.start()
    thread.join()
    assert backwards == [chosen]
    assert_gradients(*found[0], direction(x), x, weight)


@pytest.mark.parametrize("shape", [(4, 16), (3, 4, 7)], ids=str)
@pytest.mark.parametrize("axis", [0, -1])
def test_gradcheck(shape, axis):
    """Central differences in fp32 with step h = 1/128.

    Rounding: some 8 roundings of values up to 4, over 2h: 8 · 4 · 2^-24 · 64 = 1.2e-4. Truncation: h²/6 times a third derivative, which
    for x near 1 in size is at most some 20: 2e-4. Both together, twice over for the sum of both sides, stay below 1e-3.
    """
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    x = ((torch.rand(shape, generator=generator) + 0.5) * sign).to(DEVICE).requires_grad_()
    weight = (torch.rand(shape[axis], generator=generator) + 0.5).to(DEVICE).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, weight: rmsnorm(x, weight, axis=axis), (x, weight), eps=1 / 128, atol=1e-3, rtol=1e-3, fast_mode=False
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_double_backward(axis):
    """Through the gradients themselves: against autograd's second derivatives in float64."""
    x, weight = leaves((3, 5), torch.float32, torch.float32, axis=axis)
    x = (x.detach() * torch.tensor(0.1) + 1.0).requires_grad_()
    dy = direction(x).requires_grad_()

    def penalty(function, x, weight, dy):
        first = torch.autograd.grad(function(x, weight), (x, weight), dy, create_graph=True)
        return torch.autograd.grad(sum((part * part).sum() for part in first), (x, weight, dy))

    def formula(x, weight):
        rows = x.movedim(axis, -1)
        return (rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight).movedim(-1, axis)

    got = penalty(lambda x, weight: rmsnorm(x, weight, axis=axis), x, weight, dy)
    want = penalty(formula, *(tensor.detach().double().requires_grad_() for tensor in (x, weight, dy)))
    for a, b in zip(got, want, strict=True):
        # Sums of terms that cancel, each rounded some 100 times in fp32, of the size of the largest.
        assert (a.double() - b).abs().max() <= 256 * 2.0**-24 * max(float(part.abs().max()) for part in want)


def test_many_directions_at_once():
    """is_grads_batched runs the backward under vmap."""
    x, weight = leaves((3, 8), torch.float32, torch.float32)
    directions = torch.stack([direction(x, seed) for seed in range(4)])
    dx, dw = torch.autograd.grad(rmsnorm(x, weight), (x, weight), directions, is_grads_batched=True)
    for i in range(4):
        assert_gradients(dx[i], dw[i], directions[i], x, weight)


def test_per_sample_gradients():
    x, weight = leaves((3, 8), torch.float32, torch.float32)
    per_sample = torch.func.vmap(torch.func.grad(lambda w, x: rmsnorm(x, w).square().sum()), in_dims=(None, 0))(weight.detach(), x.detach())
    for i in range(3):
        y = rmsnorm(x[i], weight)
        (dw,) = torch.autograd.grad(y.square().sum(), weight)
        # Two ways to the same products, each rounded some 30 times in fp32.
        assert ((per_sample[i] - dw).abs() <= 64 * 2.0**-24 * dw.abs().max()).all()


def test_forward_mode_through_a_backward():
    """The derivative of dx along a direction of dy, in which dx is linear."""
    x, _ = leaves((3, 8))
    y = rmsnorm(x)
    with torch.autograd.forward_ad.dual_level():
        dy = torch.autograd.forward_ad.make_dual(direction(x), direction(x, 9))
        (dx,) = torch.autograd.grad(y, x, dy)
        tangent = torch.autograd.forward_ad.unpack_dual(dx).tangent
    assert_gradients(tangent, None, direction(x, 9), x, None)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, backwards):
    x, weight = leaves((5, 40), torch.float32, torch.float32)
    y = checkpoint(lambda x, weight: rmsnorm(x * 1, weight), x, weight, use_reentrant=use_reentrant)
    dy = direction(x)
    y.backward(dy)
    assert_gradients(x.grad, weight.grad, dy, x, weight)
    assert len(backwards) == 1


def test_autocast(backwards):
    x, weight = leaves((5, 40), torch.bfloat16, torch.float32)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = rmsnorm(x, weight)
        dy = direction(x)
        dx, dw = gradients(y, dy, x, weight)
    assert_gradients(dx, dw, dy, x, weight)
    assert backwards


def test_a_kernel_serves_what_requires_grad():
    x, weight = leaves((5, 40), torch.float32, torch.float32)
    assert_rmsnorm(rmsnorm(x, weight, backend="triton"), x, weight)
    with pytest.raises(InvalidInput, match="out was given"):
        rmsnorm(x, weight, out=torch.empty_like(x))


def test_no_rows_are_pytorchs():
    x, weight = torch.empty(0, 8, device=DEVICE, requires_grad=True), torch.ones(8, device=DEVICE, requires_grad=True)
    rmsnorm(x, weight, backend="torch").sum().backward()
    assert x.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_where_no_variant_serves_pytorch_does(monkeypatch):
    monkeypatch.setattr(dispatch, "heuristic_config", lambda problem, *_: None if problem.op == BACKWARD else Config.of("multi_row"))
    monkeypatch.setattr(dispatch, "build_launcher", lambda *_: lambda _, x, weight, eps: F.rms_norm(x, (8,), weight, eps))
    x, weight = leaves((5, 8), torch.float32, torch.float32)
    dy = direction(x)
    assert_gradients(*gradients(rmsnorm(x, weight), dy, x, weight), dy, x, weight)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_gradients_by_operations(axis, dtype):
    """What serves where no kernel does."""
    x, weight = random_x((3, 4, 5), torch.float32, axis=axis).to(dtype), random_weight((3, 4, 5)[axis], torch.float32).to(dtype)
    dx, dw = rmsnorm_backward_torch(direction(x), x, weight, 1e-6, axis)
    if dtype != torch.float64:
        assert_gradients(dx, dw, direction(x), x, weight, axis=axis)
        return
    for got, want in zip((dx, dw), expected_gradients(direction(x), x, weight, axis=axis), strict=True):
        assert (got - want).abs().max() <= 256 * 2.0**-53 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 128), (64, 1000), (24, 4096)], ids=str)
def test_as_exact_as_pytorch(shape, dtype):
    """Root mean square error of dx and dw against float64, at most 1.05 times that of F.rms_norm's own low-precision backward.

    In fp32 it is up to 1.12 times as large (H100): there the last few roundings are all there is, and the bound is assert_gradients'.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype).to(DEVICE).requires_grad_()
    weight = (torch.rand(shape[1], generator=generator) + 0.5).to(dtype).to(DEVICE).requires_grad_()
    dy = direction(x)
    ours = gradients(rmsnorm(x, weight), dy, x, weight)
    theirs = gradients(F.rms_norm(x, shape[1:], weight, 1e-6), dy, x, weight)
    for own, other, want in zip(ours, theirs, expected_gradients(dy, x, weight), strict=True):
        # The interpreter cuts bf16 off where hardware rounds: the error is spread over a whole unit, not half of one, and twice as large.
        cut = 2.0 if INTERPRETED and dtype == torch.bfloat16 else 1.0
        assert root_mean_square_error(own, want) <= 1.05 * cut * root_mean_square_error(other, want)


def test_more_values_of_eps_than_are_remembered():
    """As where eps is a hyperparameter that is searched for: each call and its backward, also a late one, have their own."""
    x, weight = leaves((3, 16), w_dtype=torch.float32)
    dy, values = direction(x), [0.5**exponent for exponent in range(MAX_EPS + 2)]
    graphs = [(eps, rmsnorm(x, weight, eps)) for eps in [*values, *values[:2]]]
    for eps, y in graphs:
        assert_rmsnorm(y, x, weight, eps)
        assert_gradients(*gradients(y, dy, x, weight), dy, x, weight, eps)


@pytest.mark.parametrize("through_module", [False, True])
def test_another_eps_after_a_long_run_of_calls(through_module):
    """Its node is tried first from then on, which is one of a certain eps."""
    x, weight = leaves((4, 64), torch.float32, torch.float32)
    module, dy = RMSNorm(64).to(x.device), direction(x)
    module.weight = torch.nn.Parameter(weight.detach())

    def y_of(eps: float) -> torch.Tensor:
        module.eps = eps
        return module(x) if through_module else rmsnorm(x, module.weight, eps)

    for eps in [1e-6] * (LONG_RUN + 3) + [0.5, 1e-6, 0.5]:
        y = y_of(eps)
        assert_rmsnorm(y, x, weight, eps)
        assert_gradients(*gradients(y, dy, x, module.weight), dy, x, weight, eps)
