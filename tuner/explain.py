"""What the dispatcher would run for a problem on a device, and on what evidence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.dispatch import pick_config, record_index
from kernels.provenance import is_todays
from kernels.settings import read_settings
from tuning_db.lookup import Pick, RecordIndex
from tuning_db.model import Device, Problem, Record, to_dict
from tuning_db.store import open_for_reading


@dataclass(frozen=True)
class Explanation:
    """The ladder's answer, and what it would be without the record that it rests on (None if it rests on none).

    imported: that record's trials are not in the database it came from. What ships has none.
    """

    problem: Problem
    device: Device
    pick: Pick
    otherwise: Pick | None
    imported: bool

    @property
    def fresh(self) -> bool:
        return self.pick.record is not None and is_todays(self.pick.record)

    def to_dict(self) -> dict[str, Any]:
        return {
            "problem": to_dict(self.problem),
            "device": to_dict(self.device),
            "backend": read_settings().backend,
            "pick": _plain(self.pick),
            "fresh": self.fresh,
            "imported": self.imported,
            "otherwise": self.otherwise and _plain(self.otherwise),
        }


def explain(problem: Problem, device: Device) -> Explanation:
    """Ask the ladder, as a call of `rmsnorm` would, and then once more without its answer."""
    index = record_index(device.arch)
    pick = pick_config(problem, device, index=index)
    otherwise = pick_config(problem, device, index=_without(index, pick.record)) if pick.record else None
    return Explanation(problem, device, pick, otherwise, _is_imported(pick))


def _is_imported(pick: Pick) -> bool:
    if pick.record is None or pick.layer == "shipped":
        return False
    with open_for_reading(Path(pick.layer)) as store:
        return pick.record in store.records_without_trials()


def _without(index: RecordIndex, record: Record) -> RecordIndex:
    entries = [entry for shelf in index.shelves.values() for known in shelf.at.values() for entry in known]
    names = (*map(str, read_settings().databases), "shipped")
    left = {name: [known for layer, known in entries if layer == name and known != record] for name in names}
    return RecordIndex([(name, index.devices, records) for name, records in left.items()])


def _plain(pick: Pick) -> dict[str, Any]:
    return {
        "config": {"variant": pick.config.variant, "params": pick.config.params},
        "tier": pick.tier.name.lower(),
        "layer": pick.layer,
        "distance": pick.distance,
        "record": pick.record and to_dict(pick.record),
    }
