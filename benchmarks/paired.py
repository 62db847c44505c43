"""`python -m benchmarks.paired --tree FOLDER`: the present `rmsnorm` and another checkout's in the same rounds, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.gpu_time import ROUNDS, prepared
from benchmarks.other_tree import OtherTree
from benchmarks.peers import PROVIDERS
from benchmarks.providers import Launch, Provider
from benchmarks.results import Interval, Timing, timing_from_dict
from benchmarks.suites import load_suite
from benchmarks.verdict import Change, change_between
from kernels.dispatch import device_of
from tuner.cases import EPS, Case, Tensors
from tuner.measure import Bench
from tuner.verify import Verifier
from tuning_db.model import Device, Problem


@dataclass(frozen=True)
class PairedCase:
    """One problem: what is wrong with either version, else the Timing of each (`now`, `then`) and the Change between them."""

    problem: Problem
    wrong: dict[str, str]
    timings: dict[str, Timing]
    change: Change | None

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> PairedCase:
        timings = {name: timing_from_dict(timing) for name, timing in plain["timings"].items()}
        change = plain["change"] and Change(Interval(*plain["change"]["ratio"]), Interval(*plain["change"]["extra_us"]))
        return cls(Problem(**plain["problem"]), plain["wrong"], timings, change)


def former(tree: OtherTree) -> Provider:
    """The other tree's `rmsnorm`."""

    def prepare(case: Case, _: Device) -> Launch:
        def launch(tensors: Tensors) -> torch.Tensor:
            with tree.active():
                return tree.rmsnorm(tensors.x, tensors.weight, EPS, case.axis, out=tensors.y)

        return launch

    return Provider("the same of the other commit", "tuned-rmsnorm", "kernels", prepare)


def compare_versions(problems: Sequence[Problem], now: Provider, then: Provider, index: int = 0) -> Iterator[PairedCase]:
    """Both versions on each problem: verified, then timed in rounds that hold one launch graph of each."""
    for problem in problems:
        with torch.no_grad(), torch.cuda.device(index):
            found = compare_versions_on(Case(problem, torch.device("cuda", index)), device_of(index), now, then)
        yield found


def compare_versions_on(case: Case, device: Device, now: Provider, then: Provider) -> PairedCase:
    """One case: nothing is timed unless both are right."""
    verifier = Verifier(case)
    prepared_both = {name: prepared(provider, case, device, verifier) for name, provider in (("now", now), ("then", then))}
    wrong = {name: fault for name, (_, fault) in prepared_both.items() if fault}
    if wrong:
        return PairedCase(case.problem, wrong, {}, None)
    bench = Bench(case, device, seed=5)
    for name, (launch, _) in prepared_both.items():
        bench.enter(name, launch)
    samples, reference = bench.rounds(list(prepared_both), ROUNDS)
    floor = [case.copies * copy_us for copy_us in reference]
    timings = {name: Timing.of(samples[name], floor) for name in prepared_both}
    return PairedCase(case.problem, {}, timings, change_between(samples["now"], samples["then"]))


@click.command()
@click.option("--tree", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path), help="The other checkout.")
@click.option("--suite", required=True, help="What to measure.")
@click.option("--json", "output", required=True, type=click.Path(path_type=Path), help="Where the figures go.")
def main(tree: Path, suite: str, output: Path) -> None:
    """Called by `python -m benchmarks compare-ref`, in a fresh process."""
    cases = compare_versions(load_suite(suite), PROVIDERS["tuned"], former(OtherTree(tree)))
    output.write_text(json.dumps({"cases": [asdict(case) for case in cases]}, allow_nan=False), encoding="utf-8")


if __name__ == "__main__":
    main()
