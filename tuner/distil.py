"""The few configs that do for every measured problem: a greedy set cover over the trials of a database."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kernels.variants import is_legal
from tuner.eliminations import elimination_races
from tuning_db.model import TORCH_VARIANT, Config, Device, Problem, Trial

Case: TypeAlias = tuple[str, Problem]
"""A problem on the device with that uid."""


@dataclass(frozen=True)
class Chosen:
    """A config of the cover, the cases that it covers first, and all that it covers."""

    config: Config
    newly: int
    covers: int


def near_best(device: Device, trials: Iterable[Trial], slack: float) -> dict[Case, set[Config]]:
    """For each problem of a device the kernels' configs within `slack` (0.02: 2 %) of the fastest of its newest elimination race."""
    near: dict[Case, set[Config]] = {}
    for problem, race in elimination_races(trials).items():
        times_us = {
            trial.config: trial.measurement.median_us
            for trial in race
            if trial.measurement and trial.config.variant != TORCH_VARIANT and is_legal(trial.config, problem, device)
        }
        if times_us:
            limit_us = (1 + slack) * min(times_us.values())
            near[device.uid, problem] = {config for config, us in times_us.items() if us <= limit_us}
    return near


def cover(near: Mapping[Case, Collection[Config]]) -> list[Chosen]:
    """Configs of which each case has one, few of them: always the one that covers most of what is left, then by name.

    Greedy is at most ln(cases) + 1 times as many as the fewest, usually a few; what later choices made superfluous is left out.
    """
    by_config: dict[Config, set[Case]] = {}
    for case, configs in near.items():
        for config in configs:
            by_config.setdefault(config, set()).add(case)
    left = set(near)
    picked: list[Config] = []
    while left:
        config = min(by_config, key=lambda config: (-len(by_config[config] & left), str(config)))
        picked.append(config)
        left -= by_config[config]
    for config in reversed(picked.copy()):
        if _covered(picked, by_config, without=config) == set(near):
            picked.remove(config)
    chosen, done = [], set[Case]()
    for config in picked:
        chosen.append(Chosen(config, len(by_config[config] - done), len(by_config[config])))
        done |= by_config[config]
    return chosen


def _covered(picked: Sequence[Config], by_config: Mapping[Config, set[Case]], without: Config) -> set[Case]:
    return {case for config in picked if config != without for case in by_config[config]}
