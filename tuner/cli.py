"""The command line `python -m tuner`: parses, calls, prints."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

# torch and triton take seconds to import: they are imported inside the commands that need them, so that --help is quick.
from tuner.workloads import OPS, SHIPPED, WorkloadError, load_workload
from tuning_db.model import DTYPES, Problem, bucket_rows
from tuning_db.store import DatabaseError, open_for_writing

if TYPE_CHECKING:
    from rich.console import Console

    from tuner.display import SweepResult
    from tuner.session import Session

INTERRUPTED = 130
DEFAULT_ARCH = "sm_90"
SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
EPILOG = "Exit codes: 0 all went well, 1 something failed, 2 wrong usage, 130 interrupted."


class Commands(click.Group):
    """Turns what a user can cure into one line on stderr, and Ctrl-C into exit code 130."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (DatabaseError, WorkloadError) as error:
            raise click.ClickException(str(error)) from error
        except ValueError as error:
            from kernels.settings import SettingsError

            if not isinstance(error, SettingsError):
                raise
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            context.exit(INTERRUPTED)


class Duration(click.ParamType):
    """`90s`, `10m` or `1h` as seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", str(value))
        if match is None:
            self.fail(f"{value!r} is no duration; write 90s, 10m or 1h", param, ctx)
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _each(check: Callable[[str], Any]) -> Callable[..., tuple[Any, ...]]:
    """A callback for repeatable options whose values may also be separated by commas."""

    def convert(_context: click.Context, _param: click.Parameter, values: Sequence[str]) -> tuple[Any, ...]:
        return tuple(check(part.strip()) for value in values for part in value.split(",") if part.strip())

    return convert


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise click.BadParameter(f"{text!r} is no positive whole number")
    return int(text)


def _dtype(text: str) -> str:
    name = SHORT_DTYPES.get(text, text)
    if name not in DTYPES:
        raise click.BadParameter(f"{text!r} is none of {', '.join(DTYPES)}")
    return name


def _op(text: str) -> str:
    if text not in OPS:
        raise click.BadParameter(f"{text!r} is none of {', '.join(OPS)}")
    return text


def _arch(text: str) -> str:
    from tuner.architectures import architectures

    if text not in architectures():
        raise click.BadParameter(f"{text!r} is none of {', '.join(architectures())}; a line in tuner/architectures.yaml adds it")
    return text


def _listed(*names: str, check: Callable[[str], Any], help: str) -> Callable[[Any], Any]:
    return click.option(*names, multiple=True, metavar="X,…", callback=_each(check), help=help)


db_option = click.option("--db", type=click.Path(dir_okay=False, path_type=Path), help="Database file instead of the usual one.")
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable JSON on stdout.")
rows_option = _listed("--rows", check=_positive, help="Only these numbers of rows.")
cols_option = _listed("--cols", check=_positive, help="Only these row lengths.")
dtype_option = _listed("--dtype", check=_dtype, help="Only these dtypes of x (bfloat16, float16, float32).")


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Find the fastest RMSNorm kernel per shape on this GPU, and look at what is known."""


