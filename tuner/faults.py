"""Which configs no sweep tries again: those that crashed or hung, until they are seen to pass where they did."""

from __future__ import annotations

from kernels.provenance import is_current
from tuner.fleet import FAULTS
from tuning_db.derive import source_of
from tuning_db.model import Source, Trial
from tuning_db.store import Store


def standing_faults(store: Store, arch: str) -> list[Trial]:
    """The trials on an arch that bar their configs, oldest first.

    They crashed or timed out at their variant's present revision, and the same config was not measured on the same problem since.
    """
    return [trial for trial in store.trials_with(arch, FAULTS) if is_current(trial) and not _has_passed_since(trial, store, arch)]


def _has_passed_since(fault: Trial, store: Store, arch: str) -> bool:
    """A modelled trial was only compiled: it says nothing."""
    known = (trial for device in store.devices(arch) for trial in store.trials(device.uid, fault.problem))
    same = (trial for trial in known if trial.config == fault.config and is_current(trial) and trial.created_at > fault.created_at)
    return any(trial.measurement is not None and source_of(trial.measurement) is Source.MEASURED for trial in same)
