"""The clock's parts that need no GPU: how launches go around the sets, and what is made of samples."""

import contextlib
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuner import measure
from tuner.cases import Tensors
from tuner.measure import COLD_L2S, GRAPH_US, MAX_LAUNCHES, Bench, Rotation, measurement
from tuning_db.model import Device

H100 = Device("sm_90", 132, 50 * 2**20, 227 * 2**10, 3352, name="H100")
DEVICES = [H100, Device("sm_90", 132, 60 * 2**20, 227 * 2**10, 4814), Device("gfx942", 304, 4 * 2**20, 64 * 2**10, 5300, 64)]
SIZES = st.integers(min_value=64, max_value=2**33)


@given(SIZES, st.sampled_from(DEVICES), st.lists(st.integers(1, 2 * MAX_LAUNCHES), min_size=2, max_size=5))
def test_a_set_has_left_l2_before_it_is_touched_again(set_bytes: int, device: Device, entrants: list[int]) -> None:
    """Whatever entrants follow each other, each with a graph of its own length."""
    rotation = Rotation.of(set_bytes, device)
    cold_bytes = COLD_L2S * device.l2_bytes
    read_bytes, last = 0, {}
    for wanted in entrants:
        if rotation.refills_l2:
            read_bytes += cold_bytes
        for launch in range(rotation.rounded(wanted)):
            at = launch % rotation.sets
            if at in last:
                assert read_bytes - last[at] >= cold_bytes
            read_bytes += set_bytes
            last[at] = read_bytes - set_bytes


@given(SIZES, st.sampled_from(DEVICES))
def test_a_graph_is_about_as_long_as_the_policy_says(set_bytes: int, device: Device) -> None:
    rotation = Rotation.of(set_bytes, device)
    floor_us = max(1.5, set_bytes / (device.bandwidth_gbs * 1e3) * 1.1)
    assert rotation.launches <= MAX_LAUNCHES
    assert rotation.launches * floor_us <= max(GRAPH_US + floor_us, 4 * floor_us)
    assert rotation.launches * floor_us >= min(GRAPH_US / 2, MAX_LAUNCHES / 2 * floor_us)  # less than one turn is cut off
    assert rotation.rounded(rotation.launches) == rotation.launches


def test_small_tensors_get_a_set_for_each_launch() -> None:
    assert Rotation.of(16384, H100) == Rotation(sets=400, launches=400, refills_l2=True)
    assert Rotation.of(2**20, H100) == Rotation(sets=150, launches=300, refills_l2=False)
    assert Rotation.of(2**30, H100) == Rotation(sets=2, launches=4, refills_l2=False)


class FakeGpu:
    """Graphs, events and a clock that only replays move: a launch takes the µs that its name says. Notes what was launched on which set."""

    def __init__(self) -> None:
        self.now_us = 0.0
        self.captured: FakeGraph | None = None
        self.eager: list[str] = []
        self.refills_at: list[float] = []

    def launch(self, name: str, us: float, at: int) -> object:
        if self.captured is None:
            self.eager.append(name)
        else:
            self.captured.launches.append((at, us))
        return object()

    @contextlib.contextmanager
    def graph(self, graph: "FakeGraph", stream: object = None) -> Iterator[None]:
        self.captured = graph
        yield
        self.captured = None

    def make_graph(self) -> "FakeGraph":
        return FakeGraph(self)

    def make_event(self, enable_timing: bool) -> "FakeEvent":
        assert enable_timing
        return FakeEvent(self)


class FakeGraph:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.launches = gpu, []

    def replay(self) -> None:
        self.gpu.now_us += sum(us for _, us in self.launches)


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.at_us = gpu, math.nan

    def record(self) -> None:
        self.at_us = self.gpu.now_us

    def elapsed_time(self, end: "FakeEvent") -> float:
        return (end.at_us - self.at_us) / 1e3


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    cuda = measure.torch.cuda
    monkeypatch.setattr(cuda, "CUDAGraph", fake.make_graph)
    monkeypatch.setattr(cuda, "graph", fake.graph)
    monkeypatch.setattr(cuda, "Event", fake.make_event)
    monkeypatch.setattr(cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measure, "reference_copy", lambda y, x: fake.launch("copy", 4.0, x))
    return fake


