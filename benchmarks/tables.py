"""What the commands print: tables for a terminal of any width, and Markdown for the summary of a CI job."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console

from benchmarks.points import point
from benchmarks.results import ONE_SHAPE, CaseResult, Interval, RunResult, groups_of
from benchmarks.verdict import Change, Judged, Verdict
from tuner.display import count, microseconds, problem_label, table

CELL_WIDTH = 13
"""`99.99 / 0.98` and a space."""
FIXED_WIDTH = 36
"""Of the columns that every part of a wide table repeats: problem and copy."""


def print_run(console: Console, result: RunResult) -> None:
    """µs / fraction of copy by problem and provider; where they don't fit side by side, in several tables."""
    names = list(result.calls)
    for part in fitting(names, console.width):
        made = table("µs / fraction of the reference copy", "problem", "copy", *part, right=("copy", *part))
        for case in result.cases:
            made.add_row(problem_label(case.problem), microseconds(case.copy_us), *(cell(case, name) for name in part))
        made.add_section()
        made.add_row("geometric mean", "", *(_mean_fraction(result.cases, name) for name in part))
        console.print(made)


def fitting(names: Sequence[str], width: int) -> list[list[str]]:
    """The names in parts that fit beside problem and copy in `width` characters, at least one a part."""
    size = max(1, (width - FIXED_WIDTH) // CELL_WIDTH)
    return [list(names[start : start + size]) for start in range(0, len(names), size)]


def cell(case: CaseResult, name: str) -> str:
    """A provider's figures on a case, or what it has instead."""
    timing = case.timings.get(name)
    if timing:
        return f"{microseconds(timing.us.median)} / {timing.fraction.median:.2f}"
    return "wrong" if name in case.wrong else "refuses" if name in case.refused else ""


def versus_best(cases: Iterable[CaseResult]) -> str:
    """How ours stands to the best other provider of each problem: the geometric mean, and the problem where it stands worst."""
    found = [(best[1], best[0], problem_label(case.problem)) for case in cases if (best := point(case).best_other())]
    if not found:
        return ""
    mean, (least, name, label) = statistics.geometric_mean(ratio for ratio, *_ in found), min(found)
    over = f"{count(len(found), 'problem')}, at least {least:.2f} times ({label}, {name})"
    return f"rmsnorm is {mean:.2f} times as fast as the best other provider in the geometric mean over {over}."


def best_cells(case: CaseResult) -> list[str]:
    """The best other provider of a problem, and how many times as fast as it ours is."""
    best = point(case).best_other()
    return [best[0], f"{best[1]:.2f}"] if best else ["", ""]


def notes(cases: Iterable[CaseResult]) -> list[str]:
    """A line for each reason that keeps a provider from being timed, with the number of problems that it concerns."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for case in cases:
        for what, reasons in (("refuses", case.refused), ("is wrong on", case.wrong)):
            for name, reason in reasons.items():
                found.setdefault((name, what, reason), []).append(problem_label(case.problem))
    return [f"{name} {what} {shortened(labels)}: {reason}" for (name, what, reason), labels in found.items()]


def shortened(labels: Sequence[str]) -> str:
    return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")


def run_markdown(result: RunResult) -> str:
    rows = [
        [problem_label(case.problem), microseconds(case.copy_us), *(cell(case, name) for name in result.calls), *best_cells(case)]
        for case in result.cases
    ]
    head = ["problem", "copy", *result.calls, "best other", "× best other"]
    lines = [f"{result.provenance}; µs / fraction of the reference copy", "", versus_best(result.cases), "", *markdown(head, rows)]
    lines += ["", *(f"- {note}" for note in notes(result.cases))]
    return "\n".join(lines) + "\n"


def print_judged(console: Console, judged: Sequence[Judged], title: str) -> None:
    """A line for each case; those that failed last, where they are seen."""
    numbers = ("µs", "of copy", "change %", "interval")
    made = table(title, "problem", *numbers, "verdict", right=numbers)
    for one in sorted(judged, key=lambda one: ORDER.index(one.verdict)):
        made.add_row(*judged_row(one))
    console.print(made)


ORDER = (Verdict.PASS, Verdict.IMPROVED, Verdict.NO_BASELINE, Verdict.INCONCLUSIVE, Verdict.REGRESSION)


def judged_row(one: Judged) -> list[str]:
    """Problem, µs, fraction of copy, change of time, its interval, verdict with what there is to say."""
    us, fraction = (microseconds(one.now.us.median), f"{one.now.fraction.median:.2f}") if one.now else ("", "")
    change, interval = ("", "") if one.change is None else (percent(one.change.ratio.median), interval_percent(one.change.ratio))
    said = one.verdict.value + (f": {one.note}" if one.note else "") + (f", again {percent(one.again.ratio.median)}" if one.again else "")
    return [problem_label(one.problem), us, fraction, change, interval, said]


def percent(ratio: float) -> str:
    """`+3.1` of 1.031: so many percent more time."""
    return f"{(ratio - 1) * 100:+.1f}"


def interval_percent(interval: Interval) -> str:
    return f"{percent(interval.low)}…{percent(interval.high)}"


def summary(judged: Sequence[Judged]) -> str:
    """One sentence: how many of which verdict, the mean change, and the names of what is not well."""
    counts = Counter(one.verdict for one in judged)
    told = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in reversed(ORDER) if counts[verdict])
    changes = [one.change for one in judged if one.change]
    mean = f"; geometric mean of times {percent(geometric_mean(changes))} %" if changes else ""
    bad = [problem_label(one.problem) for one in judged if one.verdict in (Verdict.REGRESSION, Verdict.INCONCLUSIVE)]
    return f"{told}{mean}" + (f". Look at {', '.join(bad)}" if bad else "") + "."


def geometric_mean(changes: Iterable[Change]) -> float:
    return statistics.geometric_mean(change.ratio.median for change in changes)


def judged_markdown(judged: Sequence[Judged], title: str) -> str:
    """For a CI job's summary: the sentence first, then the cases, bad ones first."""
    rows = [judged_row(one) for one in sorted(judged, key=lambda one: -ORDER.index(one.verdict))]
    head = ["problem", "µs", "of copy", "change %", "interval", "verdict"]
    return "\n".join([f"**{title}**", "", summary(judged), "", *markdown(head, rows)]) + "\n"


def print_host(console: Console, times_us: Mapping[str, Mapping[str, float]], base: str) -> None:
    """µs of host time by provider and way, and the ratio to `base` called the same way, or else on one shape."""
    units = times_us.get(base, {})
    for title, group in groups_of(times_us).items():
        ways = list(dict.fromkeys(way for times in group.values() for way in times))
        made = table(f"host time of a call, µs / × {base}, {title}", "call", *ways, right=ways)
        for name, times in group.items():
            made.add_row(name, *(host_cell(times.get(way), units.get(way, units.get(ONE_SHAPE))) for way in ways))
        console.print(made)


def host_cell(value: float | None, unit: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" + (f" / {value / unit:.2f}" if unit else "")


def print_first_calls(console: Console, seconds: Mapping[str, Mapping[str, Interval]]) -> None:
    states = list(next(iter(seconds.values())))
    titles = [f"{state} caches, s" for state in states]
    made = table("first call of a new process", "way", *titles, right=titles)
    for way, by_state in seconds.items():
        made.add_row(way, *(f"{by_state[state].median:.2f}" for state in states))
    console.print(made)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, the first column left, the others right."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(line)} |" for line in (head, marks, *rows)]


def _mean_fraction(cases: Iterable[CaseResult], name: str) -> str:
    known = [case.timings[name].fraction.median for case in cases if name in case.timings]
    return f"{statistics.geometric_mean(known):.2f}" if known else ""
