"""The trials of one problem as they come about: each with its uid, its time, and the versions it was made with."""

from __future__ import annotations

import uuid
from datetime import datetime, timedelta, timezone

import torch
import triton

from kernels.variants import VARIANTS, source_hash
from tuner.jobs import Job
from tuning_db.model import TORCH_VARIANT, Config, Measurement, Resources, Role, Status, Trial


class TrialBook:
    """Collects the trials of one run of a job, all of one race."""

    def __init__(self, job: Job) -> None:
        self.job = job
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
                sweep_uid=self.job.sweep_uid,
                race_uid=self.race_uid,
                device_uid=self.job.device.uid,
                problem=self.job.problem,
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


def now() -> str:
    """UTC to the microsecond, ISO 8601: sorts by time as text."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def later(moment: str, known: str) -> str:
    """`moment`, or a microsecond after `known` where the clock was set back since."""
    if moment > known:
        return moment
    try:
        return (datetime.fromisoformat(known) + timedelta(microseconds=1)).isoformat(timespec="microseconds")
    except ValueError:  # no sweep wrote that
        return moment
