"""`compare-ref`: the present code against another commit, both in one process and in the same rounds; the gate for pull requests."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.exits import Stop
from benchmarks.paired import PairedCase
from benchmarks.verdict import Judged, Verdict, verdict
from tuning_db.model import Problem

ROOT = Path(__file__).parent.parent

PairApart = Callable[[Sequence[Problem]], list[PairedCase]]
"""Measures both versions on problems in a fresh process."""


@contextmanager
def checked_out(ref: str, root: Path = ROOT) -> Iterator[Path]:
    """A folder with another checkout as it is, else the commit `ref` in a temporary git worktree.

    Raises Stop where git can't, or where that has no package `kernels`.
    """
    if _has_kernels(Path(ref)):
        yield Path(ref)
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        commit = _git(root, "rev-parse", "--verify", "--end-of-options", f"{ref}^{{commit}}").strip()
        _git(root, "worktree", "add", "--detach", str(tree), commit)
        try:
            if not _has_kernels(tree):
                raise Stop(f"{ref} has no package kernels; name a commit that has one")
            yield tree
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


def pair_apart(tree: Path) -> PairApart:
    """`PairApart` by `python -m benchmarks.paired`."""
    from benchmarks.processes import measured_apart

    def pair(problems: Sequence[Problem]) -> list[PairedCase]:
        plain = measured_apart(["benchmarks.paired", "--tree", str(tree)], problems)
        return [PairedCase.from_dict(case) for case in plain["cases"]]

    return pair


def compare_to_ref(problems: Sequence[Problem], pair: PairApart, say: Callable[[str], None]) -> list[Judged]:
    """Measure both versions in a fresh process; what looks slower is measured again in another."""
    say(f"process 1: {len(problems)} problems")
    first = {case.problem: case for case in pair(problems)}
    suspects = [problem for problem, case in first.items() if case.change and case.change.is_suspect]
    again: dict[Problem, PairedCase] = {}
    if suspects:
        say(f"process 2: {len(suspects)} that look slower")
        again = {case.problem: case for case in pair(suspects)}
    return [_judged(first[problem], again.get(problem)) for problem in problems]


def _judged(case: PairedCase, again: PairedCase | None) -> Judged:
    now = case.timings.get("now")
    if "now" in case.wrong:
        return Judged(case.problem, Verdict.REGRESSION, now, None, note=f"its result {case.wrong['now']}")
    if case.refused:
        return Judged(case.problem, Verdict.NO_BASELINE, now, None, note=f"the other commit refuses: {case.refused}")
    if case.change is None:
        return Judged(case.problem, Verdict.NO_BASELINE, now, None, note=f"the other commit's result {case.wrong['then']}")
    second = again.change if again else None
    return Judged(case.problem, verdict(case.change, second), now, case.change, second)


def _has_kernels(tree: Path) -> bool:
    return (tree / "kernels" / "__init__.py").is_file()


def _git(root: Path, *arguments: str) -> str:
    finished = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    if finished.returncode:
        error = finished.stderr.strip().splitlines() or ["no reason given"]
        raise Stop(f"git {' '.join(arguments[:2])} failed: {error[-1]}; name a commit of {root}, or a folder with a checkout")
    return finished.stdout
