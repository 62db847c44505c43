"""`kernels.RMSNorm` beside torch.nn.RMSNorm: arguments, state, repr, shapes, gradients, and tensors that no kernel takes."""

import copy
import importlib
import inspect
import io

import pytest
import torch
from torch.autograd import forward_ad

from kernels import InvalidInput, RMSNorm, override, plans, stats
from kernels.device import current_device
from kernels.variants import candidates
from oracle import DEVICE, DTYPES, assert_rmsnorm, random_weight, random_x
from tuning_db.model import Problem

module = importlib.import_module("kernels.module")


def both(*args, **kwargs) -> tuple[RMSNorm, torch.nn.RMSNorm]:
    """Ours and torch's with the same random weight."""
    ours, theirs = RMSNorm(*args, **kwargs).to(DEVICE), torch.nn.RMSNorm(*args, **kwargs).to(DEVICE)
    if ours.weight is not None:
        with torch.no_grad():
            ours.weight.copy_(torch.rand(ours.weight.shape, generator=torch.Generator().manual_seed(0)) + 0.5)
        theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_the_same_arguments_state_and_repr():
    ours, theirs = (list(inspect.signature(norm).parameters.values()) for norm in (RMSNorm, torch.nn.RMSNorm))
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]
    assert {(p.name, p.kind) for p in ours[len(theirs) :]} == {
        (name, inspect.Parameter.KEYWORD_ONLY) for name in ("weight_offset", "casting")
    }
    for arguments in ({}, {"eps": 1e-5}, {"elementwise_affine": False}, {"dtype": torch.bfloat16}):
        ours, theirs = both((3, 5), **arguments)
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
        assert [parameter.dtype for parameter in ours.parameters()] == [parameter.dtype for parameter in theirs.parameters()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [8, (8,), [3, 5], (2, 3, 4)], ids=str)
def test_values_and_gradients(shape, dtype):
    ours, theirs = both(shape, eps=1e-5, dtype=dtype)
    normalized = ours.normalized_shape
    x = random_x((6, 4, ours.weight.numel()), dtype).view(6, 4, *normalized).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, want = ours(x), theirs.double()(wide)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert_rmsnorm(y.flatten(2), x.flatten(2), ours.weight.flatten(), eps=1e-5)
    y.sum().backward()
    want.sum().backward()
    assert ours.weight.grad.shape == normalized
    # Sums of 24 terms, each some 30 fp32 roundings, then one rounding to dtype (two under the interpreter, which cuts).
    bound = 2 * torch.finfo(dtype).eps + 256 * 2.0**-24
    for got, exact in ((x.grad, wide.grad), (ours.weight.grad, theirs.weight.grad)):
        assert ((got.double() - exact).abs() <= bound * exact.abs().amax(-1, keepdim=True)).all()


def test_eps_none_is_torchs():
    """So small an x that another machine epsilon would show."""
    ours, theirs = both(16)
    for dtype in (*DTYPES, torch.float64):
        x = (random_x((1, 16), torch.float32) * 1e-4).to(dtype)
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        assert_rmsnorm(ours(x), x, ours.weight, eps=eps)
    x = random_x((1, 16), torch.float32) * 1e-4
    assert (ours(x) - theirs(x)).abs().max() <= 16 * 2.0**-24 * theirs(x).abs().max()


def test_no_kernel_is_needed_on_the_cpu_and_for_empty_batches(monkeypatch):
    for name in (module, plans):
        monkeypatch.setattr(name, "interpreting", lambda: False)
    ours, theirs = (norm.cpu() for norm in both((3, 5), eps=1e-6))
    for shape in ((4, 3, 5), (0, 3, 5), (2, 0, 3, 5)):
        x = torch.randn(shape)
        assert torch.equal(ours(x), theirs(x))
    monkeypatch.undo()
    empty = torch.empty(0, 3, 5, device=DEVICE)
    assert both((3, 5))[0](empty).shape == empty.shape


def test_a_kernel_serves_the_rest():
    ours, _ = both((3, 5))
    ours(random_x((4, 15), torch.float32).view(4, 3, 5))
    assert set(stats()) == {"heuristic"}


def test_a_weight_of_another_dtype_and_autocast_keep_the_dtype():
    ours, _ = both(16)
    x = random_x((4, 16), torch.bfloat16)
    assert_rmsnorm(ours(x), x, ours.weight, eps=torch.finfo(torch.float32).eps)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
        assert ours(x.float()).dtype == torch.float32


