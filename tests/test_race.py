"""Successive elimination under a fake clock, and the interval of a median."""

import itertools
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.race import HOPELESS, MAX_ROUNDS, MIN_ROUNDS, TIE, median_interval, race, surviving


class Clock:
    """True times in µs with noise of its own for each sample, and drift that a whole round shares."""

    def __init__(self, times: dict[str, float], noise: float, seed: int) -> None:
        self.times, self.noise, self.random = times, noise, random.Random(seed)
        self.orders: list[list[str]] = []

    def __call__(self, order: list[str]) -> dict[str, float]:
        self.orders.append(list(order))
        drift = self.random.uniform(1.0, 1.5)
        return {name: self.times[name] * drift * self.random.uniform(1 - self.noise, 1 + self.noise) for name in order}


@pytest.mark.parametrize("seed", range(20))
def test_three_percent_slower_is_eliminated_although_rounds_drift_by_half(seed: int) -> None:
    samples = race(["best", "slower"], Clock({"best": 10.0, "slower": 10.3}, 0.003, seed), seed=seed)
    assert len(samples["slower"]) < MAX_ROUNDS
    assert len(samples["best"]) == len(samples["slower"])  # paired; alone, the leader stops


@pytest.mark.parametrize("seed", range(20))
def test_a_tie_survives_to_the_end(seed: int) -> None:
    samples = race(["best", "tied"], Clock({"best": 10.0, "tied": 10.02}, 0.003, seed), seed=seed)
    assert [len(samples[name]) for name in samples] == [MAX_ROUNDS, MAX_ROUNDS]


def test_the_hopeless_run_once() -> None:
    clock = Clock({"best": 10.0, "tied": 10.0, "hopeless": 10.0 * HOPELESS * 1.01}, 0.0, 0)
    samples = race(list(clock.times), clock)
    assert len(samples["hopeless"]) == 1
    assert all("hopeless" not in order for order in clock.orders[1:])


def test_a_lone_entrant_gets_the_fewest_rounds() -> None:
    assert len(race(["only"], Clock({"only": 1.0}, 0.0, 0))["only"]) == MIN_ROUNDS


def test_the_order_is_shuffled() -> None:
    clock = Clock(dict.fromkeys("abcdefgh", 1.0), 0.001, 0)
    race(list(clock.times), clock)
    assert len({tuple(order) for order in clock.orders}) == MAX_ROUNDS


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(1.0, 100.0), min_size=1), st.integers(0, 10**6))
def test_the_fastest_is_never_dropped_without_noise(times: dict[str, float], seed: int) -> None:
    samples = race(list(times), Clock(times, 0.0, seed), seed=seed)
    fastest = min(times.values())
    longest = max(len(values) for values in samples.values())
    for name, time in times.items():
        assert 1 <= len(samples[name]) <= MAX_ROUNDS
        if time <= fastest * TIE * 0.999999:
            assert len(samples[name]) == longest


@given(st.lists(st.lists(st.floats(0.5, 2.0), min_size=5, max_size=5), min_size=1, max_size=6))
def test_the_leader_survives(rows: list[list[float]]) -> None:
    samples = dict(enumerate(rows))
    leader = min(samples, key=lambda name: statistics.median(samples[name]))
    assert leader in surviving(samples, list(samples))


@pytest.mark.parametrize("n", range(1, 15))
def test_the_interval_is_the_narrowest_that_covers_by_brute_force(n: int) -> None:
    below = [sum(signs) for signs in itertools.product((0, 1), repeat=n)]  # which of n samples lie below the true median

    def coverage(low: int) -> float:
        return sum(low + 1 <= count <= n - 1 - low for count in below) / 2**n

    expected = max((low for low in range((n + 1) // 2) if coverage(low) >= 0.9), default=0)
    _, low, high = median_interval([float(i) for i in range(n)])
    assert (low, high) == (expected, n - 1 - expected)


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_interval_properties(values: list[float], shuffler: random.Random) -> None:
    median, low, high = median_interval(values)
    assert min(values) <= low <= median <= high <= max(values)
    assert {low, high} <= set(values)
    shuffled = list(values)
    shuffler.shuffle(shuffled)
    assert median_interval(shuffled) == (median, low, high)
