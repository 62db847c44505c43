"""What `python -m tuner verify` prints: the records that no longer win, and how many do."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence

from rich.console import Console

from tuner.display import count, message, microseconds, problem_label, table
from tuner.recheck import Recheck
from tuning_db.model import Device, to_dict


def print_rechecks(console: Console, device: Device, checked: Sequence[Recheck]) -> None:
    fallen = [one for one in checked if not one.holds]
    if fallen:
        numbers = ("µs", "best µs", "loss %")
        made = table("Records that no longer win", "problem", "record", "fastest", *numbers, right=numbers)
        for one in sorted(fallen, key=lambda one: -(one.loss or 0)):
            own = microseconds(one.times_us.get(one.record.config))
            loss = one.fault if one.loss is None else f"{100 * one.loss:.1f}"
            made.add_row(
                problem_label(one.record.problem),
                str(one.record.config),
                str(one.fastest),
                own,
                microseconds(one.times_us[one.fastest]),
                loss,
            )
        console.print(made)
    share = 100 * (len(checked) - len(fallen)) / len(checked)
    held = f"{len(checked) - len(fallen)} of {count(len(checked), 'record')} ({share:.1f} %)"
    message(console, f"{held} of {device.name} ({device.uid}) are within 1 % of the fastest of their new race.")
    message(console, f"Records lose {_mean(one.loss for one in checked)} in the geometric mean, the model's picks")
    message(console, f"{_mean(one.model_loss for one in checked)}.")


def recheck_json(device: Device, checked: Sequence[Recheck]) -> str:
    """One object: the device, and every record with the times of its new race, fastest first."""
    plain = {"device": to_dict(device), "device_uid": device.uid, "records": [one.to_dict() for one in checked]}
    return json.dumps(plain, indent=2, allow_nan=False)


def _mean(losses: Iterable[float | None]) -> str:
    known = [1 + loss for loss in losses if loss is not None]
    return f"{100 * (statistics.geometric_mean(known) - 1):.2f} %" if known else "nothing, for none has a time,"
