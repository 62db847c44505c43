"""The command line `python -m tuner`: parses, calls, prints."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

# torch and triton take seconds to import: they are imported inside the commands that need them, so that --help is quick.
from tuner import options
from tuner.failure import Failure
from tuner.selection import Filter, shard_of
from tuner.workloads import SHIPPED, WorkloadError, load_workload
from tuning_db.errors import DatabaseError
from tuning_db.lookup import RecordIndex
from tuning_db.model import (
    ADD_BACKWARD,
    ADD_FORWARD,
    FORWARD,
    LAYOUTS,
    LAYOUTS_OF,
    NO_WEIGHT,
    OPS,
    Config,
    Problem,
    Source,
    bucket_rows,
    to_dict,
)
from tuning_db.store import Store, open_for_reading, open_for_writing

if TYPE_CHECKING:
    from rich.console import Console

    from tuner.boards import Board
    from tuner.display import SweepResult
    from tuner.session import Session

INTERRUPTED = 130
MISSING = {
    "triton": "Triton, which is not installed here; it comes for Linux alone",
    "matplotlib": "matplotlib, which is not installed here: `pip install matplotlib`",
    "ray": "Ray, which is not installed here: `pip install ray`",
}
DEFAULT_ARCH = "sm_90"
SQLITE_MAGIC = b"SQLite format 3\0"
EPILOG = "Exit codes: 0 all went well, 1 something failed, 2 wrong usage, 130 interrupted."


class Commands(click.Group):
    """Turns what a user can cure into one line on stderr, and Ctrl-C into exit code 130."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except click.UsageError as error:
            error.ctx = None  # else click prints three lines of usage before it
            raise
        except (DatabaseError, Failure, WorkloadError) as error:
            raise click.ClickException(str(error)) from error
        except ModuleNotFoundError as error:
            if error.name not in MISSING:
                raise
            raise click.ClickException(f"this command needs {MISSING[error.name]}") from error
        except ValueError as error:
            from kernels.settings import SettingsError

            if not isinstance(error, SettingsError):
                raise
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            context.exit(INTERRUPTED)


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Find the fastest RMSNorm kernel per shape on this GPU, and look at what is known."""


@main.command(epilog=EPILOG, short_help="Tune this GPU, or compile without one.")
@click.option("--workload", metavar="NAME|FILE", help=f"{', '.join(SHIPPED)} or a YAML file. Default: llm; quick without a GPU.")
@options.several("--op", options.op, f"Only these ops: {', '.join(OPS)}.")
@options.dtype_option
@options.rows_option
@options.cols_option
@options.several("--arch", options.arch, "Compile for these (sm_90 gfx942 …) and record the model's picks instead of measuring.")
@click.argument("more_arch", nargs=-1, metavar="", callback=options.each(options.arch))
@options.several("--gpus", options.gpu, "GPUs to tune on at once, by number, or `all`. Default: all of the kind of GPU 0.")
@click.option("--ray", metavar="auto|ADDRESS", help="Tune on the GPUs of this Ray cluster instead.")
@click.option("--shard", metavar="I/N", callback=options.one(options.shard), help="Only part I of the problems in N equal parts.")
@click.option("--budget", type=options.Duration(), help="Stop after this time (90s, 10m, 1h), between two problems.")
@options.db_option
@click.option("--dry-run", is_flag=True, help="Say what would be done; touch no file.")
@click.option("--retune", is_flag=True, help="Also the problems that have records of today's kernels.")
@click.option("--retry", is_flag=True, help="Only the problems that a config crashed or hung on, with that config again.")
@options.json_option
def sweep(
    workload: str | None,
    op: tuple[str, ...],
    dtype: tuple[str, ...],
    rows: tuple[int, ...],
    cols: tuple[int, ...],
    arch: tuple[str, ...],
    more_arch: tuple[str, ...],
    gpus: tuple[int | None, ...],
    ray: str | None,
    shard: tuple[int, int] | None,
    budget: float | None,
    db: Path | None,
    dry_run: bool,
    retune: bool,
    retry: bool,
    as_json: bool,
) -> None:
    """Measure every candidate on the GPUs here and record the winner per problem.

    Killed or interrupted, the same command goes on where it stopped. --rows and --cols without --workload make up the problems.
    """
    if more_arch and not arch:
        raise click.UsageError(f"{' '.join(more_arch)} stands alone; write --arch {' '.join(more_arch)}")
    arch = tuple(dict.fromkeys((*arch, *more_arch)))
    if gpus and (arch or ray):
        raise click.UsageError(f"--gpus names GPUs of this host; leave it out with {'--arch' if arch else '--ray'}")
    excluded = {"--workload": workload, "--arch": arch, "--ray": ray, "--shard": shard, "--retune": retune}
    if retry and any(excluded.values()):
        unfit = " and ".join(name for name, value in excluded.items() if value)
        raise click.UsageError(f"--retry measures, on GPUs of this host, what a config crashed or hung on; leave out {unfit}")
    from kernels.driver import first_nvidia_device
    from kernels.settings import interpreting
    from tuner import display
    from tuner.boards import Board
    from tuner.session import Session

    if interpreting():
        raise click.ClickException("TRITON_INTERPRET is set, and the interpreter's kernels can't be tuned: unset it")
    console = display.console(stderr=as_json)
    made_up = bool(rows and cols and not workload)
    wanted = Filter(op, dtype, rows, cols)
    path = _database(db)

    def session(board: Board) -> Session:
        if retry:
            return Session(board, tuple(filter(wanted.passes, _faulty(path, board.device.arch))), path, True, budget, retry=True)
        problems = _problems(workload or ("quick" if board.architecture else "llm"), made_up, wanted)
        return Session(board, tuple(shard_of(problems, *shard) if shard else problems), path, retune, budget)

    here = None if arch or retune or retry or dry_run or gpus or ray else first_nvidia_device()
    if here is not None:  # what is finished is told without torch, which takes seconds to import
        finished = session(Board(here))
        if finished.is_done():
            _report([_nothing_to_do(finished, console)], as_json)
            return

    if retry:
        from kernels.device import has_gpu

        if not has_gpu():
            raise click.ClickException("there is no GPU here, and --retry measures: run it on the board that they crashed or hung on")
    with ExitStack() as stack:
        sessions = [session(board) for board in _boards(arch, gpus, ray, stack, console)]
        if not dry_run:
            _report([_run(session, console) for session in sessions], as_json)
            return
        plans = [session.plan() for session in sessions]
    for planned, plan in zip(sessions, plans, strict=True):
        display.message(console, display.planned(planned, plan))
    if as_json:
        click.echo(json.dumps([{"device_uid": s.device.uid, **vars(plan)} for s, plan in zip(sessions, plans, strict=True)], indent=2))


@main.command(epilog=EPILOG, short_help="Coverage per device, sweeps, failures.")
@options.db_option
def status(db: Path | None) -> None:
    """What the database covers: problems per device, op and dtype, sweeps, failed trials."""
    from tuner import display, listings

    with open_for_reading(_database(db)) as store:
        listings.print_status(display.console(), store)


@main.command(epilog=EPILOG, short_help="Records as a table.")
@click.option("--device", metavar="UID", help="Only this device, for example sm_90-132sm-50MB-227KB-3352GBs.")
@options.dtype_option
@options.cols_option
@options.rows_option
@click.option("--source", type=click.Choice([source.value for source in Source]), help="Only measured or only modelled records.")
@options.db_option
@options.json_option
def show(
    device: str | None,
    dtype: tuple[str, ...],
    cols: tuple[int, ...],
    rows: tuple[int, ...],
    source: str | None,
    db: Path | None,
    as_json: bool,
) -> None:
    """The database's records as a table."""
    with open_for_reading(_database(db)) as store:
        known = [record for record in store.records(device) if source in (None, record.source.value)]
        imported = set(store.records_without_trials())
    records = [record for record in known if Filter((), dtype, rows, cols).passes(record.problem)]
    if as_json:
        click.echo(json.dumps([{**to_dict(record), "has_trials": record not in imported} for record in records], indent=2))
        return
    from tuner import display, listings

    listings.print_records(display.console(), records, imported)


