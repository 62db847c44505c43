"""`add_rmsnorm` on a GPU: every config at real sizes, forward and backward, graphs, streams, beyond 2³¹ elements, what a call costs."""

import math

import pytest
import torch

from gradient_oracle import assert_gradients
from kernels import add_rmsnorm, override, rmsnorm
from kernels.api import forget_plans
from kernels.device import describe
from kernels.variants import candidates, split_row
from oracle import assert_rmsnorm, assert_sum, random_weight, random_x
from tuner.cases import Case
from tuner.verify import Verifier
from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, Config, Problem

pytestmark = pytest.mark.gpu
BF16, FP32, STREAM = ("bfloat16",) * 3, ("float32",) * 3, ("float32", "bfloat16", "bfloat16")
"""x, weight and y; a residual stream of fp32 is the last."""

COLS = (1, 2, 16, 64, 128, 200, 512, 1000, 2048, 4096, 4097, 8192, 9232, 16_384, 32_768, 40_000, 65_536, 131_072, 262_144)
PROBLEMS = [
    *(
        Problem(op, *dtypes, max(2, 2**22 // cols), cols)
        for op in (ADD_FORWARD, ADD_BACKWARD)
        for dtypes in (BF16, STREAM)
        for cols in COLS
    ),
    *(
        Problem(op, *FP32, max(2, 2**21 // cols), cols)
        for op in (ADD_FORWARD, ADD_BACKWARD)
        for cols in (32, 256, 1024, 4096, 8192, 65_536)
    ),
    *(Problem(op, "float16", "none", "float16", 3, cols) for op in (ADD_FORWARD, ADD_BACKWARD) for cols in (100, 4096, 9217, 40_000)),
    Problem(ADD_BACKWARD, *BF16, 1_179_648, 256),
    Problem(ADD_FORWARD, *BF16, 32_768, 64, "two_stride"),
]


def cuda() -> torch.device:
    return torch.device("cuda", 0)


def inputs(shape, x_dtype=torch.bfloat16, residual_dtype=None, seed=0):
    """x, residual and weight."""
    x, residual = random_x(shape, x_dtype, seed=seed), random_x(shape, residual_dtype or x_dtype, seed=seed + 1)
    weight = random_weight(shape[-1], x_dtype)
    assert weight is not None
    return x, residual, weight


def assert_added(results, x, residual, weight):
    y, total = results
    assert_sum(total, x, residual)
    assert_rmsnorm(y, total, weight)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_config_at_real_sizes(problem):
    """Before anything is timed: all results within tolerance of float64, all of them and nothing else written."""
    case = Case(problem, cuda())
    verifier = Verifier(case)
    configs = candidates(problem, describe(0))
    assert configs
    faults = {str(config): verifier.fault(case.launcher(config)) for config in configs}
    assert not {config: fault for config, fault in faults.items() if fault}


@pytest.mark.parametrize("op", [ADD_FORWARD, ADD_BACKWARD])
def test_no_config_is_left_out(op):
    """The problems above are legal for every config that is legal for anything on this GPU."""
    tested = {config for problem in PROBLEMS if problem.op == op for config in candidates(problem, describe(0))}
    possible = {
        config
        for dtype in ("bfloat16", "float32")
        for power in range(20)
        for config in candidates(Problem(op, dtype, dtype, dtype, 8192, 2**power), describe(0))
    }
    assert possible <= tested


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 4096), (1024, 128), (4, 65_536)], ids=str)
def test_the_sum_has_the_bits_of_pytorchs_addition(shape, dtype):
    x, residual, weight = inputs(shape, dtype)
    y, total = add_rmsnorm(x, residual, weight)
    assert torch.equal(total, x + residual)
    assert_rmsnorm(y, total, weight)


@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 4096), (1, 8192), (1024, 128), (4, 65_536), (2, 1_000_000)], ids=str)
def test_in_place(shape, residual_dtype):
    for seed in (0, 1):
        x, residual, weight = inputs(shape, torch.bfloat16, residual_dtype, seed)
        was = x.clone(), residual.clone()
        add_rmsnorm(x, residual, weight, out=x, residual_out=residual)
        assert_added((x, residual), *was, weight)


