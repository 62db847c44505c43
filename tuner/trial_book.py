"""How a sweep writes down what it does: its own row, the trials of each problem, and one commit a problem."""

from __future__ import annotations

import platform
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import torch
import triton

from kernels.variants import VARIANTS, source_hash
from tuner.events import Finished
from tuning_db.model import (
    TORCH_VARIANT,
    Config,
    Device,
    Measurement,
    Problem,
    Resources,
    Role,
    Status,
    Sweep,
    Trial,
    canonical_json,
)
from tuning_db.store import Store


class TrialBook:
    """Collects the trials of one problem, all of one race."""

    def __init__(self, problem: Problem, device: Device, sweep_uid: str) -> None:
        self.problem, self.device, self.sweep_uid = problem, device, sweep_uid
        self.race_uid = uuid.uuid4().hex
        self.trials: list[Trial] = []

    def add(
        self,
        config: Config,
        status: Status,
        *,
        role: Role = Role.CANDIDATE,
        error: str = "",
        resources: Resources | None = None,
        measurement: Measurement | None = None,
        final: bool = False,
    ) -> None:
        of_kernel = config.variant != TORCH_VARIANT
        self.trials.append(
            Trial(
                uid=uuid.uuid4().hex,
                sweep_uid=self.sweep_uid,
                race_uid=self.race_uid,
                device_uid=self.device.uid,
                problem=self.problem,
                config=config,
                role=role,
                status=status,
                final=final,
                created_at=now(),
                revision=VARIANTS[config.variant].REVISION if of_kernel else 0,
                source_hash=source_hash(config.variant) if of_kernel else "",
                triton_version=triton.__version__,
                torch_version=torch.__version__,
                error=error,
                measurement=measurement,
                resources=resources,
            )
        )


def commit(store: Store, problem: Problem, trials: list[Trial]) -> Finished:
    """Store a problem's trials, and say what record they make."""
    newest = max((known.created_at for trial in trials[:1] for known in store.trials(trial.device_uid, problem)), default="")
    records = store.add_trials([replace(trial, created_at=later(trial.created_at, newest)) for trial in trials])
    failed = sum(trial.status is not Status.OK for trial in trials)
    return Finished(problem, records[0] if records else None, len(trials), failed)


@contextmanager
def recorded_sweep(store: Store, device: Device, argv: Sequence[str]) -> Iterator[str]:
    """A Sweep row around the work: `finished` at the end, `interrupted` if an exception ends it, `running` for ever if it is killed."""
    sweep = Sweep(
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
    store.add_sweep(sweep)
    try:
        yield sweep.uid
    except BaseException:
        store.finish_sweep(sweep.uid, now(), "interrupted")
        raise
    store.finish_sweep(sweep.uid, now(), "finished")


def later(moment: str, known: str) -> str:
    """`moment`, or a microsecond after `known` where the clock was set back since: the newest race decides, and this is it."""
    if moment > known:
        return moment
    try:
        return (datetime.fromisoformat(known) + timedelta(microseconds=1)).isoformat(timespec="microseconds")
    except ValueError:  # no sweep wrote that
        return moment


def now() -> str:
    """UTC to the microsecond, ISO 8601: sorts by time as text."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")
