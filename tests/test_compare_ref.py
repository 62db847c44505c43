"""Another commit beside the present code: its tree, its modules in this process, and what is decided from paired rounds."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks.backward import Backward
from benchmarks.compare_ref import checked_out, compare_to_ref
from benchmarks.exits import Stop
from benchmarks.gpu_time import prepared
from benchmarks.other_tree import OtherTree
from benchmarks.paired import PairedCase, compare_versions_on, former
from benchmarks.peers import PROVIDERS
from benchmarks.processes import measured_apart, suite_text
from benchmarks.providers import Refusal
from benchmarks.results import Timing
from benchmarks.verdict import Verdict, change_between
from kernels import rmsnorm
from kernels.device import current_device
from synthetic import PROBLEMS
from tuner.cases import Case
from tuner.verify import Verifier
from tuner.workloads import load_workload, parse_workload
from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, BACKWARD, FORWARD, Problem

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
OPS = (FORWARD, BACKWARD, ADD_FORWARD, ADD_BACKWARD)
SMALL = Problem(FORWARD, "float16", "float16", "float16", 4, 256)  # the interpreter rounds to bf16 by cutting off
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, which CPU tensors go through")

KERNELS = """
import importlib
import torch
import tuning_db

__all__ = ["rmsnorm"]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return importlib.import_module("kernels.lazy").FACTOR * x * tuning_db.ONE

    @staticmethod
    def backward(ctx, dy):
        return importlib.import_module("kernels.lazy_backward").FACTOR * dy, dy.sum(0)