def test_more_than_2_to_31_elements():
    """In place, so that 16 GiB do."""
    if torch.cuda.mem_get_info()[0] < 18 * 2**30:
        pytest.skip("needs 18 GiB of free GPU memory")
    cols = 4096
    rows = 2**31 // cols + 8
    x, residual = (torch.zeros((rows, cols), dtype=torch.bfloat16, device=cuda()) for _ in range(2))
    looked_at = torch.tensor([0, 1, 2**31 // cols - 1, 2**31 // cols, rows - 2, rows - 1], device=cuda())
    part_x, part_residual, weight = inputs((6, cols))
    x.index_copy_(0, looked_at, part_x)
    residual.index_copy_(0, looked_at, part_residual)
    add_rmsnorm(x, residual, weight, out=x, residual_out=residual)
    assert_added((x.index_select(0, looked_at), residual.index_select(0, looked_at)), part_x, part_residual, weight)
    assert not residual[2:1000].any()


@pytest.mark.parametrize("shape", [(64, 4096), (4, 65_536)], ids=str)
@pytest.mark.parametrize("warm", [False, True])
def test_a_graph(shape, warm):
    """Also of the very first call; each replay computes anew, in place and not."""
    x, residual, weight = inputs(shape)
    if warm:
        add_rmsnorm(x, residual, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = add_rmsnorm(x, residual, weight)
    for seed in (5, 6):
        for own, other in zip((x, residual), inputs(shape, seed=seed)[:2], strict=True):
            own.copy_(other)
        graph.replay()
        assert_added(results, x, residual, weight)


def a_split(problem: Problem) -> list[Config]:
    return [config for config in candidates(problem, describe(0)) if config.variant == "split_row"]


def test_a_norm_and_a_sum_share_a_workspace():
    """Launches of rmsnorm and add_rmsnorm split a row into as many parts, on one stream, one after another."""
    x, residual, weight = inputs((64, 65_536))
    (config, *_) = a_split(Problem(ADD_FORWARD, *BF16, 64, 65_536))
    with override(config):
        for _ in range(20):
            y, results = rmsnorm(x, weight), add_rmsnorm(x, residual, weight)
    assert_rmsnorm(y, x, weight)
    assert_added(results, x, residual, weight)


@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_whoever_does_not_wait_gets_the_same_bits(pair, monkeypatch):
    """With no polls allowed most programs form a row's sums by themselves."""
    x, residual, weight = inputs((40, 40_000), *pair)
    dtypes = STREAM if pair[1] == torch.float32 else BF16
    for config in a_split(Problem(ADD_FORWARD, *dtypes, 48, 40_000)):
        results = []
        for polls in (split_row.MAX_POLLS, 0):
            monkeypatch.setattr(split_row, "MAX_POLLS", polls)
            forget_plans()
            with override(config):
                results.append(add_rmsnorm(x, residual, weight))
            assert_added(results[-1], x, residual, weight)
        monkeypatch.undo()
        assert torch.equal(results[0][0], results[1][0]), str(config)
        assert torch.equal(results[0][1], results[1][1]), str(config)


def test_split_rows_on_two_streams_at_once():
    streams = [torch.cuda.Stream() for _ in range(2)]
    calls = [inputs((64, 65_536), seed=seed) for seed in (0, 10)]
    results = [None, None]
    torch.cuda.synchronize()
    for _ in range(20):
        for at, (stream, tensors) in enumerate(zip(streams, calls, strict=True)):
            with torch.cuda.stream(stream):
                results[at] = add_rmsnorm(*tensors)
    torch.cuda.synchronize()
    for own, tensors in zip(results, calls, strict=True):
        assert_added(own, *tensors)


def allocations() -> int:
    return torch.cuda.memory_stats()["allocation.all.allocated"]


@pytest.mark.parametrize("shape", [(64, 4096), (4, 65_536), (4096, 64)], ids=str)
def test_a_second_call_waits_for_nothing_and_allocates_its_results(shape):
    x, residual, weight = inputs(shape)
    own_x, own_residual = x.clone(), residual.clone()
    for _ in range(2):
        results = add_rmsnorm(x, residual, weight)
        add_rmsnorm(own_x, own_residual, weight, out=own_x, residual_out=own_residual)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        before = allocations()
        results = add_rmsnorm(x, residual, weight)
        assert allocations() - before == 2
        before = allocations()
        add_rmsnorm(own_x, own_residual, weight, out=own_x, residual_out=own_residual)
        assert allocations() == before
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_added(results, x, residual, weight)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_misaligned_pointers(which):
    """One of three pointers one element off 16 bytes, right after an aligned call of the same shape, and back."""
    given = list(inputs((40, 4096)))
    moved = given[which]
    off = torch.empty(moved.numel() + 1, dtype=moved.dtype, device=cuda())[1:].view(moved.shape).copy_(moved)
    for tensors in (given, [off if at == which else tensor for at, tensor in enumerate(given)], given):
        assert_added(add_rmsnorm(*tensors), *tensors)


def test_launch_hooks_are_served():
    """Of a profiler that comes after the first call and goes before the last."""
    from triton import knobs

    x, residual, weight = inputs((64, 4096))
    add_rmsnorm(x, residual, weight)
    names = []

    def hook(metadata):
        names.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        add_rmsnorm(x, residual, weight)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    add_rmsnorm(x, residual, weight)
    assert len(names) == 1


@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(512, 4096), (8192, 128), (64, 65_536)], ids=str)
def test_gradients(shape, residual_dtype):
    """The same bits in every run."""
    x, residual, weight = (tensor.clone().requires_grad_() for tensor in inputs(shape, torch.bfloat16, residual_dtype))
    dy = torch.randn(shape, device=cuda(), dtype=torch.bfloat16)
    dsum = torch.randn(shape, device=cuda(), dtype=residual_dtype)
    first = None
    for _ in range(5):
        y, total = add_rmsnorm(x, residual, weight)
        found = torch.autograd.grad((y, total), (residual, weight, x), (dy, dsum))
        assert_gradients(found[0], found[1], dy, total.detach(), weight, dsum=dsum, daddend=found[2])
        if first is not None:
            assert all(torch.equal(own, other) for own, other in zip(found, first, strict=True))
        first = found


def test_gradients_under_a_graph():
    x, residual, weight = (tensor.clone().requires_grad_() for tensor in inputs((512, 4096)))
    dy, dsum = (torch.randn((512, 4096), device=cuda(), dtype=torch.bfloat16) for _ in range(2))

    def step():
        y, total = add_rmsnorm(x, residual, weight)
        return total, torch.autograd.grad((y, total), (residual, weight), (dy, dsum))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total, (dx, dw) = step()
    for result in (dx, dw):
        result.fill_(math.nan)
    graph.replay()
    assert_gradients(dx, dw, dy, total.detach(), weight, dsum=dsum)
