"""The report of benchmarks: what `run`, `host` and `first-call` found, result by result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.points import point
from benchmarks.results import FirstCallResult, HostResult, Provenance, ResultError, RunResult, groups_of
from tuner.display import problem_label
from tuner.report.bars import bars
from tuner.report.page import write_page
from tuner.report.sections import Section, section
from tuner.report.style import drawing_style

Result = RunResult | HostResult | FirstCallResult


def write_report(results: Sequence[Result], folder: Path) -> Path:
    """PNGs and the page in `folder`; the page's path."""
    return write_page("RMSNorm: benchmarks", [_section(number, result) for number, result in enumerate(results, start=1)], folder)


def _section(number: int, result: Result) -> Section:
    slug = f"{number}-{_slug(result.provenance)}"
    if isinstance(result, RunResult):
        title = f"GPU time on {result.provenance.device.name}, suite {Path(result.suite).stem}"
        points = [point(case) for case in result.cases if "tuned" in case.timings]
        if not points:
            raise ResultError(f"result {number}, {title}, has no times of `rmsnorm` to draw: run with the provider tuned")
        return section(f"{slug}-run", title, str(result.provenance), points)
    if isinstance(result, HostResult):
        title = f"Host time of a call, {result.rows}x{result.cols} bf16"
        return _bars(f"{slug}-host", title, result.provenance, groups_of(result.times_us), "µs")
    seconds = {way: {f"{state} caches": value.median for state, value in by_state.items()} for way, by_state in result.seconds.items()}
    title = f"First call of a new process, {problem_label(result.problem)}"
    return _bars(f"{slug}-first-call", title, result.provenance, {"": seconds}, "s")


def _bars(slug: str, title: str, provenance: Provenance, groups: dict[str, dict[str, dict[str, float]]], unit: str) -> Section:
    """A drawing for each group, by what its title adds; the board is in the line under it."""
    with drawing_style():
        drawings = [
            bars(f"{slug}-{number}", f"{title}, {addition}" if addition else title, str(provenance), values, unit)
            for number, (addition, values) in enumerate(groups.items(), start=1)
        ]
    return Section(slug, f"{title}, {provenance.device.name}", str(provenance), (), tuple(drawings))


def _slug(provenance: Provenance) -> str:
    return provenance.device.uid.lower().replace("_", "-")