@main.command(epilog=EPILOG, short_help="Which config would run, and why.")
@click.argument("rows", type=click.IntRange(min=1))
@click.argument("cols", type=click.IntRange(min=1))
@click.option("--op", default=FORWARD, show_default=True, type=click.Choice(OPS))
@click.option("--dtype", default="bfloat16", show_default=True, callback=options.one(options.dtype), help="Of x, or the residual stream.")
@click.option("--weight", default="same", show_default=True, help="Dtype of the weight: `same` as x, `none` for no weight, or its name.")
@click.option("--y-dtype", default="same", show_default=True, help="Of y, with the add ops.")
@click.option("--layout", type=click.Choice(LAYOUTS), default="contiguous", show_default=True)
@click.option("--inner-rows", type=click.IntRange(min=1), help="Rows whose elements interleave; with layout strided_axis.")
@click.option("--arch", callback=options.one(options.arch), help="For the usual board of this architecture, not the GPU here.")
@options.json_option
def explain(
    rows: int,
    cols: int,
    op: str,
    dtype: str,
    weight: str,
    y_dtype: str,
    layout: str,
    inner_rows: int | None,
    arch: str | None,
    as_json: bool,
) -> None:
    """What rmsnorm, add_rmsnorm or a backward would run for ROWS x COLS, and on what evidence."""
    if (inner_rows is not None) != (layout == "strided_axis"):
        raise click.UsageError("--inner-rows goes with --layout strided_axis, and that needs it")
    if inner_rows is not None and rows % inner_rows:
        raise click.UsageError(f"--inner-rows {inner_rows} does not divide {rows} rows; name a divisor")
    if layout not in LAYOUTS_OF[op]:
        served = " or ".join(LAYOUTS_OF[op])
        raise click.UsageError(f"--op {op} goes with --layout {served}: other layouts are copied to it first")
    if y_dtype != "same" and op not in (ADD_FORWARD, ADD_BACKWARD):
        raise click.UsageError(f"--y-dtype goes with --op {ADD_FORWARD} or {ADD_BACKWARD}: of {op} y has x's dtype")
    from kernels.device import current_device, has_gpu
    from kernels.settings import read_settings
    from tuner import display, listings
    from tuner.architectures import architectures
    from tuner.explain import explain as asked

    w_dtype = dtype if weight == "same" else weight if weight == NO_WEIGHT else options.dtype(weight)
    y_dtype = dtype if y_dtype == "same" else options.dtype(y_dtype)
    problem = Problem(op, dtype, w_dtype, y_dtype, bucket_rows(rows), cols, layout, bucket_rows(inner_rows or 1))
    assumed = bool(arch) or not has_gpu()
    explanation = asked(problem, architectures()[arch or DEFAULT_ARCH].device if assumed else current_device())
    if as_json:
        click.echo(json.dumps({"assumed_device": assumed, **explanation.to_dict()}, indent=2))
    else:
        listings.print_explanation(display.console(), explanation, assumed, read_settings().backend)


