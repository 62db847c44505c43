"""Records as JSON Lines: what ships, travels and is reviewed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import resources

from tuning_db.errors import DatabaseError
from tuning_db.model import Device, Record, canonical_json, record_from_dict, to_dict
from tuning_db.rows import checked


def shipped_records(arch: str) -> tuple[list[Device], list[Record]]:
    """The devices and records of an arch that come with the package; empty if there are none."""
    file = resources.files("tuning_db") / "shipped" / f"{arch}.jsonl"
    return read_jsonl(file.read_text(encoding="utf-8"), origin=str(file)) if file.is_file() else ([], [])


def shipped_archs() -> list[str]:
    """The architectures that records ship for."""
    return sorted(file.name.removesuffix(".jsonl") for file in (resources.files("tuning_db") / "shipped").iterdir())


def write_jsonl(devices: Iterable[Device], records: Iterable[Record]) -> str:
    """One line each, devices first, sorted, so that a diff shows what changed. Times and fractions keep four decimals."""
    lines = [canonical_json({"device": to_dict(device)}) for device in sorted(devices, key=lambda device: device.uid)]
    for record in sorted(records, key=lambda record: (record.device_uid, record.source.value, record.problem)):
        plain = {name: round(value, 4) if isinstance(value, float) else value for name, value in to_dict(record).items()}
        lines.append(canonical_json({"record": plain}))
    return "".join(f"{line}\n" for line in lines)


def read_jsonl(text: str, origin: str = "JSON Lines") -> tuple[list[Device], list[Record]]:
    """The inverse of `write_jsonl`. Raises DatabaseError with the number of the first bad line."""
    devices: dict[str, Device] = {}
    records: list[Record] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            ((kind, plain),) = json.loads(line).items()
            if kind == "device":
                device = checked(Device(**plain))
                devices[device.uid] = device
            elif kind == "record":
                records.append(checked(record_from_dict(plain)))
                if records[-1].device_uid not in devices:
                    raise ValueError(f"no line above describes device {records[-1].device_uid}")
            else:
                raise ValueError(f"expected `device` or `record`, found {kind!r}")
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise DatabaseError(f"{origin}, line {number}: {error!r}; correct or delete that line") from error
    return list(devices.values()), records