@main.command(epilog=EPILOG)
@click.option("--workload", metavar="NAME|FILE", help=f"{', '.join(SHIPPED)} or a YAML file. Default: llm; quick without a GPU.")
@_listed("--op", check=_op, help="Only these ops.")
@dtype_option
@rows_option
@cols_option
@_listed("--arch", check=_arch, help="Compile for these (sm_90, gfx942, …) and record the model's picks instead of measuring.")
@click.option("--budget", type=Duration(), help="Stop after this time (90s, 10m, 1h), between two problems.")
@db_option
@click.option("--dry-run", is_flag=True, help="Say what would be done; touch no file.")
@click.option("--retune", is_flag=True, help="Also the problems that have records of today's kernels.")
@json_option
def sweep(
    workload: str | None,
    op: tuple[str, ...],
    dtype: tuple[str, ...],
    rows: tuple[int, ...],
    cols: tuple[int, ...],
    arch: tuple[str, ...],
    budget: float | None,
    db: Path | None,
    dry_run: bool,
    retune: bool,
    as_json: bool,
) -> None:
    """Measure every candidate on this GPU and record the winner per problem.

    Killed or interrupted, the same command goes on where it stopped. --rows and --cols without --workload make up the problems.
    """
    from kernels.device import current_device, has_gpu, interpreting
    from tuner import display
    from tuner.architectures import architectures
    from tuner.session import Session

    if interpreting():
        raise click.ClickException("TRITON_INTERPRET is set, and the interpreter's kernels can't be tuned: unset it")
    console = display.console(stderr=as_json)
    measures = has_gpu() and not arch
    names = arch or (DEFAULT_ARCH,)
    if not has_gpu():
        listed = ", ".join(names)
        display.message(console, f"No GPU here: compiling for {listed} and recording the model's picks. Run this on a GPU to measure.")
    problems = _problems(workload or ("llm" if measures else "quick"), bool(workload), op, dtype, rows, cols)
    path = _database(db)
    boards = [None] if measures else [architectures()[name] for name in names]
    sessions = [Session(board.device if board else current_device(), board, tuple(problems), path, retune, budget) for board in boards]
    if dry_run:
        for session in sessions:
            display.message(console, display.planned(session, session.plan()))
        return
    results = [_run(session, console) for session in sessions]
    if as_json:
        click.echo(display.sweep_json(results))


def _run(session: Session, console: Console) -> SweepResult:
    """One session from its first line to its table."""
    from tuner import display

    with open_for_writing(session.path) as store:
        todo = session.todo(store.records(session.device.uid))
        if not todo:
            display.message(console, display.nothing_to_do(session))
            return display.SweepResult(session, (), {}, len(session.problems), 0.0)
        display.message(console, display.beginning(session, len(todo)))
        progress = display.SweepProgress(console)
        started = time.monotonic()
        try:
            with progress:
                session.run(todo, store, sys.argv[1:], progress)
        except KeyboardInterrupt:
            display.message(console, display.interrupted(session, session.recorded(progress.finished, store)))
            raise click.exceptions.Exit(INTERRUPTED) from None
        result = display.SweepResult(
            session=session,
            finished=tuple(progress.finished),
            resources=session.resources(progress.finished, store),
            recorded=session.recorded(progress.finished, store),
            seconds=time.monotonic() - started,
        )
    display.print_result(console, result)
    return result


def _problems(
    workload: str, named: bool, op: Sequence[str], dtype: Sequence[str], rows: Sequence[int], cols: Sequence[int]
) -> list[Problem]:
    """The workload's problems that pass all filters, or, with rows and cols but no workload named, their combinations."""
    buckets = [bucket_rows(count) for count in rows]
    if rows and cols and not named:
        made = [
            Problem(name, kind, kind, kind, r, c)
            for name in op or ("rmsnorm",)
            for kind in dtype or ("bfloat16",)
            for c in cols
            for r in buckets
        ]
        return list(dict.fromkeys(made))
    wanted = {"op": op, "x_dtype": dtype, "rows": buckets, "cols": cols}
    problems = load_workload(workload)
    kept = [p for p in problems if all(getattr(p, name) in values for name, values in wanted.items() if values)]
    if not kept:
        asked = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in wanted.items() if values)
        raise click.UsageError(f"none of the {len(problems)} problems of workload {workload} has {asked}; give --rows and --cols only")
    return kept


def _database(db: Path | None) -> Path:
    """The file to write to, or to show: the one named, else the first writable one of the settings."""
    from kernels.settings import read_settings
    from tuner.session import is_writable

    databases = (db,) if db else read_settings().databases
    for path in databases:
        if db or is_writable(path):
            return path
    listed = ", ".join(map(str, databases))
    raise click.ClickException(f"none of {listed} can be written: name a file by RMSNORM_TUNING_DB or --db")
