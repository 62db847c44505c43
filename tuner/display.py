"""What the command line shows: progress while a sweep runs, tables, sentences."""

from __future__ import annotations

import json
import os
import statistics
import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kernels.settings import read_settings
from tuner.events import Event, Faulted, Finished, Started
from tuner.session import Plan, Session
from tuning_db.model import ANY_ROWS, NO_WEIGHT, Config, Problem, Record, Resources, to_dict

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
ROWS_SHOWN = 40
"""With more problems the table at the end shows groups."""
ETA_S = 600
"""Span of the problems' times that the remaining time is estimated from; they differ by a factor of ten."""


@dataclass(frozen=True)
class SweepResult:
    """How a session ended. recorded counts the problems that have records now; resources are those of the winners."""

    session: Session
    finished: tuple[Finished, ...]
    resources: dict[Problem, Resources]
    recorded: int
    seconds: float

    @property
    def records(self) -> list[Record]:
        """By problem, whichever station was quicker."""
        return sorted((one.record for one in self.finished if one.record), key=lambda record: record.problem)

    @property
    def load_bytes(self) -> dict[Problem, int]:
        """What a thread of each winner's binary loads at once, where that is known."""
        return {one.problem: one.load_bytes for one in self.finished if one.load_bytes is not None}


def console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False, markup=False, force_terminal=False if stderr else None)


def message(console: Console, text: str) -> None:
    """A sentence, wrapped on a terminal (or where COLUMNS says how wide it is), one line in a pipe. Paths are never broken."""
    if console.is_terminal or "COLUMNS" in os.environ:
        text = textwrap.fill(text, console.width, break_long_words=False, break_on_hyphens=False)
    console.print(text, soft_wrap=True)


class SweepProgress:
    """Shows a sweep's events: live on a terminal, a line per finished problem elsewhere."""

    def __init__(self, console: Console) -> None:
        self.finished: list[Finished] = []
        self._console = console
        self._total = 0
        self._now = self._last = Text()
        columns = (MofNCompleteColumn(), BarColumn(bar_width=None), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, expand=True, speed_estimate_period=ETA_S)
        self._task = self._bar.add_task("", total=None)
        self._live = Live(console=console, get_renderable=self._render, transient=True) if console.is_terminal else None

    def __enter__(self) -> SweepProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self._total = event.total
            self._bar.update(self._task, total=event.total, completed=event.done)
            compiled = f"  {event.compiled}/{event.binaries} binaries compiled" if event.binaries else ""
            self._now = Text(f"now  {problem_label(event.problem)}{compiled}", no_wrap=True, overflow="ellipsis")
            return
        if isinstance(event, Faulted):
            trial = event.trial
            self._print_line(trial.status.value.replace("_", " "), f"{problem_label(trial.problem)}  {trial.config}  {trial.error}")
            return
        self.finished.append(event)
        self._bar.update(self._task, completed=len(self.finished))
        subject, outcome = problem_label(event.problem), _outcome(event)
        self._last = Text(f"last {subject}  {outcome}", overflow="fold")
        if not self._live:
            self._print_line(f"[{len(self.finished):>{len(str(self._total))}}/{self._total}] {subject}", outcome)

    def _print_line(self, subject: str, text: str) -> None:
        gap = "  " if len(subject) + len(text) + 2 <= self._console.width else "\n    "
        self._console.print(f"{subject}{gap}{text}")
        self._console.file.flush()

    def _render(self) -> Group:
        return Group(self._bar.get_renderable(), self._now, self._last)


def print_result(console: Console, result: SweepResult) -> None:
    """The table of winners, and the sum of it all in sentences."""
    session, records = result.session, result.records
    if records:
        modelled = session.architecture is not None
        if len(records) <= ROWS_SHOWN:
            console.print(_modelled_rows(result) if modelled else _measured_rows(records))
        else:
            console.print(_modelled_groups(result) if modelled else _measured_groups(records))
    trials = sum(one.trials for one in result.finished)
    failed = sum(one.failed for one in result.finished)
    done = f"{count(len(result.finished), 'problem')} in {duration(result.seconds)}"
    message(console, f"{done}; {failed} of {count(trials, 'trial')} failed.")
    without = len(result.finished) - len(records)
    if without:
        message(console, f"{count(without, 'problem')} without a record; `status` counts the failures.")
    message(console, f"{result.recorded} of {len(session.problems)} problems are recorded for {session.device.uid}")
    message(console, f"in {session.path}.")
    if session.path not in read_settings().databases:
        message(console, "rmsnorm reads that file if RMSNORM_TUNING_DB names it.")
    if result.recorded + without < len(session.problems):
        message(console, "The time is up. The same command goes on from there.")


