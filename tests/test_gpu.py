"""On a GPU: every config at real sizes, and what only a GPU has: graphs, streams, synchronisation, memory beyond 2³¹ elements."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from interpreters import run_python
from kernels import dispatch, rmsnorm, submission
from kernels.allocation import on_current_gpu
from kernels.device import describe
from kernels.geometry import geometry_of
from kernels.launch import build_launcher
from kernels.variants import candidates, split_row
from oracle import DTYPES, FORWARD_VARIANTS, Fenced, assert_rmsnorm, dtype_names, expected_rmsnorm, packed_strides, random_weight, random_x
from tuner.cases import Case
from tuner.verify import Verifier
from tuning_db.model import Config, Problem

pytestmark = pytest.mark.gpu

COLS = (64, 128, 200, 1000, 4096, 4097, 9232, 16_384, 65_536, 131_072)
PROBLEMS = [
    *(Problem("rmsnorm", *("bfloat16",) * 3, max(2, 2**23 // cols), cols) for cols in COLS),
    *(Problem("rmsnorm", "float32", "none", "float32", max(2, 2**22 // cols), cols) for cols in (2, 32, 128, 4096, 65_536)),
    *(Problem("rmsnorm", "float16", "float32", "float16", 4, cols) for cols in (4096, 9217, 40_000)),
    *(Problem("rmsnorm", *("bfloat16",) * 3, 8192, cols, "two_stride") for cols in (64, 128, 4000)),
    *(
        Problem("rmsnorm", *("bfloat16",) * 3, inner * 4, cols, "strided_axis", inner)
        for cols, inner in ((2, 4096), (16, 1024), (100, 96), (1024, 1024), (4096, 512), (2100, 3))
    ),
]


def cuda(index: int = 0) -> torch.device:
    return torch.device("cuda", index)


def prepared(config: Config, x: torch.Tensor, weight: torch.Tensor | None, y: torch.Tensor, axis: int = -1):
    """The launcher of a config for these tensors."""
    nest = geometry_of(x.shape, x.stride(), y.stride(), axis % x.dim())
    assert nest is not None
    return build_launcher(config, nest, dtype_names(x, weight, y), x.get_device())


def a_config(variant: str, x: torch.Tensor, weight: torch.Tensor | None, y: torch.Tensor, axis: int = -1) -> Config:
    """A legal config of a variant, of those in the middle of its space."""
    nest = geometry_of(x.shape, x.stride(), y.stride(), axis % x.dim())
    assert nest is not None
    legal = [c for c in candidates(nest.problem(*dtype_names(x, weight, y)), describe(x.get_device())) if c.variant == variant]
    return legal[len(legal) // 2]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_config_at_real_sizes(problem):
    """Before anything is timed: within tolerance of float64, all of y and nothing else written."""
    case = Case(problem, cuda())
    verifier = Verifier(case)
    configs = candidates(problem, describe(0))
    assert configs
    faults = {str(c): verifier.fault(build_launcher(c, case.geometry, case.dtypes, 0)) for c in configs}
    assert not {config: fault for config, fault in faults.items() if fault}


def test_no_config_is_left_out():
    """The problems above are legal for every config that is legal for anything on this GPU."""
    tested = {config for problem in PROBLEMS for config in candidates(problem, describe(0))}
    possible = {
        config
        for layout, inner in (("contiguous", 1), ("strided_axis", 4096))
        for dtype in ("bfloat16", "float32")
        for power in range(20)
        for config in candidates(Problem("rmsnorm", dtype, dtype, dtype, 8192, 2**power, layout, inner), describe(0))
    }
    assert possible <= tested


def test_the_fingerprint_is_what_torch_sees():
    properties, device = torch.cuda.get_device_properties(0), describe(0)
    assert device.name == properties.name
    assert (device.sm_count, device.l2_bytes) == (properties.multi_processor_count, properties.L2_cache_size)
    assert device.shared_bytes == properties.shared_memory_per_block_optin
    assert device.arch == f"sm_{properties.major}{properties.minor}" or torch.version.hip


def needs_memory(gigabytes: int) -> None:
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory, {free / 2**30:.1f} are")


@pytest.mark.parametrize("variant", ["whole_row", "multi_row", "looped", "strided_axis"])
def test_more_than_2_to_31_elements(variant):
    """Rows that lie before, across and beyond element 2³¹."""
    needs_memory(11)
    cols, rows = 4096, 2**19 + 8
    shape, axis = ((cols, rows), 0) if variant == "strided_axis" else ((rows, cols), 1)
    x, y = (torch.zeros(shape, dtype=torch.bfloat16, device=cuda()) for _ in range(2))
    looked_at = [0, 1, 2**19 - 1, 2**19, rows - 2, rows - 1]
    part = random_x((cols, 6) if axis == 0 else (6, cols), torch.bfloat16, axis=axis)
    x.index_copy_(1 - axis, torch.tensor(looked_at, device=cuda()), part)
    prepared(a_config(variant, x, None, y, axis), x, None, y, axis)(y, x, None, 1e-6)
    assert_rmsnorm(y.index_select(1 - axis, torch.tensor(looked_at, device=cuda())), part, axis=axis)
    assert not y.narrow(1 - axis, 2, 1000).any()  # rows of zeros, and nobody wrote there by a wrapped offset


@pytest.mark.parametrize("variant", ["whole_row", "looped", "split_row"])
def test_strides_beyond_2_to_31(variant):
    """Three rows, 2³⁰ elements apart in x."""
    needs_memory(5)
    cols, stride = 32_768, 2**30 + 16
    memory = torch.empty(2 * stride + cols, dtype=torch.bfloat16, device=cuda())
    x = memory.as_strided((3, cols), (stride, 1)).copy_(random_x((3, cols), torch.bfloat16))
    y = Fenced(x.shape, packed_strides(x.shape), x.dtype)
    prepared(a_config(variant, x, None, y.view), x, None, y.view)(y.view, x, None, 1e-6)
    y.assert_intact()
    assert_rmsnorm(y.view, x)


@pytest.mark.parametrize("cols", [4096, 65_536])
def test_first_call_of_a_process_inside_a_capture(cols):
    """No eager call before: compiled, loaded and given its workspace under capture; replays follow x."""
    source = f"""
    import sys, torch
    sys.path.insert(0, "tests")
    from kernels import rmsnorm, stats
    from oracle import assert_rmsnorm, random_weight, random_x
    x, weight = random_x((4, {cols}), torch.bfloat16), random_weight({cols}, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rmsnorm(x, weight)
    assert "torch" not in stats() and "torch_requested" not in stats(), stats()
    for seed in range(3):
        x.copy_(random_x(x.shape, x.dtype, seed=seed + 10))
        y.fill_(float("nan"))
        graph.replay()
        assert_rmsnorm(y, x, weight)
    """
    run_python(source, timeout_s=300)


@pytest.mark.parametrize("shape", [(4, 4096), (4096, 128), (3, 65_536), (1, 131_072), (2, 1000)], ids=str)
def test_graph_replay(shape):
    x, weight = random_x(shape, torch.bfloat16), random_weight(shape[1], torch.bfloat16)
    rmsnorm(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rmsnorm(x, weight)
        z = rmsnorm(y, weight)  # one call after another in one graph share a workspace
    for seed in range(3):
        x.copy_(random_x(shape, x.dtype, seed=seed + 10))
        y.fill_(float("nan"))
        z.fill_(float("nan"))
        graph.replay()
        assert_rmsnorm(y, x, weight)
        assert_rmsnorm(z, y, weight)


def split_calls(count: int, rows: int, cols: int) -> list[tuple[torch.Tensor, torch.Tensor, Callable[[], None]]]:
    """(x, y, a launch of split_row from x to y) with all configs alike, so that a shared workspace would be shared by slot."""
    calls = []
    for seed in range(count):
        x = random_x((rows, cols), torch.float32, seed=seed)
        y = torch.empty_like(x)
        launch = prepared(a_config("split_row", x, None, y), x, None, y)
        calls.append((x, y, lambda launch=launch, x=x, y=y: launch(y, x, None, 1e-6)))
    return calls


def test_split_rows_in_two_graphs_replayed_at_once():
    """On two streams, many times: each graph has counters of its own."""
    calls = split_calls(2, 8, 131_072)
    graphs, streams = [torch.cuda.CUDAGraph() for _ in calls], [torch.cuda.Stream() for _ in calls]
    for _, _, run in calls:
        run()
    torch.cuda.synchronize()
    for graph, (_, _, run) in zip(graphs, calls, strict=True):
        with torch.cuda.graph(graph):
            for _ in range(5):
                run()
    for _ in range(20):
        for _, y, _ in calls:
            y.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                for _ in range(10):
                    graph.replay()
        torch.cuda.synchronize()
        for x, y, _ in calls:
            assert_rmsnorm(y, x)


def test_split_rows_on_two_streams_at_once():
    calls = split_calls(2, 8, 131_072)
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(20):
        for _, y, _ in calls:
            y.fill_(float("nan"))
        torch.cuda.synchronize()
        for _ in range(20):
            for stream, (_, _, run) in zip(streams, calls, strict=True):
                with torch.cuda.stream(stream):
                    run()
        torch.cuda.synchronize()
        for x, y, _ in calls:
            assert_rmsnorm(y, x)


def test_eager_and_replay_at_once():
    """A replay on one stream beside eager calls on the stream that captured it."""
    (x, y, run), (other_x, other_y, other_run) = split_calls(2, 8, 131_072)
    run(), other_run()
    torch.cuda.synchronize()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        run()
    for _ in range(20):
        y.fill_(float("nan"))
        other_y.fill_(float("nan"))
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for _ in range(20):
                graph.replay()
        for _ in range(20):
            other_run()
        torch.cuda.synchronize()
        assert_rmsnorm(y, x)
        assert_rmsnorm(other_y, other_x)


@pytest.mark.parametrize("cols", [9217, 40_000, 65_536])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whoever_does_not_wait_gets_the_same_bits(dtype, cols, monkeypatch):
    """With no polls allowed all programs of a row but the last to arrive form the sum by themselves."""
    x, weight = random_x((5, cols), dtype), random_weight(cols, dtype)
    waiting, alone = (Fenced(x.shape, packed_strides(x.shape), dtype) for _ in range(2))
    nest = geometry_of(x.shape, x.stride(), waiting.view.stride(), 1)
    assert nest is not None
    legal = candidates(nest.problem(*dtype_names(x, weight, waiting.view)), describe(0))
    for config in [config for config in legal if config.variant == "split_row"][::4]:
        monkeypatch.undo()
        waiting.memory.fill_(float("nan"))
        alone.memory.fill_(float("nan"))
        prepared(config, x, weight, waiting.view)(waiting.view, x, weight, 1e-6)
        monkeypatch.setattr(split_row, "MAX_POLLS", 0)
        prepared(config, x, weight, alone.view)(alone.view, x, weight, 1e-6)
        waiting.assert_intact(config)
        alone.assert_intact(config)
        assert_rmsnorm(waiting.view, x, weight, note=config)
        assert torch.equal(alone.view, waiting.view), str(config)


@pytest.mark.parametrize("variant", FORWARD_VARIANTS)
def test_the_same_bits_from_run_to_run(variant):
    axis = 0 if variant == "strided_axis" else 1
    cols = {"split_row": 131_072, "cluster_row": 16_384}.get(variant, 2048)
    shape = (64, cols) if axis else (cols, 64)
    x = random_x(shape, torch.float32, axis=axis)
    first, again = torch.empty_like(x), torch.empty_like(x)
    launch = prepared(a_config(variant, x, None, first, axis), x, None, first, axis)
    launch(first, x, None, 1e-6)
    assert_rmsnorm(first, x, axis=axis)
    for _ in range(20):
        launch(again, x, None, 1e-6)
        assert torch.equal(again, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [128, 4096, 65_536])
def test_as_exact_as_pytorch(cols, dtype):
    """Root mean square error against float64, at most 1.05 times that of F.rms_norm."""
    x = torch.randn((2**22 // cols, cols), generator=torch.Generator().manual_seed(0)).to(dtype).to(cuda())
    weight = random_weight(cols, dtype)
    want = expected_rmsnorm(x, weight)

    def error(y: torch.Tensor) -> float:
        return float((y.double() - want).square().mean().sqrt())

    assert error(rmsnorm(x, weight)) <= 1.05 * error(F.rms_norm(x, (cols,), weight, 1e-6))


@pytest.mark.parametrize("which", ["x", "y", "weight"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [256, 4096, 65_536])
def test_misaligned_pointers(which, dtype, cols):
    """One of three pointers one element off 16 bytes, right after aligned calls of the same shape, and back."""
    x, weight = random_x((4, cols), dtype), random_weight(cols, dtype)
    assert_rmsnorm(rmsnorm(x, weight), x, weight)
    moved_x = torch.empty(x.numel() + 1, dtype=dtype, device=cuda())[1:].view(x.shape).copy_(x) if which == "x" else x
    moved_weight = torch.empty(cols + 1, dtype=dtype, device=cuda())[1:].copy_(weight) if which == "weight" else weight
    y = Fenced(x.shape, packed_strides(x.shape), dtype, shift=int(which == "y"))
    assert (moved_x.data_ptr() | moved_weight.data_ptr() | y.view.data_ptr()) % 16
    rmsnorm(moved_x, moved_weight, out=y.view)
    y.assert_intact()
    assert_rmsnorm(y.view, moved_x, moved_weight)
    assert_rmsnorm(rmsnorm(x, weight), x, weight)


@pytest.mark.parametrize("cols", [4096, 65_536])
def test_the_current_streams_order_is_kept(cols):
    """x is written late on a side stream, and y read there next: no other synchronisation is needed."""
    x, late = (random_x((4, cols), torch.float32, seed=seed) for seed in (1, 2))
    rmsnorm(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # some 30 ms, far longer than the launches below take
        x.copy_(late)
        y = rmsnorm(x)
        copy = y.clone()
    assert not side.query()  # still asleep: nothing above waited
    side.synchronize()
    assert_rmsnorm(copy, late)


@pytest.mark.parametrize("arguments", [{}, {"axis": 0}, {"batch_invariant": True}], ids=str)
@pytest.mark.parametrize("shape", [(64, 4096), (4, 65_536), (4096, 64)], ids=str)
def test_a_second_call_allocates_its_output_and_waits_for_nothing(shape, arguments):
    x, weight = random_x(shape, torch.bfloat16), random_weight(shape[arguments.get("axis", -1)], torch.bfloat16)
    rmsnorm(x, weight, **arguments)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = rmsnorm(x, weight, **arguments)
        after = torch.cuda.memory_stats()["allocation.all.allocated"]
        rmsnorm(x, weight, out=y, **arguments)
        last = torch.cuda.memory_stats()["allocation.all.allocated"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (after - before, last - after) == (1, 0)
    assert_rmsnorm(y, x, weight, axis=arguments.get("axis", -1))


@pytest.mark.parametrize("cols", [4096, 65_536])
def test_a_gpu_that_is_not_current(cols):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for index in (1, 0):
        for current in (0, 1):
            with torch.cuda.device(current):
                x, weight = random_x((4, cols), torch.float32).to(cuda(index)), random_weight(cols, torch.float32).to(cuda(index))
                y = rmsnorm(x, weight)
                assert y.device == cuda(index)
                assert torch.cuda.current_device() == current
                assert_rmsnorm(y, x, weight)


@pytest.mark.parametrize("variant", FORWARD_VARIANTS)
def test_both_ways_to_submit_give_the_same_bits(variant, monkeypatch):
    """Inductor's, where this PyTorch has it and the variant allows it, and Triton's."""
    axis = 1 if variant == "strided_axis" else -1
    shape = {"strided_axis": (2, 100, 96), "multi_row": (1000, 100), "cluster_row": (60, 40_000)}.get(variant, (300, 9216))
    x, weight = random_x(shape, torch.bfloat16), random_weight(shape[axis], torch.float32)
    config, geometry = a_config(variant, x, weight, x, axis), geometry_of(x.shape, x.stride(), x.stride(), axis % x.dim())
    allocate, results, packed = on_current_gpu(x.shape, x.stride(), x.dtype), [], []
    for find in (submission._launch_kernel, lambda: None):
        monkeypatch.setattr(submission, "_launch_kernel", find)
        launch = build_launcher(config, geometry, dtype_names(x, weight, x), x.get_device(), allocate)
        packed.append("_packed_launcher" in launch.__qualname__)
        results += [launch(None, x, weight, 1e-6), launch(torch.full_like(x, torch.nan), x, weight, 1e-6)]
    has_it = allocate is not None and hasattr(torch._C, "_StaticCudaLauncher")
    assert packed == [has_it and variant not in ("split_row", "cluster_row"), False]
    for y in results:
        assert torch.equal(y, results[0])
    assert_rmsnorm(results[0], x, weight, axis=axis)


@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("cols", [4096, 65_536])
def test_launch_hooks_are_served(cols, with_weight):
    """Of a profiler that comes after the first call and goes before the last."""
    from triton import knobs

    x, weight = random_x((4, cols), torch.float32), random_weight(cols, torch.float32) if with_weight else None
    rmsnorm(x, weight)
    names = []

    def hook(metadata):
        names.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert_rmsnorm(rmsnorm(x, weight), x, weight)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(names) == 1
    assert_rmsnorm(rmsnorm(x, weight), x, weight)
    assert len(names) == 1


def test_under_torchs_profiler():
    x = random_x((64, 4096), torch.bfloat16)
    rmsnorm(x)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        y = rmsnorm(x)
        torch.cuda.synchronize()
    assert_rmsnorm(y, x)
    assert any("_kernel" in event.key for event in profile.key_averages())


def test_a_compiled_model():
    """Inductor: the same values, forward and backward."""
    weight = torch.nn.Parameter(random_weight(1024, torch.float32).clone())

    def model(x):
        return rmsnorm(x * 2, weight).square().sum()

    x = random_x((8, 1024), torch.float32)
    compiled = torch.compile(model, fullgraph=True)
    got = compiled(x)
    got.backward()
    wide = weight.detach().double().requires_grad_()
    rows = x.double() * 2
    want = (rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt() * wide).square().sum()
    want.backward()
    # Sums of some 10⁴ fp32 terms, all positive: 256 roundings bound them.
    assert abs(got.double() - want) <= 256 * 2.0**-24 * want
    assert ((weight.grad.double() - wide.grad).abs() <= 256 * 2.0**-24 * wide.grad.abs()).all()


def test_a_config_that_asks_too_much_falls_back(monkeypatch):
    """A record modelled for a larger board: OutOfResources on loading is answered by PyTorch and one log line."""
    from triton.runtime.errors import OutOfResources

    def refuse(*_):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(dispatch, "build_launcher", refuse)
    x = random_x((4, 4096), torch.float32)
    assert_rmsnorm(rmsnorm(x), x)
