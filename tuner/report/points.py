"""What reports draw: one problem with the times of all who were measured on it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tuner.display import problem_label
from tuning_db.model import Problem

COPY, OURS, HEURISTIC = "copy", "tuned", "heuristic"
NAMES = {
    "tuned": "rmsnorm",
    "heuristic": "heuristic config",
    "eager": "PyTorch eager",
    "compile": "torch.compile",
    "autotune": "triton.autotune",
    "liger": "Liger",
    "quack": "QuACK",
    "flashinfer": "FlashInfer",
    "flaggems": "FlagGems",
    "copy": "copy",
}
"""How a provider is called in figures."""


@dataclass(frozen=True)
class Point:
    """A problem, µs a launch by provider (`copy`: the reference copy), and the config that ours ran (empty: unknown)."""

    problem: Problem
    us: dict[str, float]
    config: str = ""

    @property
    def kind(self) -> str:
        """Dtypes and layout, as in `4096x8192 bf16 w=fp32`."""
        return problem_label(self.problem).partition(" ")[2]

    @property
    def variant(self) -> str:
        return self.config.partition(" ")[0]

    def param(self, name: str) -> str:
        """A param of the config as text; empty if it has none of that name."""
        return next((part.partition("=")[2] for part in self.config.split() if part.startswith(f"{name}=")), "")

    def gbs(self, name: str) -> float:
        """GB/s of a provider: x and weight read once, y written once."""
        return self.problem.bytes_moved / self.us[name] / 1e3

    def ratio(self, over: str) -> float | None:
        """How many times as fast as another provider ours is."""
        return self.us[over] / self.us[OURS] if over in self.us and OURS in self.us else None

    def best_other(self) -> tuple[str, float] | None:
        """The fastest of the other implementations, and how many times as fast as it ours is; None without ours or others."""
        others = [name for name in self.us if name not in (COPY, OURS, HEURISTIC)]
        if not others or OURS not in self.us:
            return None
        best = min(others, key=lambda name: self.us[name])
        return best, self.us[best] / self.us[OURS]


def by_kind(points: Iterable[Point]) -> dict[str, list[Point]]:
    """Points of the same dtypes and layout together, the largest group first."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.kind, []).append(point)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def providers(points: Iterable[Point]) -> list[str]:
    """Who was measured, in the order of NAMES, without the copy."""
    found = {name for point in points for name in point.us}
    return [name for name in NAMES if name in found and name != COPY]


def mean_ratio(points: Sequence[Point], over: str) -> float | None:
    """Geometric mean of `Point.ratio`; None if nobody has one."""
    known = [ratio for point in points if (ratio := point.ratio(over))]
    return statistics.geometric_mean(known) if known else None


def grid(points: Iterable[Point], value: Callable[[Point], float | None]) -> dict[tuple[int, int], float]:
    """A value by (rows, cols), where there is one."""
    found = {(point.problem.rows, point.problem.cols): value(point) for point in points}
    return {place: number for place, number in found.items() if number is not None}
