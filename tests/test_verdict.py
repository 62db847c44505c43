"""When the present code counts as slower: intervals, limits, the second process, exit codes."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.exits import Exit
from benchmarks.results import Interval, Timing
from benchmarks.verdict import SLOWER, SLOWER_US, Change, Verdict, change_between, change_from_baseline, exit_code, verdict


def change(low: float, median: float, high: float, former_us: float = 100.0) -> Change:
    """By ratios, of a case that took former_us."""
    return Change(Interval(median, low, high), Interval(*((end - 1) * former_us for end in (median, low, high))))


SURELY, MAYBE, SAME, FASTER = change(1.03, 1.04, 1.05), change(1.01, 1.03, 1.05), change(0.99, 1.0, 1.01), change(0.9, 0.95, 0.97)


@pytest.mark.parametrize(
    ("first", "again", "expected"),
    [
        (SAME, None, Verdict.PASS),
        (FASTER, None, Verdict.IMPROVED),
        (change(0.9, 0.95, 0.99), None, Verdict.PASS),  # the interval reaches into the 2 %
        (SURELY, SURELY, Verdict.REGRESSION),
        (SURELY, SAME, Verdict.PASS),  # the fresh process does not confirm it
        (SURELY, FASTER, Verdict.PASS),
        (SURELY, MAYBE, Verdict.INCONCLUSIVE),
        (MAYBE, SURELY, Verdict.INCONCLUSIVE),
        (MAYBE, MAYBE, Verdict.INCONCLUSIVE),
        (SURELY, None, Verdict.INCONCLUSIVE),
    ],
)
def test_verdicts(first: Change, again: Change | None, expected: Verdict) -> None:
    assert verdict(first, again) is expected


def test_a_few_percent_of_a_short_launch_are_none() -> None:
    """5 % of 2 µs are 0.1 µs, below the 0.15 µs that count; 10 % are above."""
    assert not change(1.05, 1.05, 1.05, former_us=2.0).is_suspect
    assert verdict(change(1.10, 1.10, 1.10, former_us=2.0), change(1.10, 1.10, 1.10, former_us=2.0)) is Verdict.REGRESSION
    assert not change(0.95, 0.95, 0.95, former_us=2.0).is_surely_faster


@given(st.floats(0.5, 2.0), st.floats(0.0, 0.2), st.floats(0.0, 0.2), st.floats(0.1, 1000.0))
def test_sure_implies_suspect(median: float, below: float, above: float, former_us: float) -> None:
    one = change(median * (1 - below), median, median * (1 + above), former_us)
    assert one.is_suspect or not one.is_surely_slower
    assert not (one.is_suspect and one.is_surely_faster)


def timing(us: float, fraction: float, spread: float) -> Timing:
    return Timing(Interval(us, us, us), Interval(fraction, fraction * (1 - spread), fraction * (1 + spread)), 11)


def test_against_a_baseline_both_spreads_count() -> None:
    """A fraction of 0.9 ± 1 % that was 1.0 ± 2 %: 1.0 / 0.9 slower, at least 0.98 / 0.909, at most 1.02 / 0.891."""
    found = change_from_baseline(timing(100.0, 0.9, 0.01), copy_us=90.0, former=Interval(1.0, 0.98, 1.02))
    assert found.ratio == pytest.approx((1 / 0.9, 0.98 / 0.909, 1.02 / 0.891))
    assert found.extra_us == pytest.approx((10.0, 90 / 0.909 - 90 / 0.98, 90 / 0.891 - 90 / 1.02))
    assert found.is_surely_slower


@given(st.floats(0.3, 1.1), st.floats(0.3, 1.1), st.floats(0, 0.05), st.floats(0, 0.05), st.floats(1.0, 500.0))
def test_the_ends_enclose_the_median(now: float, then: float, spread: float, former_spread: float, copy_us: float) -> None:
    former = Interval(then, then * (1 - former_spread), then * (1 + former_spread))
    found = change_from_baseline(timing(copy_us / now, now, spread), copy_us, former)
    for interval in (found.ratio, found.extra_us):
        assert interval.low <= interval.median <= interval.high


def rounds(true_us: float, noise: float, seed: int, count: int = 11) -> tuple[list[float], list[float]]:
    """Paired samples of a version that takes true_us and one that takes 100 µs, on a clock that drifts by half for both alike."""
    source = random.Random(seed)
    drifts = [source.uniform(1.0, 1.5) for _ in range(count)]
    now, then = ([us * drift * source.uniform(1 - noise, 1 + noise) for drift in drifts] for us in (true_us, 100.0))
    return now, then


@pytest.mark.parametrize("seed", range(20))
def test_five_percent_are_found_and_none_are_not_invented(seed: int) -> None:
    slower, same = change_between(*rounds(105.0, 0.01, seed)), change_between(*rounds(100.0, 0.01, seed))
    assert slower.is_surely_slower
    assert not same.is_suspect
    assert verdict(same) is Verdict.PASS


@given(st.lists(st.sampled_from(Verdict), max_size=6), st.booleans())
def test_the_exit_code_tells_the_worst(verdicts: list[Verdict], required: bool) -> None:
    code = exit_code(verdicts, require_baseline=required)
    if Verdict.REGRESSION in verdicts:
        assert code is Exit.REGRESSION
    elif required and Verdict.NO_BASELINE in verdicts:
        assert code is Exit.NO_BASELINE
    elif Verdict.INCONCLUSIVE in verdicts:
        assert code is Exit.INCONCLUSIVE
    else:
        assert code is Exit.OK
    assert {exit_code(order, require_baseline=required) for order in itertools.permutations(verdicts[:4])} == {
        exit_code(verdicts[:4], require_baseline=required)
    }


def test_the_limits_are_those_that_are_documented() -> None:
    assert (SLOWER, SLOWER_US) == (1.02, 0.15)
    assert [int(code) for code in Exit] == [0, 1, 2, 3, 4, 5]
