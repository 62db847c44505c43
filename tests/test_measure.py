"""The clock's parts that need no GPU: how launches go around the sets, and what is made of samples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
