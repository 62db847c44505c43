"""From trials to the record they stand for: one pure function."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeAlias

from tuning_db.model import TORCH_VARIANT, Measurement, Record, Role, Source, Status, Trial

TIE = 1.01
"""A gain within this ratio does not unseat an incumbent, nor are candidates dropped for it."""

NEAR = 1.003
"""Which of the medians within this ratio of the fastest wins is left to a fixed rule. With all of TIE, 1 in 20 winners of one sweep was
more than 1 % slower than the fastest of the next, with this 1 in 50 (414 problems, H100; H200: 1 in 18 and 1 in 300 of 331)."""

Entry: TypeAlias = tuple[Trial, Measurement]

_FROM_TRIAL = tuple(spec.name for spec in fields(Record) if spec.name in Trial.__dataclass_fields__)
_FROM_MEASUREMENT = tuple(spec.name for spec in fields(Record) if spec.name in Measurement.__dataclass_fields__)


def derive_record(trials: Iterable[Trial]) -> Record | None:
    """The record that trials of one device, problem and source stand for: the winner of the newest final race, or None.

    Older races are history, however fast. An incumbent stays unless the race puts somebody's gain above 1 % for sure: the upper end of
    that one's interval 1 % below the lower end of the incumbent's. Among the others, within 0.3 % of the fastest median is a tie: a
    kernel comes before PyTorch, then fewer warps, the smaller tile (product of the other integer params) and the name decide.
    """
    races: dict[tuple[str, str], list[Entry]] = {}
    for trial in trials:
        if trial.final and trial.status is Status.OK and trial.measurement:
            races.setdefault((trial.race_uid, trial.measurement.policy), []).append((trial, trial.measurement))
    if not races:
        return None
    newest = max(races, key=lambda key: (max(trial.created_at for trial, _ in races[key]), key))
    race = races[newest]
    winner, measured = _winner(race)
    torch_us = [timed.median_us for trial, timed in race if trial.role is Role.TORCH or trial.config.variant == TORCH_VARIANT]
    return Record(
        source=source_of(measured),
        heuristic_us=min((timed.median_us for trial, timed in race if trial.role is Role.HEURISTIC), default=None),
        torch_us=min(torch_us, default=None),
        trial_uid=winner.uid,
        **{name: getattr(winner, name) for name in _FROM_TRIAL},
        **{name: getattr(measured, name) for name in _FROM_MEASUREMENT},
    )


def source_of(measurement: Measurement) -> Source:
    return Source.MODELLED if measurement.policy.startswith("model") else Source.MEASURED


def _winner(race: list[Entry]) -> Entry:
    """The incumbent, or the first by rule of those that are fastest among the ones that surely beat it."""
    incumbents = [entry for entry in race if entry[0].role is Role.INCUMBENT]
    if incumbents:
        incumbent = min(incumbents, key=_tie_order)
        race = [entry for entry in race if entry[1].high_us * TIE < incumbent[1].low_us] or [incumbent]
    fastest = min(measured.median_us for _, measured in race)
    return min((entry for entry in race if entry[1].median_us <= fastest * NEAR), key=_tie_order)


def _tie_order(entry: Entry) -> tuple[Any, ...]:
    trial, measurement = entry
    params = trial.config.params
    warps = int(params.pop("num_warps", 0))
    tile = math.prod(value for value in params.values() if isinstance(value, int) and not isinstance(value, bool))
    fixed = (trial.config.variant == TORCH_VARIANT, warps, tile, str(trial.config))
    return (*fixed, measurement.median_us, trial.uid)