@pytest.mark.parametrize("shape", [(4, 5), (5, 3), (3,), ()], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_another_shape_is_torchs_error(shape, affine):
    ours, theirs = both((3, 5), elementwise_affine=affine)
    x = torch.ones(shape, device=DEVICE)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        theirs(x)
    with pytest.raises(expected.type) as raised:
        ours(x)
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("mode", [{}, {"weight_offset": 1.0, "casting": "llama"}], ids=str)
def test_copies_and_files(mode):
    ours = RMSNorm((3, 5), **mode).to(DEVICE)
    x = random_x((4, 15), torch.float32).view(4, 3, 5)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert isinstance(other, RMSNorm)
        assert repr(other) == repr(ours)
        assert torch.equal(other(x), ours(x))


@pytest.mark.parametrize("shape", [16, (2, 8)], ids=str)
def test_numerics_modes(shape):
    """Every mode starts by scaling by 1; a weight offset counts as part of the weight, for tensors that no kernel takes too."""
    plain, gemma = RMSNorm(shape, eps=1e-5).to(DEVICE), RMSNorm(shape, eps=1e-5, weight_offset=1, casting="gemma").to(DEVICE)
    x = random_x((4, 16), torch.float16).view(4, *plain.normalized_shape)
    assert (gemma.weight == 0).all()
    assert torch.equal(gemma(x), plain(x))
    with torch.no_grad():
        gemma.weight += 0.5
    assert_rmsnorm(gemma(x).flatten(1), x.flatten(1), gemma.weight.flatten() + 1, eps=1e-5)
    assert_rmsnorm(gemma(x.double()).flatten(1), x.double().flatten(1), gemma.weight.flatten() + 1, eps=1e-5)
    llama = RMSNorm(shape, eps=1e-5, casting="llama").to(DEVICE)
    with torch.no_grad():
        llama.weight.fill_(1.1)
        assert torch.equal(llama(x), (plain(x) * llama.weight).half())
    assert repr(gemma).endswith("elementwise_affine=True, weight_offset=1.0, casting='gemma')")


def warmed(size: int, **arguments) -> tuple[RMSNorm, torch.Tensor]:
    """A module, and an x whose kind of call it knows."""
    ours, x = RMSNorm(size, eps=1e-5, **arguments).to(DEVICE), random_x((4, size), torch.float32)
    for _ in range(2):
        ours(x)
    return ours, x


def test_a_known_call_obeys_an_override():
    ours, x = warmed(64)
    config = next(config for config in candidates(Problem("rmsnorm", *("float32",) * 3, 4, 64), current_device()))
    with override(config):
        ours(x)
    assert stats()["override"] == 1


def test_a_known_call_has_a_tangent_under_forward_mode():
    ours, x = warmed(64)
    with forward_ad.dual_level():
        y = ours(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(y).tangent is not None


def test_a_parametrized_weight_counts():
    class Doubled(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    ours, x = warmed(64)
    plain = ours(x)
    torch.nn.utils.parametrize.register_parametrization(ours, "weight", Doubled())
    for _ in range(2):
        assert torch.equal(ours(x), 2 * plain)


def test_rows_that_another_module_knows_are_still_of_the_wrong_length():
    narrow, _ = warmed(32, elementwise_affine=False)
    _, x = warmed(64, elementwise_affine=False)
    with pytest.raises(RuntimeError, match="32"):
        narrow(x)


def test_bad_modes():
    with pytest.raises(InvalidInput, match="casting is 'bf16'; use one of"):
        RMSNorm(16, casting="bf16")
    with pytest.raises(InvalidInput, match=r"weight_offset is 1\.0, but elementwise_affine=False makes no weight"):
        RMSNorm(16, elementwise_affine=False, weight_offset=1.0)


def test_compiled():
    ours, _ = both((3, 5))
    x = random_x((4, 15), torch.float32).view(4, 3, 5)
    y = torch.compile(ours, fullgraph=True, backend="eager")(x)
    assert_rmsnorm(y.flatten(1), x.flatten(1), ours.weight.flatten(), eps=torch.finfo(torch.float32).eps)


def test_a_replaced_weight_says_what_length_a_row_has():
    """As after pruning; the first call and those of a kind that is known. normalized_shape is what the module was made with."""
    module = RMSNorm(8, eps=1e-6).to(DEVICE)
    module.weight = torch.nn.Parameter(random_weight(16, torch.float32).clone())
    x = random_x((3, 16), torch.float32)
    for _ in range(3):
        assert_rmsnorm(module(x), x, module.weight)
    for cols in (8, 12):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            module(random_x((3, cols), torch.float32))
