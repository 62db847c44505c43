"""Who is fastest, decided on paired samples: successive elimination. Pure: it is handed a function that takes a round of samples."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from tuning_db.derive import TIE

Name = TypeVar("Name")
Samples: TypeAlias = dict[Name, list[float]]

MIN_ROUNDS = 3
MAX_ROUNDS = 9
HOPELESS = 1.25
"""Slower than this in the first round: out at once, before any statistics."""


def median_interval(values: Sequence[float], confidence: float = 0.9) -> tuple[float, float, float]:
    """Median, and the narrowest symmetric pair of order statistics that holds the true median with at least `confidence`.

    The count of values below the true median is binomial(n, 1/2); with fewer than five values the pair is (min, max).
    """
    ordered = sorted(values)
    n = len(ordered)
    low = 0
    tail = 0.0
    for k in range((n - 1) // 2):
        tail += math.comb(n, k) / 2**n
        if 1 - 2 * tail < confidence:
            break
        low = k
    return statistics.median(ordered), ordered[low], ordered[n - 1 - low]


def race(
    names: Sequence[Name],
    sample_round: Callable[[Sequence[Name]], dict[Name, float]],
    *,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    seed: int = 0,
) -> Samples[Name]:
    """Sample all `names` round by round, shuffled; drop who is surely slower than the leader by more than the tie band.

    `sample_round(order)` returns one time for each name of `order`, taken close together. Who is dropped keeps the samples it has.
    """
    shuffle = random.Random(seed).shuffle
    samples: Samples[Name] = {name: [] for name in names}
    alive = list(names)
    for done in range(1, max_rounds + 1):
        order = list(alive)
        shuffle(order)
        for name, value in sample_round(order).items():
            samples[name].append(value)
        if done == 1:
            best = min(samples[name][0] for name in alive)
            alive = [name for name in alive if samples[name][0] <= HOPELESS * best]
        elif done >= min_rounds:
            alive = surviving(samples, alive)
        if len(alive) == 1 and done >= min_rounds:
            break
    return samples


def surviving(samples: Samples[Name], alive: Sequence[Name]) -> list[Name]:
    """Those whose times, round by round relative to the leader's, are not surely above the tie band."""
    leader = min(alive, key=lambda name: statistics.median(samples[name]))
    kept = []
    for name in alive:
        ratios = [own / best for own, best in zip(samples[name], samples[leader], strict=True)]
        _, low, _ = median_interval(ratios)
        if low <= TIE:
            kept.append(name)
    return kept