@main.command(epilog=EPILOG, short_help="What unmeasured picks lose.")
@options.dtype_option
@options.db_option
@options.json_option
def regret(dtype: tuple[str, ...], db: Path | None, as_json: bool) -> None:
    """What the picks of heuristic, nearest, model and batch_invariant lose against the fastest config of the same race.

    Needs a database with the trials of a sweep on a GPU, and no GPU. The nearest neighbour is looked up without the problem's own record.
    """
    from tuner import display, regret_tables
    from tuner.regret import regrets

    wanted = Filter((), dtype)
    with open_for_reading(_database(db)) as store:
        found = [(device, regrets(store, device, wanted.passes)) for device in store.devices()]
        results = [(device, cells) for device, cells in found if cells]
        if not results:
            having = f" with {wanted}" if str(wanted) else ""
            raise click.ClickException(f"{store.path} has no trials of a sweep on a GPU{having}: sweep, or name another file by --db")
    if as_json:
        click.echo(regret_tables.regret_json(results))
        return
    for device, cells in results:
        regret_tables.print_regret(display.console(), device, cells)


@main.command(epilog=EPILOG, short_help="The few configs that do for all.")
@click.option("--slack", type=click.FloatRange(min=0), default=2, show_default=True, help="How many % slower than the fastest will do.")
@options.several("--op", options.op, f"Only these ops: {', '.join(OPS)}.")
@options.dtype_option
@options.db_option
@options.json_option
def distil(slack: float, op: tuple[str, ...], dtype: tuple[str, ...], db: Path | None, as_json: bool) -> None:
    """The fewest configs with which every measured problem stays near its fastest, over all devices of the database.

    Needs a database with the trials of a sweep on a GPU, and no GPU. `import` joins the databases of several boards.
    """
    from tuner import display, distil_tables
    from tuner.distil import cover, near_best

    wanted = Filter(op, dtype)
    with open_for_reading(_database(db)) as store:
        found = [near_best(device, store.trials(device.uid), slack / 100) for device in store.devices()]
        near = {case: configs for cases in found for case, configs in cases.items() if wanted.passes(case[1])}
        if not near:
            having = f" with {wanted}" if str(wanted) else ""
            raise click.ClickException(f"{store.path} has no trials of a sweep on a GPU{having}: sweep, or name another file by --db")
    chosen = cover(near)
    if as_json:
        click.echo(distil_tables.cover_json(near, chosen, slack / 100))
    else:
        distil_tables.print_cover(display.console(), near, chosen, slack / 100)


