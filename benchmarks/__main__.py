"""`python -m benchmarks run | host | accuracy`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from tuning_db.model import Problem

PROVIDER_NAMES = ("tuned", "heuristic", "eager", "compile")


EPILOG = "Exit codes: 0 all went well, 2 wrong usage, 5 there is no GPU."


@click.group(epilog=EPILOG, context_settings={"max_content_width": 100})
def main() -> None:
    """Compare `rmsnorm` with PyTorch on this GPU."""


def need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        click.echo("There is no GPU to benchmark; run this on a machine with one.", err=True)
        sys.exit(5)


def problems_of(workload: str) -> list[Problem]:
    from tuner.workloads import WorkloadError, load_workload

    try:
        return load_workload(workload)
    except WorkloadError as error:
        raise click.UsageError(str(error)) from error


@main.command()
@click.option("--workload", default="compare", show_default=True, help="A shipped workload or a YAML file.")
@click.option("--provider", "names", multiple=True, type=click.Choice(PROVIDER_NAMES), default=PROVIDER_NAMES, help="Repeatable.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here as well.")
def run(workload: str, names: tuple[str, ...], json_path: Path | None) -> None:
    """GPU time of each provider: µs, and fraction of a reference copy of the same bytes in the same rounds."""
    problems = problems_of(workload)
    need_gpu()
    from benchmarks.providers import PROVIDERS
    from benchmarks.run import compare
    from kernels.dispatch import device_of

    for name in names:
        click.echo(f"{name:<10}{PROVIDERS[name].calls}")
    click.echo(f"{device_of(0).name} ({device_of(0).uid}); µs / fraction of the reference copy")
    click.echo(f"{'problem':<44}{'copy':>8}" + "".join(f"{name:>17}" for name in names))
    rows = []
    for row in compare(problems, names):
        cells = [
            f"{row.measured[name].median_us:9.2f} / {row.measured[name].copy_fraction:.2f}" if name in row.measured else "wrong"
            for name in names
        ]
        click.echo(f"{row.problem!s:<44}{row.copy_us:8.2f}" + "".join(f"{cell:>17}" for cell in cells))
        for name, fault in row.missing.items():
            click.echo(f"  {name} was not timed: its result {fault}", err=True)
        rows.append(asdict(row))
    if json_path is not None:
        json_path.write_text(json.dumps({"device": asdict(device_of(0)), "rows": rows}, indent=1), encoding="utf-8")


@main.command()
def host() -> None:
    """Host time of one call at 1×4096 bf16, inputs without grad, nothing synchronised inside."""
    need_gpu()
    from benchmarks.run import host_times

    times = host_times()
    for name, value in times.items():
        click.echo(f"{name:<28}{value:8.2f} µs  {value / times['F.rms_norm']:.2f} × F.rms_norm")


@main.command()
@click.option("--workload", default="llm", show_default=True, help="A shipped workload or a YAML file.")
def accuracy(workload: str) -> None:
    """Error against float64 beside that of F.rms_norm, by dtypes of x and weight; and whether a second run gives the same bits."""
    problems = problems_of(workload)
    need_gpu()
    from benchmarks.accuracy import errors

    groups: dict[tuple[str, str], list[tuple[float, float, bool]]] = {}
    for found in errors(problems):
        key = (found.problem.x_dtype, found.problem.w_dtype)
        groups.setdefault(key, []).append((found.tuned, found.eager, found.repeatable))
    click.echo(f"{'x':<10}{'weight':<10}{'problems':>9}{'rmsnorm':>12}{'F.rms_norm':>12}{'worst ratio':>13}{'same bits':>11}")
    for (x_dtype, w_dtype), found_errors in groups.items():
        tuned, eager = (max(entry[i] for entry in found_errors) for i in (0, 1))
        ratio = max(ours / theirs for ours, theirs, _ in found_errors)
        same = sum(repeatable for _, _, repeatable in found_errors)
        click.echo(
            f"{x_dtype:<10}{w_dtype:<10}{len(found_errors):>9}{tuned:>12.3e}{eager:>12.3e}{ratio:>13.4f}{same:>7}/{len(found_errors)}"
        )


if __name__ == "__main__":
    main()
