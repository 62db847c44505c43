"""What `python -m tuner regret` prints: losses by group as a table, and the worst problems of each picker."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console

from tuner.display import count, message, problem_label, table
from tuner.regret import PICKERS, Regret, groups, summary, worst
from tuning_db.model import Device, to_dict

WORST = 10
"""Problems shown of each picker."""


def print_regret(console: Console, device: Device, cells: Sequence[Regret]) -> None:
    message(console, f"{device.name} ({device.uid})")
    made = table("Loss in %: geometric mean, p95", "", "problems", *PICKERS, right=("problems", *PICKERS))
    made.add_row("all", str(len(cells)), *(_losses(cells, picker) for picker in PICKERS))
    for grouping, own in groups(cells).items():
        made.add_section()
        made.add_row(f"by {grouping}")
        for name, group in own.items():
            made.add_row(f"  {name}", str(len(group)), *(_losses(group, picker) for picker in PICKERS))
    console.print(made)
    for picker in PICKERS:
        if summary(cells, picker).timed:
            made = table(f"Worst picks: {picker}", "problem", "pick", "fastest", "loss %", right=("loss %",))
            for loss, cell in worst(cells, picker, WORST):
                made.add_row(problem_label(cell.problem), str(cell.picks[picker]), str(cell.best), f"{100 * loss:.1f}")
            console.print(made)
    for picker in PICKERS:
        known = summary(cells, picker)
        if known.timed < known.problems:
            message(console, f"{picker}: {known.problems - known.timed} of {count(known.problems, 'problem')} have no time of its pick.")
    if not summary(cells, "model").timed:
        message(console, "model: skipped, for the trials hold no resources of their binaries or the architecture is not known.")


def regret_json(results: Sequence[tuple[Device, Sequence[Regret]]]) -> str:
    """One object: per device each picker's summary, and every problem."""
    devices = [
        {
            "device": to_dict(device),
            "device_uid": device.uid,
            "pickers": {picker: vars(summary(cells, picker)) for picker in PICKERS},
            "problems": [cell.to_dict() for cell in cells],
        }
        for device, cells in results
    ]
    return json.dumps({"devices": devices}, indent=2, allow_nan=False)


def _losses(cells: Sequence[Regret], picker: str) -> str:
    known = summary(cells, picker)
    return "" if known.mean is None or known.p95 is None else f"{100 * known.mean:.1f} {100 * known.p95:5.1f}"
