"""The report of a database: what was recorded, board by board."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.failure import Failure
from tuner.report.page import write_page
from tuner.report.points import Point
from tuner.report.sections import Section, section
from tuning_db.jsonl import shipped_archs, shipped_records
from tuning_db.model import ANY_ROWS, Device, Record, Source
from tuning_db.store import open_for_reading

if TYPE_CHECKING:
    from tuner.regret import Regret

Layer = tuple[Sequence[Device], Sequence[Record]]


def gathered(paths: Iterable[Path], arch: str | None, *, shipped: bool) -> list[Layer]:
    """The devices and records of databases, then of what ships if that is wanted; of one architecture if one is named.

    Raises DatabaseError if a file is bad, and Failure if there is no measured record.
    """
    layers: list[Layer] = []
    for path in paths:
        with open_for_reading(path) as store:
            layers.append((store.devices(arch), store.records(arch=arch)))
    if shipped:
        layers += [shipped_records(name) for name in shipped_archs() if arch in (None, name)]
    if not any(record.source is Source.MEASURED for _, records in layers for record in records):
        what = f"no measured record{f' for {arch}' if arch else ''} to draw"
        raise Failure(f"there is {what}: sweep on a GPU, or name another file by --db")
    return layers


def gathered_regrets(paths: Iterable[Path], arch: str | None) -> dict[str, list[Regret]]:
    """By device uid what unmeasured picks lose, from the first database that has trials of that device; nothing without Triton."""
    found: dict[str, list[Regret]] = {}
    if importlib.util.find_spec("triton") is None:  # which the picks come from; records can be drawn without it
        return found
    from tuner.regret import regrets

    for path in paths:
        with open_for_reading(path) as store:
            for device in store.devices(arch):
                if not found.get(device.uid):
                    found[device.uid] = regrets(store, device, lambda problem: True)
    return found


def write_report(layers: Iterable[Layer], regrets: Mapping[str, Sequence[Regret]], folder: Path) -> Path:
    """The page of all devices that have measured records; of several records of a problem the first layer's counts.

    `regrets` is what `gathered_regrets` found.
    """
    devices: dict[str, Device] = {}
    records: dict[tuple[str, object], Record] = {}
    for layer_devices, layer_records in layers:
        for device in layer_devices:
            devices.setdefault(device.uid, device)
        for record in layer_records:
            if record.source is Source.MEASURED and record.problem.rows != ANY_ROWS:
                records.setdefault((record.device_uid, record.problem), record)
    sections = []
    for uid, device in sorted(devices.items(), key=lambda item: item[1].name):
        own = [record for record in records.values() if record.device_uid == uid]
        if own:
            sections.append(device_section(device, own, regrets.get(uid, ())))
    return write_page("RMSNorm: what the sweeps recorded", sections, folder)


def device_section(device: Device, records: Sequence[Record], regrets: Sequence[Regret] = ()) -> Section:
    versions = sorted({(record.torch_version, record.triton_version) for record in records})
    listed = "; ".join(f"torch {torch}, triton {triton}" for torch, triton in versions)
    dates = sorted({record.created_at[:10] for record in records})
    days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    origin = f"{device.name} ({device.uid}) · {listed} · {days}"
    slug = device.uid.lower().replace("_", "-")
    made = section(slug, device.name, origin, [point(record) for record in sorted(records, key=_order)])
    if not regrets:
        return made
    from tuner.report.regret_maps import regret_maps

    return replace(made, drawings=(*made.drawings, *regret_maps(slug, origin, regrets)))


def point(record: Record) -> Point:
    """The copy's time is the one that the record's fraction was made of."""
    us = {"tuned": record.median_us, "copy": record.copy_fraction * record.median_us}
    us |= {name: time for name, time in (("heuristic", record.heuristic_us), ("eager", record.torch_us)) if time}
    return Point(record.problem, us, str(record.config))


def _order(record: Record) -> tuple[object, ...]:
    problem = record.problem
    return (problem.x_dtype, problem.w_dtype, problem.layout, problem.cols, problem.rows)
