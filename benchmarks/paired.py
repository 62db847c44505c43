"""`python -m benchmarks.paired --tree FOLDER`: the present functions and another checkout's in the same rounds, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.gpu_time import prepared, timed_together
from benchmarks.other_ops import Function, Functions, with_functions
from benchmarks.other_tree import OtherTree
from benchmarks.peers import PROVIDERS
from benchmarks.providers import Launch, Provider, Refusal
from benchmarks.results import Interval, Timing, timing_from_dict
from benchmarks.suites import load_suite
from benchmarks.verdict import Change, change_between
from kernels.dispatch import device_of
from tuner.cases import EPS, Case
from tuner.verify import Verifier
from tuning_db.model import Device, Problem


@dataclass(frozen=True)
class PairedCase:
    """One problem: the Timing of each version (`now`, `then`) and the Change between them.

    Or why there is none: what is wrong with either's result, and why the other commit refuses the problem.
    """

    problem: Problem
    wrong: dict[str, str]
    timings: dict[str, Timing]
    change: Change | None
    refused: str = ""

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> PairedCase:
        timings = {name: timing_from_dict(timing) for name, timing in plain["timings"].items()}
        change = plain["change"] and Change(Interval(*plain["change"]["ratio"]), Interval(*plain["change"]["extra_us"]))
        return cls(Problem(**plain["problem"]), plain["wrong"], timings, change, plain["refused"])


def former(tree: OtherTree) -> Provider:
    """The other tree's functions. What an older one lacks, or fails at, it refuses."""

    def into(case: Case, _: Device) -> Launch:
        rmsnorm = tree.function("rmsnorm")
        return lambda tensors: rmsnorm(tensors.x, tensors.weight, EPS, case.axis, out=tensors.y)

    def norm(case: Case, _: Device) -> Function:
        rmsnorm = tree.function("rmsnorm")
        return lambda x, weight: rmsnorm(x, weight, EPS, case.axis)

    def add(_case: Case, _: Device) -> Function:
        add_rmsnorm = tree.function("add_rmsnorm")
        return lambda x, residual, weight: add_rmsnorm(x, residual, weight, EPS)

    same = "the same of the other commit"
    own = Functions(norm=norm, norm_calls=same, add=add, add_calls=same, gradient_roundings=1)
    return with_functions(Provider(same, "tuned-rmsnorm", "kernels", into, foreign=True), own, tree.active)


def compare_versions(problems: Sequence[Problem], now: Provider, then: Provider, index: int = 0) -> Iterator[PairedCase]:
    """Both versions on each problem: verified, then timed in rounds that hold one launch graph of each."""
    for problem in problems:
        with torch.no_grad(), torch.cuda.device(index):
            found = compare_versions_on(Case(problem, torch.device("cuda", index)), device_of(index), now, then)
        yield found


def compare_versions_on(case: Case, device: Device, now: Provider, then: Provider) -> PairedCase:
    """One case: nothing is timed unless both are right."""
    verifier = Verifier(case)
    launches: dict[str, Launch] = {}
    faults: dict[str, str] = {}
    refused = ""
    launches["now"], faults["now"] = prepared(now, case, device, verifier)
    try:
        launches["then"], faults["then"] = prepared(then, case, device, verifier)
    except Refusal as refusal:
        refused = str(refusal)
    wrong = {name: fault for name, fault in faults.items() if fault}
    if wrong or refused:
        return PairedCase(case.problem, wrong, {}, None, refused)
    del verifier  # its tensors are not needed while the others are timed
    samples, floor = timed_together(case, device, launches)
    timings = {name: Timing.of(samples[name], floor) for name in launches}
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