@main.command(epilog=EPILOG, short_help="Measure records again on this GPU.")
@click.option("--sample", type=click.IntRange(min=1), default=40, show_default=True, help="Measure so many of them, the same each time.")
@click.option("--all", "everything", is_flag=True, help="Measure all of them.")
@click.option("--fix", is_flag=True, help="Tune those that no longer win anew.")
@options.several("--op", options.op, f"Only these ops: {', '.join(OPS)}.")
@options.dtype_option
@options.rows_option
@options.cols_option
@options.db_option
@options.json_option
def verify(
    sample: int,
    everything: bool,
    fix: bool,
    op: tuple[str, ...],
    dtype: tuple[str, ...],
    rows: tuple[int, ...],
    cols: tuple[int, ...],
    db: Path | None,
    as_json: bool,
) -> None:
    """Whether this GPU's records still win: each races again against the best of its sweep, the model's pick and the heuristic's.

    Checks the records that rmsnorm would use, or those of --db. Exit code 1 if one is more than 1 % slower than the fastest and is
    not tuned anew.
    """
    from kernels.device import describe, has_gpu
    from kernels.dispatch import record_index
    from tuner import display
    from tuner.boards import Board
    from tuner.recheck import race_again, records_in_use, sampled
    from tuner.recheck_tables import print_rechecks, recheck_json
    from tuner.session import Session

    if not has_gpu():
        raise click.ClickException("there is no GPU here, and verify measures: run it on the board that the records are of")
    device, path, wanted = describe(0), _database(db), Filter(op, dtype, rows, cols)
    trials = []
    if path.exists():
        with open_for_reading(path) as store:
            trials = store.trials(device.uid)
            layers = [(str(path), [device], store.records(device.uid))]
    elif db:
        raise click.ClickException(f"{db} does not exist: name a database that a sweep wrote")
    records = records_in_use(RecordIndex(layers) if db else record_index(device.arch), device, wanted.passes)
    if not records:
        raise click.ClickException(f"no measured record of {device.uid}{f' with {wanted}' if str(wanted) else ''}: sweep first")
    records = records if everything else sampled(records, sample)
    console = display.console(stderr=as_json)
    display.message(console, f"Measuring {display.count(len(records), 'record')} of {device.name} ({device.uid}) again.")
    board = Board(device, gpus=(0,))
    with display.SweepProgress(console) as progress:
        checked = race_again(records, trials, board, progress)
    print_rechecks(console, device, checked)
    if as_json:
        click.echo(recheck_json(device, checked))
    fallen = tuple(one.record.problem for one in checked if not one.holds)
    if fallen and fix:
        _run(Session(board, fallen, path, True, None), console)
    raise click.exceptions.Exit(1 if fallen and not fix else 0)


