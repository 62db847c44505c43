"""What the command line lists: what a database holds, what the dispatcher would run, which devices are known."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table

from kernels.provenance import is_todays
from tuner.architectures import architectures
from tuner.display import ROWS_SHOWN, count, fraction, message, microseconds, problem_label, ratio, table
from tuner.explain import Explanation
from tuner.faults import standing_faults
from tuning_db.lookup import Pick
from tuning_db.merged import Merged
from tuning_db.model import Device, Record, Source, Status, Tier
from tuning_db.store import Store


def print_status(console: Console, store: Store) -> None:
    """Coverage per device, op and dtype, and failed trials; then the configs that no sweep tries again; then the sweeps."""
    sweeps = store.sweeps()
    for device in store.devices():
        records = store.records(device.uid)
        numbers = ("problems", "measured", "modelled", "stale")
        made = table(f"{device.name} ({device.uid})", "op", "dtype", *numbers, right=numbers)
        groups = sorted({(record.problem.op, record.problem.x_dtype) for record in records})
        for op, dtype in groups:
            group = [record for record in records if (record.problem.op, record.problem.x_dtype) == (op, dtype)]
            sources = Counter(record.source for record in group)
            stale = sum(not is_todays(record) for record in group)
            problems = len({record.problem for record in group})
            row = (problems, sources[Source.MEASURED], sources[Source.MODELLED], stale)
            made.add_row(op, dtype, *map(str, row))
        console.print(made)
        trials = store.outcomes(device.uid)
        failed = ", ".join(f"{number} {status.value}" for status, number in trials.items() if status is not Status.OK)
        if trials:
            message(console, f"{count(sum(trials.values()), 'trial')}, failed: {failed or 'none'}.")
        imported = sum(record.device_uid == device.uid for record in store.records_without_trials())
        if imported:
            message(console, f"{count(imported, 'record')} imported without trials.")
        console.print()
    for arch in sorted({device.arch for device in store.devices()}):
        faults = standing_faults(store, arch)
        made = table(f"Not tried again on {arch}", "config", "problem", "status", "error", "at", right=("status", "at"))
        for trial in faults:
            made.add_row(str(trial.config), problem_label(trial.problem), trial.status.value, trial.error, moment(trial.created_at))
        if faults:
            console.print(made)
            message(console, "What caused it is cured? `python -m tuner sweep --retry` tries them again.")
    made = table("Sweeps", "started", "state", "arch", "arguments", right=("started", "state"))
    for sweep in sweeps:
        state = "running, or killed" if sweep.state == "running" else sweep.state
        arch = sweep.device_uid.partition("-")[0]
        made.add_row(moment(sweep.started_at), state, arch, " ".join(json.loads(sweep.argv)))
    if sweeps:
        console.print(made)
    message(console, f"in {store.path}")


def print_records(console: Console, records: Sequence[Record], imported: Collection[Record]) -> None:
    """One table per device; `imported` are those without trials."""
    numbers = ("µs", "of copy", "heuristic", "PyTorch")
    for uid in sorted({record.device_uid for record in records}):
        made = table(f"{uid}; times faster than heuristic and PyTorch", "problem", "config", *numbers, "kind", right=numbers)
        for record in records:
            if record.device_uid == uid:
                kind = record.source.value + (", imported" if record in imported else "") + ("" if is_todays(record) else ", stale")
                made.add_row(problem_label(record.problem), str(record.config), *_figures(record), kind)
        console.print(made)
    message(console, f"{count(len(records), 'record')}.")


def print_merged(console: Console, store: Store, merged: Merged) -> None:
    """What each file brought, what the database holds now, and what the files contradict each other in."""
    for path, new in merged.new_trials.items():
        message(console, f"{path}: {count(new, 'new trial')}")
    records, imported = store.records(), store.records_without_trials()
    held = f"{count(len(records), 'record')} of {count(len(store.devices()), 'device')}"
    message(console, f"in {store.path}: {held}, {len(imported)} of them imported without trials")
    if merged.split_uids:
        listed = ", ".join(merged.split_uids[:ROWS_SHOWN])
        message(console, f"{count(len(merged.split_uids), 'trial')} edited after being written; both versions are kept: {listed}")
    if not merged.disputes:
        return
    numbers = ("µs", "measured")
    made = table("Where the files name different winners: what is kept, then the others", "problem", "config", *numbers, right=numbers)
    for dispute in merged.disputes[:ROWS_SHOWN]:
        for record in dispute:
            problem = problem_label(record.problem) if record is dispute[0] else ""
            made.add_row(problem, str(record.config), microseconds(record.median_us), moment(record.created_at))
    console.print(made)
    if len(merged.disputes) > ROWS_SHOWN:
        message(console, f"{len(merged.disputes) - ROWS_SHOWN} more are not shown.")
    message(console, "All trials are kept. The newest race decides, and where there are no trials, the newest record.")


def print_explanation(console: Console, explanation: Explanation, assumed: bool, backend: str) -> None:
    problem, device, pick, record = explanation.problem, explanation.device, explanation.pick, explanation.pick.record
    message(console, f"{problem} on {device.name} ({device.uid})" + (", assumed: its board is not here" if assumed else ""))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    if backend == "torch":
        facts.add_row("but", "RMSNORM_BACKEND=torch: every call runs PyTorch, whatever follows")
    facts.add_row("config", str(pick.config))
    facts.add_row("tier", _tier(pick))
    if record:
        facts.add_row("from", pick.layer)
        if record.problem != problem or record.device_uid != device.uid:
            facts.add_row("record of", f"{record.problem} on {record.device_uid}, distance {pick.distance:.2f}")
        facts.add_row("evidence", _evidence(record) + ("; imported, without its trials" if explanation.imported else ""))
        age = "fresh" if explanation.fresh else "stale: the kernels or Triton changed since; sweep again"
        versions = f"triton {record.triton_version}, torch {record.torch_version}"
        facts.add_row("made", f"{moment(record.created_at)} UTC with {versions}; {age}")
    else:
        facts.add_row("evidence", "none: no record for this architecture serves; `python -m tuner sweep` makes some")
    if explanation.otherwise:
        facts.add_row("otherwise", f"{explanation.otherwise.config} by {_tier(explanation.otherwise)}")
    console.print(facts)


def print_devices(console: Console, here: Sequence[Device], stores: Sequence[Store]) -> None:
    made = table("Devices", "where", "name", "device", "records", right=("device", "records"))
    for index, device in enumerate(here):
        made.add_row(f"GPU {index} here", device.name, device.uid, "")
    for store in stores:
        for device in store.devices():
            made.add_row(str(store.path), device.name, device.uid, str(len(store.records(device.uid))))
    for name, architecture in architectures().items():
        made.add_row(f"--arch {name}", architecture.device.name, architecture.device.uid, "")
    console.print(made)


def moment(iso: str) -> str:
    """`2026-01-31 12:34` of an ISO 8601 time."""
    return iso[:16].replace("T", " ")


def _tier(pick: Pick) -> str:
    return f"{pick.tier.value} of {len(Tier)}, {pick.tier.name.lower().replace('_', ' ')}"


def _figures(record: Record) -> tuple[str, str, str, str]:
    heuristic, torch = (other and other / record.median_us for other in (record.heuristic_us, record.torch_us))
    return microseconds(record.median_us), fraction(record.copy_fraction), ratio(heuristic), ratio(torch)


def _evidence(record: Record) -> str:
    time, copy, heuristic, torch = _figures(record)
    parts = [f"{record.source.value} {time} µs"]
    if record.source is Source.MEASURED:
        parts[0] += f" ({microseconds(record.low_us)} to {microseconds(record.high_us)})"
    parts.append(f"{copy} of copy")
    if heuristic:
        parts.append(f"{heuristic} as fast as the heuristic")
    if torch:
        parts.append(f"{torch} as fast as PyTorch")
    return f"{', '.join(parts)}; policy {record.policy}"
