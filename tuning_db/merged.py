"""What a merge is to leave, and what it tells of records that contradict each other. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tuning_db.model import Device, Problem, Record, Source, Sweep

Key: TypeAlias = tuple[str, Source, Problem]
"""A device's uid, what its record rests on, and the problem: a database has one record of each."""


@dataclass(frozen=True)
class Merged:
    """What a merge found: new trials by file, uids that stand for trials that differ, and records that name different winners.

    A dispute is the record that was kept, then those of the files that name other configs. All trials are kept, whoever won.
    """

    new_trials: dict[Path, int]
    split_uids: list[str]
    disputes: list[tuple[Record, ...]]


def key_of(record: Record) -> Key:
    return record.device_uid, record.source, record.problem


def device_order(device: Device) -> tuple[object, ...]:
    """Of two descriptions of one device the larger is kept: one with a name before one without."""
    return device.name, device.warp_size


def sweep_order(sweep: Sweep) -> tuple[object, ...]:
    """Of two states of one sweep the larger is kept: one that has ended before one that runs."""
    return sweep.state != "running", sweep.finished_at, repr(sweep)


def age_order(record: Record) -> tuple[str, ...]:
    """Newer is larger; different records are never equal."""
    return record.created_at, record.trial_uid, repr(record)


def disputes(kept: Mapping[Key, Record], found: Iterable[Record]) -> list[tuple[Record, ...]]:
    """Each record kept for which others were found that name another config, then those, the newest of each config."""
    others: dict[Key, dict[str, Record]] = {}
    for record in sorted(found, key=age_order, reverse=True):
        key = key_of(record)
        if key in kept and record.config != kept[key].config:
            others.setdefault(key, {}).setdefault(str(record.config), record)
    return [(kept[key], *others[key].values()) for key in sorted(others)]
