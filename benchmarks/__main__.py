"""The command line `python -m benchmarks`: parses, calls, prints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

# torch and triton take seconds to import: they are imported inside the commands that need them, so that --help is quick.
from benchmarks.baseline import MIN_PROCESSES, BaselineError, find, joined, path_for, to_text
from benchmarks.exits import EPILOG, Exit, NoGpu, Stop
from benchmarks.results import ResultError
from benchmarks.suites import load_suite, names
from tuner.cli import MISSING
from tuner.failure import Failure
from tuner.workloads import WorkloadError
from tuning_db.model import FORWARD, Device

if TYPE_CHECKING:
    from benchmarks.providers import Provider
    from benchmarks.results import CaseResult
    from benchmarks.verdict import Judged

PROVIDER_NAMES = ("tuned", "heuristic", "eager", "compile", "liger", "quack", "flashinfer", "flaggems")

file = click.Path(dir_okay=False, path_type=Path)
suite_option = click.option("--suite", "--workload", "suite", default="gate", show_default=True, help=f"{names()} or a YAML file.")
provider_option = click.option(
    "--provider", "asked", multiple=True, type=click.Choice(PROVIDER_NAMES), help="Repeatable. Default: all that are installed."
)
json_option = click.option("--json", "json_path", type=file, help="Write the figures to this file as JSON.")
markdown_option = click.option("--markdown", "markdown_path", type=file, help="Write them here as Markdown, for a CI job's summary.")


class Commands(click.Group):
    """Turns what a user can cure into one line on stderr."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except click.UsageError as error:
            error.ctx = None  # else click prints three lines of usage before it
            raise
        except (BaselineError, Failure, ResultError, WorkloadError) as error:
            raise Stop(str(error)) from error
        except ModuleNotFoundError as error:
            if error.name not in MISSING:
                raise
            raise Stop(f"this command needs {MISSING[error.name]}") from error


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Compare `rmsnorm` with other implementations on this GPU, and with itself before a change."""


@main.command(epilog=EPILOG)
@suite_option
@provider_option
@json_option
@markdown_option
def run(suite: str, asked: tuple[str, ...], json_path: Path | None, markdown_path: Path | None) -> None:
    """GPU time of each provider: µs, and fraction of a reference copy of the same bytes in the same rounds."""
    problems = load_suite(suite)
    device = gpu()
    from benchmarks import results, tables
    from benchmarks.gpu_time import compare
    from tuner import display
    from tuner.measure import POLICY

    providers, absent = chosen(asked or PROVIDER_NAMES, required=bool(asked))
    console = display.console()
    provenance = results.provenance_here(device, POLICY)
    ops = list(dict.fromkeys(problem.op for problem in problems))
    calls = {name: provider.calls_of(ops) for name, provider in providers.items()}
    describe(calls, absent, str(provenance))
    cases: list[CaseResult] = []
    for case in compare(problems, providers):
        cases.append(case)
        click.echo(f"[{len(cases)}/{len(problems)}] {display.problem_label(case.problem)}", err=True)
    result = results.RunResult(provenance, suite, calls, absent, tuple(cases))
    tables.print_run(console, result)
    for sentence in (tables.versus_best(cases), *tables.notes(cases)):
        display.message(console, sentence)
    write(json_path, results.to_json(result))
    write(markdown_path, tables.run_markdown(result))


@main.command(epilog=EPILOG)
@suite_option
@click.option("--processes", type=click.IntRange(min=MIN_PROCESSES), default=MIN_PROCESSES, show_default=True, help="Fresh processes.")
@click.option("--output", type=file, help="Write to this file. Default: the board's in benchmarks/baselines.")
def record(suite: str, processes: int, output: Path | None) -> None:
    """Record this board's baseline: fraction of copy of each problem, and its spread between processes.

    What the baseline has of other suites stays in it, if it was made with the same versions.
    """
    problems = load_suite(suite)
    device = gpu()
    from benchmarks.check import record_baseline, run_apart
    from tuner.measure import POLICY

    path = output or path_for(device)
    former, _ = find(device, POLICY, path)
    baseline = record_baseline(suite, problems, processes, run_apart, progress)
    if former is not None:
        baseline = joined(former, baseline)
    write(path, to_text(baseline))
    spread = max(case.fraction.high / case.fraction.low for case in baseline.cases)
    click.echo(f"{len(baseline.cases)} cases of {device.name} in {path}; the widest spread between processes is {(spread - 1) * 100:.1f} %")


@main.command(epilog=EPILOG)
@click.option("--suite", help=f"{names()} or a YAML file. Default: all of the baseline's.")
@click.option("--baseline", "path", type=file, help="Hold against this file. Default: the board's in benchmarks/baselines.")
@click.option("--require-baseline", is_flag=True, help=f"Exit with {int(Exit.NO_BASELINE)} where there is none.")
@json_option
@markdown_option
def check(suite: str | None, path: Path | None, require_baseline: bool, json_path: Path | None, markdown_path: Path | None) -> None:
    """Hold the present code against this board's baseline.

    A regression is slower by more than 2 % and more than 0.15 µs, with its whole interval, in two fresh processes.
    """
    device = gpu()
    from benchmarks.check import check_against, run_apart
    from tuner.measure import POLICY

    baseline, reason = find(device, POLICY, path)
    if baseline is None:
        click.echo(f"no baseline: {reason}; `python -m benchmarks record` makes one", err=True)
        raise click.exceptions.Exit(Exit.NO_BASELINE if require_baseline else Exit.OK)
    problems = [problem for name in ((suite,) if suite else baseline.suites) for problem in load_suite(name)]
    judged = check_against(baseline, problems, run_apart, progress)
    tell(judged, f"{device.name} against its baseline of {baseline.provenance.made_at[:10]}", json_path, markdown_path, require_baseline)


@main.command("compare-ref", epilog=EPILOG)
@click.argument("ref", metavar="GITREF")
@suite_option
@json_option
@markdown_option
def compare_ref(ref: str, suite: str, json_path: Path | None, markdown_path: Path | None) -> None:
    """Hold the present code against another commit (or a folder with its checkout), both in one process and the same rounds."""
    problems = load_suite(suite)
    device = gpu()
    from benchmarks.compare_ref import checked_out, compare_to_ref, pair_apart

    with checked_out(ref) as tree:
        judged = compare_to_ref(problems, pair_apart(tree), progress)
    tell(judged, f"{device.name}: this tree against {ref}", json_path, markdown_path, require_baseline=False)


@main.command(epilog=EPILOG)
@provider_option
@click.option("--rows", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--cols", type=click.IntRange(min=1), default=4096, show_default=True)
@json_option
def host(asked: tuple[str, ...], rows: int, cols: int, json_path: Path | None) -> None:
    """Host time of one call, bf16, nothing synchronised inside: without grad, with shapes in turn, with grad, of the module."""
    device = gpu()
    from benchmarks import results, tables
    from benchmarks.host import host_times
    from tuner import display

    callable_names = [name for name in PROVIDER_NAMES if name != "heuristic"]  # an override is no way to call it
    providers, absent = chosen(asked or callable_names, required=bool(asked))
    provenance = results.provenance_here(device, "host")
    describe({name: provider.calls_of([FORWARD]) for name, provider in providers.items()}, absent, str(provenance))
    times, missing = host_times(providers, rows, cols)
    tables.print_host(display.console(), times, "eager")
    for name, reason in missing.items():
        click.echo(f"{name} was not timed, {reason}")
    write(json_path, results.to_json(results.HostResult(provenance, rows, cols, times)))


@main.command("first-call", epilog=EPILOG)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="New processes of each kind.")
@json_option
def first_call(repeats: int, json_path: Path | None) -> None:
    """Seconds from a ready GPU to the first result in a new process: records, torch.compile and triton.autotune."""
    device = gpu()
    from benchmarks import results, tables
    from benchmarks.first_call import PROBLEM, WAYS, first_calls, run_child
    from tuner import display

    for way, calls in WAYS.items():
        click.echo(f"{way:<12}{calls}")
    provenance = results.provenance_here(device, "first-call")
    click.echo(str(provenance))
    seconds = first_calls(repeats, run_child, progress)
    tables.print_first_calls(display.console(), seconds)
    write(json_path, results.to_json(results.FirstCallResult(provenance, PROBLEM, seconds)))


@main.command(epilog=EPILOG)
@click.option("--workload", default="llm", show_default=True, help=f"{names()} or a YAML file.")
def accuracy(workload: str) -> None:
    """Error against float64 beside that of F.rms_norm, by dtypes of x and weight; and whether a second run gives the same bits."""
    problems = load_suite(workload)
    gpu()
    from benchmarks.accuracy import errors, print_errors

    print_errors(errors(problems))


@main.command(epilog=EPILOG)
@click.option("--steps", type=click.IntRange(min=20), default=50, show_default=True, help="Of each model; the first 10 are not timed.")
@json_option
def train(steps: int, json_path: Path | None) -> None:
    """A training step of a small Llama in bf16, norms replaced and not: ms, peak memory, and the loss of every step."""
    device = gpu()
    import torch

    from benchmarks import results
    from benchmarks.small_llama import Size
    from benchmarks.train import print_trainings, trainings
    from tuner import display

    provenance, size = results.provenance_here(device, "train"), Size()
    click.echo(f"{provenance}\n{size}")
    found = trainings(steps, size, torch.device("cuda", 0))
    print_trainings(display.console(), found)
    plain = {"provenance": asdict(provenance), "size": asdict(size), "trainings": {name: asdict(one) for name, one in found.items()}}
    write(json_path, json.dumps(plain, indent=1, allow_nan=False))


@main.command(epilog=EPILOG)
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=Path("report"), show_default=True, help="Folder.")
def report(files: tuple[Path, ...], output: Path) -> None:
    """Draw what `run`, `host` and `first-call` wrote by --json: PNGs, and one page that needs no network."""
    from benchmarks.report import write_report
    from benchmarks.results import read_result

    click.echo(f"{write_report([read_result(path) for path in files], output)}")


def gpu() -> Device:
    """The GPU to benchmark. Asks the driver alone: the processes that measure have the GPU to themselves."""
    from kernels.device import describe, has_gpu

    if not has_gpu():
        raise NoGpu("there is no GPU to benchmark; run this on a machine with one")
    return describe(0)


def chosen(asked: Sequence[str], *, required: bool) -> tuple[dict[str, Provider], dict[str, str]]:
    """The providers by name that are here, and why others are not. Raises Stop if one is not that has to be."""
    from benchmarks.peers import PROVIDERS

    absent = {name: reason for name in asked if (reason := PROVIDERS[name].absence())}
    if required and absent:
        raise Stop("; ".join(f"{name}: {reason}" for name, reason in absent.items()) + "; install it or leave it out")
    return {name: PROVIDERS[name] for name in asked if name not in absent}, absent


def describe(calls: Mapping[str, str], absent: Mapping[str, str], provenance: str) -> None:
    """What is called, in which version, and who is not here."""
    for name, what in calls.items():
        click.echo(f"{name:<12}{what}")
    for name, reason in absent.items():
        click.echo(f"{name:<12}absent: {reason}")
    click.echo(provenance)


def tell(judged: Sequence[Judged], title: str, json_path: Path | None, markdown_path: Path | None, require_baseline: bool) -> None:
    """Print verdicts, write them where asked, and end with their exit code."""
    from benchmarks import tables
    from benchmarks.verdict import exit_code
    from tuner import display

    console = display.console()
    tables.print_judged(console, judged, title)
    display.message(console, tables.summary(judged))
    code = exit_code((one.verdict for one in judged), require_baseline=require_baseline)
    plain = {"title": title, "exit_code": int(code), "cases": [asdict(one) for one in judged]}
    write(json_path, json.dumps(plain, indent=1, allow_nan=False))
    write(markdown_path, tables.judged_markdown(judged, title))
    raise click.exceptions.Exit(code)


def write(path: Path | None, text: str) -> None:
    """Write where that was asked for, in a folder that is made if need be."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Stop(f"can't write {path}: {error.strerror}") from error


def progress(line: str) -> None:
    click.echo(line, err=True)


if __name__ == "__main__":
    main()