def sweep_json(results: Sequence[SweepResult]) -> str:
    """One object: per device a summary, and the records of this run."""
    sweeps = [
        {
            "device": to_dict(result.session.device),
            "device_uid": result.session.device.uid,
            "source": result.session.source.value,
            "database": str(result.session.path),
            "problems": len(result.session.problems),
            "recorded": result.recorded,
            "finished": len(result.finished),
            "trials": sum(one.trials for one in result.finished),
            "failed": sum(one.failed for one in result.finished),
            "seconds": round(result.seconds, 3),
            "heuristic_ratio": _mean(record.heuristic_us and record.heuristic_us / record.median_us for record in result.records),
            "torch_ratio": _mean(record.torch_us and record.torch_us / record.median_us for record in result.records),
            "copy_fraction": _mean(record.copy_fraction for record in result.records),
            "records": [{**to_dict(record), "load_bytes": result.load_bytes.get(record.problem)} for record in result.records],
        }
        for result in results
    ]
    return json.dumps({"sweeps": sweeps}, indent=2, allow_nan=False)


def beginning(session: Session, todo: int) -> str:
    board = f"{session.device.name} ({session.device.uid})"
    skipped = len(session.problems) - todo
    rest = f"; {count(skipped, 'problem')} recorded before" if skipped else ""
    where = f" on {session.board.place}" if session.board.place else ""
    return f"{'Compiling' if session.architecture else 'Tuning'} {count(todo, 'problem')} for {board}{where}{rest}."


def nothing_to_do(session: Session) -> str:
    if session.retry:
        arch = session.device.arch
        return f"Nothing to try again: by {session.path} no config is left out on {arch}, or not for one of the problems asked for."
    total = len(session.problems)
    known = f"{total} of {count(total, 'problem')} have records of today's kernels on {session.device.uid} in {session.path}"
    return f"Nothing to do: {known}. Use --retune to {'model' if session.architecture else 'measure'} again."


def retrying(configs: Collection[Config], arch: str) -> str:
    return f"Trying {count(len(configs), 'config')} again that crashed or hung on {arch}: {_names(configs)}."


def retried(passed: Collection[Config], barred: Collection[Config]) -> str:
    """What became of the configs that were tried again."""
    sentences = []
    if passed:
        sentences.append(f"Passed, and left out no longer: {_names(passed)}. `python -m tuner sweep --retune` races them everywhere.")
    if barred:
        sentences.append(f"Still left out: {_names(barred)}.")
    return " ".join(sentences)


def _names(configs: Collection[Config]) -> str:
    return ", ".join(sorted(map(str, configs)))


def interrupted(session: Session, recorded: int) -> str:
    total = len(session.problems)
    return f"Interrupted: {recorded} of {count(total, 'problem')} are recorded in {session.path}. The same command goes on from there."


def planned(session: Session, plan: Plan) -> str:
    verb = "compile and model" if session.architecture else "measure"
    skipped = len(session.problems) - plan.problems
    at_most = "at most " if session.architecture else ""
    work = f"{count(plan.problems, 'problem')}, {plan.candidates} candidates, {at_most}{plan.binaries} binaries"
    target = f"{session.device.name} ({session.device.uid})"
    return f"Would {verb} {work} for {target}; skip {skipped} that are recorded in {session.path}. Nothing was written."