@main.command(epilog=EPILOG, short_help="Records as JSON Lines.")
@click.option("--arch", help="Only records of this architecture.")
@click.option("--output", type=options.path, help="Write to this file instead of stdout.")
@options.db_option
def export(arch: str | None, output: Path | None, db: Path | None) -> None:
    """The database's records as JSON Lines: what ships, travels and is reviewed."""
    with open_for_reading(_database(db)) as store:
        text = store.export(arch)
    if not text:
        raise click.ClickException(f"{store.path} has no records{f' for {arch}' if arch else ''}: sweep, or name another file by --db")
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"can't write {output}: {error.strerror}") from error


@main.command(epilog=EPILOG, short_help="Records as figures and a page.")
@click.option("--arch", help="Only boards of this architecture.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default="report", show_default=True, help="Folder to write to.")
@options.db_option
def report(arch: str | None, output: Path, db: Path | None) -> None:
    """Draw the records of the databases, and those that ship: PNGs, and one page that needs no network.

    Where a database has the trials of a sweep, also what heuristic, nearest neighbour, model and batch_invariant lose to the fastest.
    """
    from kernels.settings import read_settings
    from tuner.report.records import gathered, gathered_regrets, write_report

    paths = [db] if db else [path for path in read_settings().databases if os.path.exists(path)]
    try:
        click.echo(f"{write_report(gathered(paths, arch, shipped=db is None), gathered_regrets(paths, arch), output)}")
    except OSError as error:
        raise click.ClickException(f"can't write to {output}: {error.strerror}") from error


@main.command("import", epilog=EPILOG, short_help="Take in JSON Lines.")
@click.argument("files", nargs=-1, required=True, type=options.existing_file)
@options.db_option
def import_files(files: tuple[Path, ...], db: Path | None) -> None:
    """Take in exported JSON Lines: records, which yield to those that have trials here."""
    with open_for_writing(_database(db)) as store:
        for file in files:
            content = file.read_bytes()
            if content.startswith(SQLITE_MAGIC):
                raise click.ClickException(f"{file} is a database: `python -m tuner merge {file}` takes it in with its trials")
            try:
                used = store.import_jsonl(content.decode("utf-8"), origin=str(file))
            except UnicodeDecodeError as error:
                raise click.ClickException(f"{file} is no JSON Lines: {error}") from error
            click.echo(f"{file}: {used} records taken into {store.path}")


@main.command(epilog=EPILOG, short_help="Bring databases together.")
@click.argument("files", nargs=-1, required=True, type=options.existing_file)
@click.option("--into", type=options.path, help="This database file instead of the usual one; it is created if need be.")
def merge(files: tuple[Path, ...], into: Path | None) -> None:
    """Take other databases in, with all their trials, and derive the records anew.

    The result is the same in whatever order the files come, and however often. Where one can't be read, none is taken in.
    """
    from tuner import display, listings

    with open_for_writing(_database(into)) as store:
        merged = store.merge(*files)
        listings.print_merged(display.console(), store, merged)


@main.command(epilog=EPILOG, short_help="GPUs and devices that are known.")
def devices() -> None:
    """The GPUs here, the devices in the databases, the architectures that can be compiled for."""
    from kernels.device import describe, gpu_count
    from kernels.settings import read_settings
    from tuner import display, listings

    with ExitStack() as stack:
        stores = [stack.enter_context(open_for_reading(path)) for path in read_settings().databases if os.path.exists(path)]
        listings.print_devices(display.console(), [describe(index) for index in range(gpu_count())], stores)


@main.command(epilog=EPILOG, short_help="What is wrong with this machine.")
def doctor() -> None:
    """Check GPU, versions, databases, packages and environment; exit code 1 if something needs a cure."""
    from tuner.doctor import examine

    ill = False
    for finding in examine():
        click.echo(f"{'PROBLEM' if finding.cure else 'ok':8}{finding.subject:9}{finding.text}")
        if finding.cure:
            click.echo(f"{'':17}cure: {finding.cure}")
            ill = True
    raise click.exceptions.Exit(1 if ill else 0)


def _boards(arch: tuple[str, ...], gpus: tuple[int | None, ...], ray: str | None, stack: ExitStack, console: Console) -> list[Board]:
    """What to sweep for; says what is not as one might think. `stack` is to disconnect from the cluster, if there is one."""
    from tuner import display
    from tuner.boards import Board, boards_here, modelled_boards

    cluster = None
    if ray is None:
        found = boards_here(None if None in gpus or not gpus else [index for index in gpus if index is not None])
    else:
        from tuner.cluster import Cluster

        cluster = Cluster(ray)
        stack.callback(cluster.close)
        found = [] if arch else [Board(device, cluster=cluster) for device in cluster.devices()]
    names = arch or (DEFAULT_ARCH,)
    if not found and not (cluster and arch):
        where = "in the cluster" if cluster else "here"
        picks = f"compiling for {', '.join(names)} and recording the model's picks"
        display.message(console, f"No GPU {where}: {picks}. Run this on a GPU to measure.")
    if arch or not found:
        return modelled_boards(names, cluster)
    if gpus or cluster:
        return found
    for other in found[1:]:
        what = f"{other.device.name} ({', '.join(f'GPU {index}' for index in other.gpus)}) is of another kind than GPU 0"
        display.message(console, f"{what} and left out; --gpus names GPUs, and `--gpus all` takes every kind in turn.")
    return found[:1]


def _run(session: Session, console: Console) -> SweepResult:
    """One session from its first line to its table."""
    from tuner import display

    if session.is_done():
        return _nothing_to_do(session, console)
    with open_for_writing(session.path) as store:
        todo = session.todo(store.records(session.device.uid))
        display.message(console, display.beginning(session, len(todo)))
        tried = _barred(store, session) if session.retry else set()
        if tried:
            display.message(console, display.retrying(tried, session.device.arch))
        progress = display.SweepProgress(console)
        started = time.monotonic()
        try:
            with progress:
                session.run(todo, store, sys.argv[1:], progress)
        except KeyboardInterrupt:
            display.message(console, display.interrupted(session, session.recorded(progress.finished, store)))
            raise click.exceptions.Exit(INTERRUPTED) from None
        barred = _barred(store, session) & tried
        result = display.SweepResult(
            session=session,
            finished=tuple(progress.finished),
            resources=session.resources(progress.finished, store),
            recorded=session.recorded(progress.finished, store),
            seconds=time.monotonic() - started,
        )
    display.print_result(console, result)
    if tried:
        display.message(console, display.retried(tried - barred, barred))
    return result


def _faulty(path: Path, arch: str) -> list[Problem]:
    """The problems that a config crashed or hung on, by the file if there is one."""
    from tuner.faults import standing_faults

    if not path.exists():
        return []
    with open_for_reading(path) as store:
        return list(dict.fromkeys(fault.problem for fault in standing_faults(store, arch)))


def _barred(store: Store, session: Session) -> set[Config]:
    """The configs that crashed or hung on the session's problems."""
    from tuner.faults import standing_faults

    return {fault.config for fault in standing_faults(store, session.device.arch) if fault.problem in session.problems}


def _nothing_to_do(session: Session, console: Console) -> SweepResult:
    from tuner import display

    display.message(console, display.nothing_to_do(session))
    return display.SweepResult(session, (), {}, len(session.problems), 0.0)


def _report(results: list[SweepResult], as_json: bool) -> None:
    from tuner import display

    if as_json:
        click.echo(display.sweep_json(results))


def _problems(workload: str, made_up: bool, wanted: Filter) -> list[Problem]:
    if made_up:
        return wanted.combinations()
    problems = load_workload(workload)
    kept = [problem for problem in problems if wanted.passes(problem)]
    if not kept:
        raise click.UsageError(f"none of the {len(problems)} problems of workload {workload} has {wanted}; name other values")
    return kept


def _database(db: Path | None) -> Path:
    """The file to write to, or to show: the one named, else the first writable one of the settings."""
    from kernels.settings import read_settings
    from tuner.session import is_writable

    databases = (db,) if db else read_settings().databases
    for path in databases:
        if db or is_writable(path):
            return path
    if not databases:
        raise click.ClickException("this user has no home directory for a database: name a file by RMSNORM_TUNING_DB or --db")
    listed = ", ".join(map(str, databases))
    raise click.ClickException(f"none of {listed} can be written: name a file by RMSNORM_TUNING_DB or --db")
