"""Compiled code on a GPU: Inductor's, its CUDA graphs, and that both run the tuned config."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from gradient_oracle import assert_gradients
from interpreters import run_python
from kernels import RMSNorm, add_rmsnorm, dispatch, rmsnorm, stats
from oracle import DEVICE, assert_rmsnorm, random_weight, random_x
from tuning_db.model import Config

pytestmark = pytest.mark.gpu
SHAPES = [(1, 4096), (512, 4096), (16, 131_072), (4096, 128), (3, 65_536)]


@pytest.fixture(autouse=True)
def _compiles_anew() -> None:
    torch._dynamo.reset()


def inputs(shape, seed=0, dtype=torch.bfloat16):
    """x and weight that require grad, and dy."""
    x = random_x(shape, dtype, seed=seed).requires_grad_()
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 100)).to(dtype).to(DEVICE)
    return x, random_weight(shape[-1], dtype).clone().requires_grad_(), dy


@pytest.fixture
def built(monkeypatch) -> list[Config]:
    """The configs of all launchers built in this test, forward and backward."""
    seen: list[Config] = []
    for name in ("build_launcher", "build_add_launcher", "build_backward_launcher"):
        real = getattr(dispatch, name)
        monkeypatch.setattr(dispatch, name, lambda config, *args, real=real, **kwargs: seen.append(config) or real(config, *args, **kwargs))
    return seen


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_eager(shape, mode, built):
    """The bits and the configs of the eager call, forward and backward; in CUDA graphs too, whose replays follow x and dy.

    The graph's calls are of other kinds than the eager one, which records gradients.
    """
    compiled = torch.compile(lambda x, weight: rmsnorm(x, weight), fullgraph=True, mode=mode)
    for seed in range(4):
        x, weight, dy = inputs(shape, seed)
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x, weight)
        found = [y.detach().clone(), *(part.clone() for part in torch.autograd.grad(y, (x, weight), dy))]
        want = rmsnorm(x, weight)
        for got, expected in zip(found, (want, *torch.autograd.grad(want, (x, weight), dy)), strict=True):
            assert torch.equal(got, expected)
    for is_backward in (False, True):  # one config, prepared once for each kind of call: CUDA graphs may have more than one
        assert len({config for config in built if config.variant.startswith("backward") == is_backward}) == 1
    assert set(stats()) == {"heuristic"}


@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_as_eager(shape, mode, residual_dtype, built):
    """The same of add_rmsnorm; in both runs the sum's own gradient joins that of the norm in one kernel."""
    compiled = torch.compile(lambda *tensors: add_rmsnorm(*tensors), fullgraph=True, mode=mode)
    for seed in range(4):
        x, weight, dy = inputs(shape, seed)
        residual = random_x(shape, residual_dtype, seed=seed + 50).requires_grad_()
        dsum, tensors = torch.randn_like(residual), (x, residual, weight)
        torch.compiler.cudagraph_mark_step_begin()
        sums = compiled(*tensors)
        found = [part.detach().clone() for part in (*sums, *torch.autograd.grad(sums, tensors, (dy, dsum)))]
        want = add_rmsnorm(*tensors)
        for got, expected in zip(found, (*want, *torch.autograd.grad(want, tensors, (dy, dsum))), strict=True):
            assert torch.equal(got, expected)
    for is_backward in (False, True):
        assert len({config for config in built if config.variant.startswith("backward") == is_backward}) == 1
    assert set(stats()) == {"heuristic"}


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_in_place(shape, mode):
    """As a model serves: y into x, the sum into residual."""

    def blocks(x, residual, weight):
        for _ in range(3):
            x, residual = add_rmsnorm(x, residual, weight, out=x, residual_out=residual)
        return x, residual

    compiled = torch.compile(blocks, fullgraph=True, mode=mode)
    x, residual = random_x(shape, torch.bfloat16), random_x(shape, torch.bfloat16)
    weight = random_weight(shape[-1], torch.bfloat16).clone()
    with torch.no_grad():
        for seed in range(4):
            fresh = random_x(shape, torch.bfloat16, seed=seed), random_x(shape, torch.bfloat16, seed=seed + 50)
            x.copy_(fresh[0])
            residual.copy_(fresh[1])
            torch.compiler.cudagraph_mark_step_begin()
            compiled(x, residual, weight)
            for got, want in zip((x, residual), blocks(*fresh, weight), strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_dynamic(dtype):
    """Compiled once. x * 2 is exact, so what Inductor's own kernel hands to the norm is known."""
    counter = CompileCounterWithBackend("inductor")
    norm = RMSNorm(1024, eps=1e-5, dtype=dtype, device=DEVICE)
    compiled = torch.compile(lambda x: norm(x * 2), fullgraph=True, backend=counter)
    for rows in (64, 7, 1000, 4096):
        x = random_x((rows, 1024), dtype).requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        y = compiled(x)
        assert_rmsnorm(y, x * 2, norm.weight, eps=1e-5)
        y.sum().backward()
        assert x.grad is not None
    assert counter.frame_count == 1


def test_backward_of_an_expanded_gradient():
    """y.sum() gives a dy of one number expanded; Inductor may hand it over as it likes."""
    x, weight, _ = inputs((256, 2048))
    y = torch.compile(lambda x, weight: rmsnorm(x, weight).sum(), fullgraph=True)(x, weight)
    y.backward()
    assert_gradients(x.grad, weight.grad, torch.ones_like(x), x, weight)


SPLIT = """
    from dataclasses import replace
    import torch
    from kernels import dispatch, rmsnorm
    from kernels.variants import candidates

    ladder, ran = dispatch.pick_config, []

    def split(problem, device, **kwargs):
        config = next(config for config in candidates(problem, device) if config.variant.endswith("split_row"))
        ran.append(config.variant)
        return replace(ladder(problem, device, **kwargs), config=config)

    dispatch.pick_config = split
    rows, cols = 16, 131_072
    weight = torch.ones(cols, device="cuda", dtype=torch.bfloat16, requires_grad={grad})
    compiled = torch.compile(lambda x, weight: rmsnorm(x, weight), fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16, requires_grad={grad})
        dy = torch.randn_like(x)
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x, weight)
        found = y, *(torch.autograd.grad(y, (x, weight), dy) if {grad} else ())
        wide, g = x.detach().double(), dy.double()
        rstd = (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        x_hat = wide * rstd
        want = x_hat, rstd * (g - x_hat * (g * x_hat).mean(-1, keepdim=True)), (g * x_hat).sum(0)
        for got, exact in zip(found, want):
            assert (got.double() - exact).abs().max() <= 2.0**-8 * exact.abs().max(), (seed, got, exact)
    print(*sorted(set(ran)))
"""


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_workspaces_survive_cuda_graphs(grad):
    """In a new process, so that the warm-up of Inductor's CUDA graph, in its own memory pool, is what first needs a workspace.

    Inductor raises where memory of its pool outlives the run. bf16's one rounding is 2^-9 of an element; twice that is allowed.
    """
    assert run_python(SPLIT.format(grad=grad), timeout_s=300).split() == (["backward_split_row", "split_row"] if grad else ["split_row"])