def problem_label(problem: Problem) -> str:
    """`4096x8192 bf16` (`anyx8192` for any number of rows), then what is not usual: another weight dtype, a layout, the backward."""
    rows = "any" if problem.rows == ANY_ROWS else problem.rows
    label = f"{rows}x{problem.cols} {_kind_label(problem)}"
    return label if problem.inner_rows == 1 else f"{label}/{problem.inner_rows}"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def table(title: str, *columns: str, right: Iterable[str] = ()) -> Table:
    """An empty table whose columns named in `right` hold numbers, and which no terminal is too narrow for."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    numbers = set(right)
    for name in columns:
        if name in numbers:
            made.add_column(name, justify="right", no_wrap=True, min_width=len(name))
        else:
            made.add_column(name, overflow="fold")
    return made


def microseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"


def fraction(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _kind_label(problem: Problem) -> str:
    weight = ""
    if problem.w_dtype == NO_WEIGHT:
        weight = " no weight"
    elif problem.w_dtype != problem.x_dtype:
        weight = f" w={SHORT[problem.w_dtype]}"
    result = "" if problem.y_dtype == problem.x_dtype else f" y={SHORT[problem.y_dtype]}"
    layout = "" if problem.layout == "contiguous" else f" {problem.layout}"
    op = (" add" if problem.adds else "") + (" backward" if problem.is_backward else "")
    return f"{SHORT[problem.x_dtype]}{weight}{result}{layout}{op}"


def _outcome(event: Finished) -> str:
    record = event.record
    if event.note:
        return event.note
    if record is None:
        return f"no config got through, {event.failed} of {event.trials} failed"
    parts = [str(record.config), f"{microseconds(record.median_us)} µs", f"{record.copy_fraction:.2f} of copy"]
    if record.torch_us:
        parts.append(f"{record.torch_us / record.median_us:.2f}× PyTorch")
    return "  ".join(parts)


def _measured_rows(records: Sequence[Record]) -> Table:
    numbers = ("µs", "of copy", "heuristic", "PyTorch")
    made = table("Winners, and how many times faster than heuristic and PyTorch", "problem", "config", *numbers, right=numbers)
    for record in records:
        made.add_row(problem_label(record.problem), str(record.config), microseconds(record.median_us), *_gains([record]))
    made.add_section()
    made.add_row("geometric mean", "", "", *_gains(records))
    return made


def _measured_groups(records: Sequence[Record]) -> Table:
    numbers = ("problems", "of copy", "heuristic", "PyTorch")
    title = "Winners by geometric mean: of copy speed, and times faster than heuristic and PyTorch"
    made = table(title, "dtype and layout", "variant", *numbers, right=numbers)
    for kind, group in _grouped(records).items():
        made.add_row(*kind, str(len(group)), *_gains(group))
    made.add_section()
    made.add_row("all", "", str(len(records)), *_gains(records))
    return made


def _modelled_rows(result: SweepResult) -> Table:
    numbers = ("registers", "spills", "shared", "load", "µs")
    made = table("The model's picks; spills, shared memory, a thread's load in bytes", "problem", "config", *numbers, right=numbers)
    for record in result.records:
        taken = result.resources.get(record.problem)
        own = (taken.registers, taken.spill_bytes, taken.shared_bytes) if taken else ("", "", "")
        load = result.load_bytes.get(record.problem, "")
        made.add_row(problem_label(record.problem), str(record.config), *map(str, (*own, load)), microseconds(record.median_us))
    return made


def _modelled_groups(result: SweepResult) -> Table:
    numbers = ("problems", "registers", "spills", "shared", "load", "µs")
    title = "The model's picks: most registers, spills and shared memory (bytes), narrowest load, geometric mean of times"
    made = table(title, "dtype and layout", "variant", *numbers, right=numbers)
    for kind, group in _grouped(result.records).items():
        taken = [result.resources[record.problem] for record in group if record.problem in result.resources]
        most = [max((getattr(one, name) for one in taken), default="") for name in ("registers", "spill_bytes", "shared_bytes")]
        load = min((result.load_bytes[r.problem] for r in group if r.problem in result.load_bytes), default="")
        made.add_row(*kind, str(len(group)), *map(str, (*most, load)), microseconds(_mean(record.median_us for record in group)))
    return made


def _grouped(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((_kind_label(record.problem), record.config.variant), []).append(record)
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))))


def _gains(records: Sequence[Record]) -> tuple[str, str, str]:
    return (
        fraction(_mean(record.copy_fraction for record in records)),
        ratio(_mean(record.heuristic_us and record.heuristic_us / record.median_us for record in records)),
        ratio(_mean(record.torch_us and record.torch_us / record.median_us for record in records)),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """The geometric mean of the values that there are, None without any."""
    known = [value for value in values if value]
    return statistics.geometric_mean(known) if known else None
