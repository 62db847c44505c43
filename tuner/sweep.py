"""The sweep: what is to do goes out to stations, what comes back is committed, a problem at a time, by this one writer."""

from __future__ import annotations

import platform
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

import torch
import triton

from kernels.dispatch import pick_config
from tuner.architectures import Architecture
from tuner.events import Faulted, Finished, Started, Watch
from tuner.faults import standing_faults
from tuner.fleet import FAULTS, outcomes
from tuner.invariant import invariant_trials
from tuner.jobs import Job, Station
from tuner.trials import later, now
from tuning_db.lookup import RecordIndex
from tuning_db.model import Config, Device, Problem, Status, Sweep, Tier, Trial, canonical_json
from tuning_db.store import Store


def sweep(
    problems: Sequence[Problem],
    device: Device,
    architecture: Architecture | None,
    stations: Sequence[Station],
    store: Store,
    argv: Sequence[str],
    watch: Watch,
    budget_s: float | None,
    retry: bool = False,
) -> None:
    """Tune each problem on one of the stations, or with an architecture compile and model it, and commit it; then end the stations.

    After `budget_s` seconds no problem is begun. A config that breaks or stalls a worker is recorded at once, and left out from then
    on: in this sweep, and in all on this architecture while its variant has that revision; but `retry` tries those again that did so on
    one of the problems. At the end of a sweep on GPUs follow the configs for any number of rows. Raises Failure.
    """
    with _recorded(store, device, argv) as sweep_uid:
        known = RecordIndex([(str(store.path), [device], store.records(device.uid))])
        jobs = [Job(problem, device, architecture, _incumbent(problem, device, known), sweep_uid) for problem in problems]
        faults = standing_faults(store, device.arch)
        tried_again = {fault.config for fault in faults if retry and fault.problem in problems}
        barred = {fault.config for fault in faults} - tried_again
        started = time.monotonic()
        done, faulted = 0, Counter[Job]()
        with closing(outcomes(stations, jobs, barred, lambda: budget_s is None or time.monotonic() - started <= budget_s)) as events:
            for event in events:
                if isinstance(event, Job):
                    watch(Started(event.problem, done, len(jobs), *stations[0].progress))
                    continue
                trials = _dated(event.trials, store)
                records = store.add_trials(trials)
                for trial in trials:
                    if trial.status in FAULTS:
                        watch(Faulted(trial))
                if not event.finished:
                    faulted[event.job] += len(trials)
                    continue
                done += 1
                failed = sum(trial.status is not Status.OK for trial in trials) + faulted[event.job]
                record = records[0] if records else None
                watch(Finished(event.job.problem, record, len(trials) + faulted[event.job], failed, event.note, event.load_bytes))
        if architecture is None:
            store.add_trials(invariant_trials(device, store.trials(device.uid)))


def _dated(trials: Sequence[Trial], store: Store) -> list[Trial]:
    """The trials of one problem, made no earlier than those that are known of it: the newest race decides, and this is it."""
    known = (trial.created_at for first in trials[:1] for trial in store.trials(first.device_uid, first.problem))
    newest = max(known, default="")
    return [replace(trial, created_at=later(trial.created_at, newest)) for trial in trials]


def _incumbent(problem: Problem, device: Device, known: RecordIndex) -> Config | None:
    pick = pick_config(problem, device, index=known)
    return pick.config if pick.tier is Tier.EXACT else None


@contextmanager
def _recorded(store: Store, device: Device, argv: Sequence[str]) -> Iterator[str]:
    """A Sweep row around the work: `finished` at the end, `interrupted` if an exception ends it, `running` for ever if it is killed."""
    row = Sweep(
        uid=uuid.uuid4().hex,
        device_uid=device.uid,
        started_at=now(),
        finished_at="",
        host=platform.node(),
        argv=canonical_json(list(argv)),
        state="running",
        triton_version=triton.__version__,
        torch_version=torch.__version__,
    )
    store.add_device(device)
    store.add_sweep(row)
    try:
        yield row.uid
    except BaseException:
        store.finish_sweep(row.uid, now(), "interrupted")
        raise
    store.finish_sweep(row.uid, now(), "finished")
