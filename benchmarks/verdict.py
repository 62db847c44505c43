"""Whether the present code is slower: pure decisions on intervals, without a clock or a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from benchmarks.exits import Exit
from benchmarks.results import Interval, Timing
from tuning_db.model import Problem

SLOWER = 1.02
"""A change of time within this ratio is none."""
SLOWER_US = 0.15
"""Nor is a smaller one in µs: at 2 µs a launch, a percent is below what an event can tell."""


class Verdict(str, Enum):
    """What became of a case."""

    PASS = "pass"
    IMPROVED = "improved"
    REGRESSION = "regression"
    INCONCLUSIVE = "inconclusive"
    NO_BASELINE = "no baseline"


@dataclass(frozen=True)
class Change:
    """Present time over former time, and present time less former time in µs, on the same copy speed."""

    ratio: Interval
    extra_us: Interval

    @property
    def is_surely_slower(self) -> bool:
        return self.ratio.low > SLOWER and self.extra_us.low > SLOWER_US

    @property
    def is_surely_faster(self) -> bool:
        return self.ratio.high < 1 / SLOWER and self.extra_us.high < -SLOWER_US

    @property
    def is_suspect(self) -> bool:
        """Whether a fresh process has to look: slower by the medians, or for sure."""
        return self.ratio.median > SLOWER and self.extra_us.median > SLOWER_US


@dataclass(frozen=True)
class Judged:
    """A case, its verdict, the present Timing, and the Change in the first process and in the one that was asked again."""

    problem: Problem
    verdict: Verdict
    now: Timing | None
    change: Change | None
    again: Change | None = None
    note: str = ""


def change_from_baseline(now: Timing, copy_us: float, former: Interval) -> Change:
    """Against a baseline's fraction of copy: `former` holds its median and its lowest and highest process.

    Fractions travel between days; µs are made of them with today's copy.
    """
    ratio = Interval(former.median / now.fraction.median, former.low / now.fraction.high, former.high / now.fraction.low)
    ends = (
        copy_us / now.fraction.median - copy_us / former.median,
        copy_us / now.fraction.high - copy_us / former.low,
        copy_us / now.fraction.low - copy_us / former.high,
    )
    return Change(ratio, Interval(*ends))


def change_between(now_us: Sequence[float], former_us: Sequence[float]) -> Change:
    """Of two versions in the same rounds: paired samples, one a round."""
    pairs = list(zip(now_us, former_us, strict=True))
    return Change(Interval.of([now / former for now, former in pairs]), Interval.of([now - former for now, former in pairs]))


def verdict(first: Change, again: Change | None = None) -> Verdict:
    """A slow-down counts if two processes, the second fresh, put its whole interval beyond both limits.

    Slower in the first and not in the second passes: the second was asked in order to find out.
    """
    if not first.is_suspect:
        return Verdict.IMPROVED if first.is_surely_faster else Verdict.PASS
    if again is None:
        return Verdict.INCONCLUSIVE
    if not again.is_suspect:
        return Verdict.PASS
    return Verdict.REGRESSION if first.is_surely_slower and again.is_surely_slower else Verdict.INCONCLUSIVE


def exit_code(verdicts: Iterable[Verdict], *, require_baseline: bool = False) -> Exit:
    """The worst news first: a regression, then a missing baseline where one is required, then what could not be told."""
    found = set(verdicts)
    if Verdict.REGRESSION in found:
        return Exit.REGRESSION
    if Verdict.NO_BASELINE in found and require_baseline:
        return Exit.NO_BASELINE
    return Exit.INCONCLUSIVE if Verdict.INCONCLUSIVE in found else Exit.OK