def rmsnorm(x, weight, eps, axis, out=None):
    y = Doubled.apply(x, weight)
    return y if out is None else out.copy_(y)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout whose `rmsnorm` doubles x, imports what it needs when it is called, and has no `add_rmsnorm`."""
    texts = {"kernels/__init__": KERNELS, "tuning_db/__init__": "ONE = 1"}
    for name, text in (texts | dict.fromkeys(("kernels/lazy", "kernels/lazy_backward"), "FACTOR = 2")).items():
        file = tmp_path / "tree" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "tree"


def test_both_versions_live_side_by_side(tree: Path) -> None:
    present = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ("kernels", "tuning_db")}
    path = list(sys.path)
    other = OtherTree(tree)
    x, y = torch.randn(2, 8), torch.empty(2, 8)
    assert torch.equal(other.function("rmsnorm")(x, None, 1e-6, -1, out=y), 2 * x)
    with other.active():
        assert "kernels.dispatch" not in sys.modules
    assert {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ("kernels", "tuning_db")} == present
    assert sys.path == path
    with other.active():
        assert sys.modules["kernels.lazy"].FACTOR == 2  # what was imported stays
    if not torch.cuda.is_available():
        assert not torch.equal(rmsnorm(x), 2 * x)


def test_an_error_inside_leaves_the_present_modules(tree: Path) -> None:
    other = OtherTree(tree)
    with pytest.raises(ZeroDivisionError), other.active():
        raise ZeroDivisionError
    assert sys.modules["kernels"].rmsnorm is rmsnorm


def test_a_folder_without_kernels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="has no package kernels"):
        OtherTree(tmp_path).function("rmsnorm")
    assert sys.modules["kernels"].rmsnorm is rmsnorm


@needs_interpreter
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        ("import torch; torch.no_such_name", "module 'torch' has no attribute 'no_such_name'"),
        ("def rmsnorm(", "'(' was never closed"),
    ],
)
def test_a_checkout_that_does_not_import_refuses_each_problem(tree: Path, text: str, said: str) -> None:
    (tree / "kernels" / "__init__.py").write_text(text)
    other = former(OtherTree(tree))
    for op in (FORWARD, BACKWARD):
        found = compare_versions_on(Case(replace(SMALL, op=op), CPU), current_device(), PROVIDERS["tuned"], other)
        assert found.refused.startswith("can't import kernels.rmsnorm: ")
        assert said in found.refused
        assert (found.wrong, found.timings, found.change) == ({}, {}, None)
    assert sys.modules["kernels"].rmsnorm is rmsnorm


@needs_interpreter
def test_a_checkout_without_an_op_refuses_that_alone(tree: Path) -> None:
    other = former(OtherTree(tree))
    found = {op: compare_versions_on(Case(replace(SMALL, op=op), CPU), current_device(), PROVIDERS["tuned"], other) for op in OPS}
    for op in (ADD_FORWARD, ADD_BACKWARD):
        assert found[op].refused == "has no add_rmsnorm"
        assert found[op].wrong == {}
    for op in (FORWARD, BACKWARD):  # it is asked, and twice x is neither the norm nor has its gradients
        assert found[op].refused == ""
        assert set(found[op].wrong) == {"then"}


@needs_interpreter
@pytest.mark.parametrize("op", OPS)
def test_a_whole_other_checkout_gives_the_same_bits(op: str, tmp_path: Path) -> None:
    """A copy of this one: Triton kernels, records and all."""
    for package in ("kernels", "tuning_db"):
        (tmp_path / package).symlink_to(ROOT / package)
    other = OtherTree(tmp_path)
    case = Case(replace(SMALL, op=op), CPU)
    (tensors,) = case.sets(1, seed=1)
    results = []
    for provider in (PROVIDERS["tuned"], former(other)):
        launch, fault = prepared(provider, case, current_device(), Verifier(case))
        assert fault == ""
        if isinstance(launch, Backward):
            launch.save(tensors)
        returned = launch(tensors)
        results.append([None if one is None else one.clone() for one in (returned if isinstance(returned, tuple) else (returned,))])
    for ours, theirs in zip(*results, strict=True):
        assert ours is None or torch.equal(ours, theirs)
    present = dict(sys.modules)
    with other.active():
        theirs = {name for name in sys.modules if name.startswith("kernels.") and sys.modules[name] is not present.get(name)}
    assert {"kernels.dispatch", *(["kernels.backward_launch"] if op in (BACKWARD, ADD_BACKWARD) else [])} <= theirs


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    return subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, text=True).stdout


def test_a_commit_is_checked_out_for_a_while(tree: Path) -> None:
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-q", "-m", "first")
    (tree / "kernels" / "lazy.py").write_text("FACTOR = 3")
    with checked_out("HEAD", tree) as former:
        assert (former / "kernels" / "lazy.py").read_text() == "FACTOR = 2"
        assert len(git(tree, "worktree", "list").splitlines()) == 2
    assert not former.exists()
    assert len(git(tree, "worktree", "list").splitlines()) == 1
    with pytest.raises(Stop, match=r"git rev-parse --verify failed: .*name a commit of"), checked_out("no-such-branch", tree):
        pass
    git(tree, "rm", "-r", "-q", "--force", "kernels")
    git(tree, "commit", "-q", "-m", "without kernels")
    with pytest.raises(Stop, match="HEAD has no package kernels"), checked_out("HEAD", tree):
        pass
    assert len(git(tree, "worktree", "list").splitlines()) == 1


def test_a_folder_is_taken_as_it_is(tree: Path) -> None:
    with checked_out(str(tree)) as found:
        assert found == tree
    assert tree.exists()


def paired(problem: Problem, ratio: float) -> PairedCase:
    then = [100.0 + turn for turn in range(11)]
    now = [us * ratio for us in then]
    timings = {"now": Timing.of(now, then), "then": Timing.of(then, then)}
    return PairedCase(problem, {}, timings, change_between(now, then))


def compared(*processes: dict[Problem, float]) -> tuple[dict[Problem, Verdict], list[list[Problem]]]:
    """Verdicts where each process sees these ratios, and what each was asked."""
    asked: list[list[Problem]] = []

    def pair(problems: list[Problem]) -> list[PairedCase]:
        ratios = processes[len(asked)]
        asked.append(list(problems))
        return [paired(problem, ratios.get(problem, 1.0)) for problem in problems]

    judged = compare_to_ref(PROBLEMS, pair, lambda line: None)
    assert [one.problem for one in judged] == list(PROBLEMS)
    return {one.problem: one.verdict for one in judged}, asked


def test_the_same_code_passes() -> None:
    found, asked = compared({})
    assert set(found.values()) == {Verdict.PASS}
    assert len(asked) == 1


def test_a_slow_down_is_a_regression_once_confirmed() -> None:
    slow = {PROBLEMS[3]: 1.03}
    found, asked = compared(slow, slow)
    assert [problem for problem, verdict in found.items() if verdict is Verdict.REGRESSION] == [PROBLEMS[3]]
    assert asked[1] == [PROBLEMS[3]]
    assert compared(slow, {})[0][PROBLEMS[3]] is Verdict.PASS
    assert compared({PROBLEMS[3]: 0.9})[0][PROBLEMS[3]] is Verdict.IMPROVED


def test_wrong_now_is_a_regression_and_wrong_or_refused_then_is_no_baseline() -> None:
    def pair(problems: list[Problem]) -> list[PairedCase]:
        wrongs = [({"now": "error is 9 × the tolerance"}, "no"), ({"then": "wrote outside its output"}, ""), ({}, "no out")]
        return [PairedCase(problem, wrong, {}, None, refused) for problem, (wrong, refused) in zip(problems, wrongs, strict=True)]

    now, then, refusing = compare_to_ref(PROBLEMS[:3], pair, lambda line: None)
    assert (now.verdict, now.note) == (Verdict.REGRESSION, "its result error is 9 × the tolerance")
    assert (then.verdict, then.note) == (Verdict.NO_BASELINE, "the other commit's result wrote outside its output")
    assert (refusing.verdict, refusing.note) == (Verdict.NO_BASELINE, "the other commit refuses: no out")


def test_a_paired_case_survives_the_way_between_processes() -> None:
    for case in (paired(PROBLEMS[0], 1.02), PairedCase(PROBLEMS[1], {"now": "wrong"}, {}, None, "refuses")):
        assert PairedCase.from_dict(json.loads(json.dumps(asdict(case)))) == case


@pytest.mark.parametrize("workload", ["llm", "compare"])
def test_a_suite_file_holds_exactly_the_problems(workload: str) -> None:
    problems = load_workload(workload)
    assert parse_workload(suite_text(problems), "s.yaml") == problems


CHILD = """
import json, sys
from pathlib import Path
at = sys.argv.index
suite, output = Path(sys.argv[at("--suite") + 1]), Path(sys.argv[at("--json") + 1])
if "--fail" in sys.argv:
    sys.exit(3)
output.write_text(json.dumps({"problems": len(json.loads(suite.read_text())["problems"])}))
"""


def test_a_process_gets_the_suite_and_leaves_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert measured_apart(["a_child"], PROBLEMS) == {"problems": len(PROBLEMS)}
    with pytest.raises(Stop, match="ended with exit code 3"):
        measured_apart(["a_child", "--fail"], PROBLEMS)
