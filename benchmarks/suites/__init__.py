"""Suites: the lists of Problems that are benchmarked, in the form of the tuner's workloads."""

from __future__ import annotations

from importlib import resources

from tuner.workloads import SHIPPED, load_workload, parse_workload
from tuning_db.model import Problem

SUITES = ("gate", "full", "backward", "add", "add_backward", "other_ops")


def load_suite(name_or_path: str) -> list[Problem]:
    """The Problems of a suite, else of a shipped workload or a YAML file. Raises `tuner.workloads.WorkloadError`."""
    if name_or_path not in SUITES:
        return load_workload(name_or_path)
    origin = f"{name_or_path}.yaml"
    return parse_workload((resources.files("benchmarks") / "suites" / origin).read_text(encoding="utf-8"), origin)


def names() -> str:
    """The names that `load_suite` knows, for help texts."""
    return ", ".join(dict.fromkeys((*SUITES, *SHIPPED)))