def bench_on(rotation: Rotation) -> Bench:
    sets = [Tensors(x=at, weight=None, y=at) for at in range(rotation.sets)]  # type: ignore[arg-type]
    case = SimpleNamespace(sets=lambda count, seed: sets[:count], device=torch.device("cpu"))
    return Bench(case, replace(H100, l2_bytes=64), seed=0, rotation=rotation)  # type: ignore[arg-type]


def test_a_bench_divides_by_the_launches_and_goes_around_the_sets(gpu: FakeGpu) -> None:
    bench = bench_on(Rotation(sets=3, launches=12, refills_l2=False))
    bench.enter("fast", lambda tensors: gpu.launch("fast", 5.0, tensors.x))
    bench.enter("slow", lambda tensors: gpu.launch("slow", 50.0, tensors.x), launches=4)
    assert gpu.eager == ["copy", "fast", "slow"]  # once, before the capture
    assert [at for at, _ in bench._graphs["fast"][0].launches] == [0, 1, 2] * 4
    assert [at for at, _ in bench._graphs["slow"][0].launches] == [0, 1, 2] * 2  # four launches become whole turns
    assert bench.round(["slow", "fast"]) == pytest.approx({"slow": 50.0, "fast": 5.0, "reference": 4.0})


def test_where_each_launch_has_its_set_l2_is_refilled_before_each_replay(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_on(Rotation(sets=5, launches=5, refills_l2=True))
    bench.enter("one", lambda tensors: gpu.launch("one", 5.0, tensors.x))
    assert bench._other_data is not None
    assert bench._other_data.numel() * 4 == COLD_L2S * 64
    reads: list[float] = []
    monkeypatch.setattr(bench, "_other_data", SimpleNamespace(sum=lambda: reads.append(gpu.now_us)))
    start = gpu.now_us
    assert bench.round(["one"])["one"] == pytest.approx(5.0)
    assert [at - start for at in reads] == [0.0, 20.0, 45.0]  # before copy, one, copy


def test_what_a_launch_returns_lives_until_its_set_comes_round_again(gpu: FakeGpu) -> None:
    alive: weakref.WeakSet[FakeEvent] = weakref.WeakSet()
    most = []

    def launch(_: object) -> FakeEvent:
        made = FakeEvent(gpu)  # any object of its own
        alive.add(made)
        most.append(len(alive))
        return made

    bench = bench_on(Rotation(sets=3, launches=9, refills_l2=False))
    bench.enter("allocating", launch)
    assert max(most) == 4  # the new one is made before the old one goes
    assert len(alive) == 3


class DriftingBench:
    """`Bench.rounds` over a clock on which every round is slower than the one before, for all alike."""

    rounds = Bench.rounds

    def __init__(self) -> None:
        self.orders: list[list[str]] = []

    def round(self, order: list[str]) -> dict[str, float]:
        self.orders.append(list(order))
        drift = 1 + len(self.orders) / 10
        return {"reference": 8.0 * drift, **{name: 10.0 * drift for name in order}}


def test_rounds_begin_with_each_name_in_turn_and_fractions_do_not_drift() -> None:
    bench = DriftingBench()
    samples, reference = bench.rounds(["a", "b", "c"], 6)
    assert [order[0] for order in bench.orders] == ["a", "b", "c"] * 2
    timed = measurement(samples["a"], reference)
    assert timed.copy_fraction == pytest.approx(0.8)
    assert timed.median_us == pytest.approx(13.5)
    assert timed.rounds == 6
