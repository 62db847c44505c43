"""From a benchmark's case to what reports and summaries are made of."""

from __future__ import annotations

from benchmarks.results import CaseResult
from tuner.report.points import Point


def point(case: CaseResult) -> Point:
    us = {name: timing.us.median for name, timing in case.timings.items()}
    return Point(case.problem, {**us, "copy": case.copy_us}, case.configs.get("tuned", ""))
