"""`python -m benchmarks`: what it prints, writes and exits with, with every GPU part faked."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import benchmarks.__main__ as cli
import benchmarks.baseline as baselines
from benchmarks import check, compare_ref, first_call, gpu_time, host, peers, train
from benchmarks.baseline import combined, to_text
from benchmarks.exits import Exit
from benchmarks.paired import PairedCase
from benchmarks.results import CaseResult, FirstCallResult, HostResult, RunResult, read_result, to_json
from benchmarks.suites import SUITES, load_suite
from benchmarks.tables import fitting, run_markdown
from synthetic import DEVICE, FIRST_CALL, HOST, PROBLEMS, SLOWNESS, case, copy_us, run_result
from test_compare_ref import paired
from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, BACKWARD, Problem

ROOT = Path(__file__).parents[1]
COMMANDS = ("run", "record", "check", "compare-ref", "host", "first-call", "accuracy", "train", "report")
LARGE = next(problem for problem in PROBLEMS if copy_us(problem) > 10.0)


def invoke(*arguments: str, columns: int = 80) -> Result:
    result = CliRunner().invoke(cli.main, list(arguments), env={"COLUMNS": str(columns)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An H100 whose every provider is installed."""
    monkeypatch.setattr(cli, "gpu", lambda: DEVICE)
    monkeypatch.setattr(peers.Provider, "absence", lambda provider: "")
    monkeypatch.setattr(
        gpu_time, "compare", lambda problems, providers: (case(problem, dict.fromkeys(providers, 1.0)) for problem in problems)
    )
    monkeypatch.setattr(baselines, "FOLDER", tmp_path / "baselines")


def process(monkeypatch: pytest.MonkeyPatch, factor: float, problems: Sequence[Problem] = (LARGE,)) -> None:
    """From now on fresh processes find these problems slower by `factor`."""
    factors = dict.fromkeys(problems, factor)
    monkeypatch.setattr(check, "run_apart", lambda asked: run_result(asked, {"tuned": 1.0}, factors))


def test_help_documents_commands_and_exit_codes() -> None:
    output = " ".join(invoke("--help").output.split())
    for code, text in ((1, "a regression"), (2, "wrong usage"), (3, "inconclusive"), (4, "a baseline is missing"), (5, "there is no GPU")):
        assert f"{code} {text}" in output
    for name in COMMANDS:
        assert f" {name} " in output
        assert invoke(name, "--help").exit_code == 0
    assert tuple(sorted(cli.main.commands)) == tuple(sorted(COMMANDS))


def test_help_imports_neither_torch_nor_matplotlib() -> None:
    source = "import sys, benchmarks.__main__; sys.exit(bool({'torch', 'triton', 'matplotlib', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", source], cwd=ROOT, check=False).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    "arguments", [["run"], ["record"], ["check"], ["compare-ref", "HEAD"], ["host"], ["first-call"], ["accuracy"], ["train"]]
)
def test_without_a_gpu_the_exit_code_is_five(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stderr) == (Exit.NO_GPU, "Error: there is no GPU to benchmark; run this on a machine with one\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--suite", "nope"], "'nope' is neither one of"),
        (["run", "--provider", "nope"], "'nope' is not one of"),
        (["record", "--processes", "2"], "2 is not in the range x>=3"),
        (["report", __file__], "holds no benchmark result"),
        (["compare-ref"], "Missing argument 'GITREF'"),
    ],
)
def test_wrong_usage_is_two_and_one_line(arguments: list[str], said: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == Exit.USAGE
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", SUITES)
def test_suites_name_each_problem_once(name: str) -> None:
    problems = load_suite(name)
    assert len(set(problems)) == len(problems)


def test_other_ops_are_all_but_the_forward() -> None:
    assert {problem.op for problem in load_suite("other_ops")} == {BACKWARD, ADD_FORWARD, ADD_BACKWARD}


@pytest.mark.parametrize(("name", "op"), [("backward", BACKWARD), ("add", ADD_FORWARD), ("add_backward", ADD_BACKWARD)])
def test_suites_of_other_ops(name: str, op: str) -> None:
    problems = load_suite(name)
    assert {problem.op for problem in problems} == {op}
    assert sum(problem.x_dtype == "bfloat16" for problem in problems) >= 15
    assert {4096, 131_072} <= {problem.cols for problem in problems}


@pytest.mark.parametrize("name", ["gate", "full"])
def test_suites_of_the_forward(name: str) -> None:
    problems = load_suite(name)
    assert {problem.x_dtype for problem in problems} == {"bfloat16", "float16", "float32"}
    assert {problem.layout for problem in problems} == {"contiguous", "two_stride"}
    assert any(problem.x_dtype == "bfloat16" and problem.w_dtype == "float32" for problem in problems)


def test_the_gate_spans_what_is_asked_of_it() -> None:
    assert 35 <= len(PROBLEMS) <= 45
    assert (min(problem.rows for problem in PROBLEMS), max(problem.cols for problem in PROBLEMS)) == (1, 262144)
    assert {1, 32768} <= {problem.rows for problem in PROBLEMS}
    assert min(problem.cols for problem in PROBLEMS) == 128


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("columns", [80, 160])
def test_run_prints_every_provider_and_fits(columns: int, tmp_path: Path) -> None:
    result = invoke("run", "--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md"), columns=columns)
    assert result.exit_code == 0, result.output
    tables = result.stdout[result.stdout.index("µs / fraction") :]
    assert max(map(len, tables.splitlines())) <= columns
    assert tables.count("µs / fraction") == (3 if columns == 80 else 1)
    for name in SLOWNESS:
        assert f"\n{name:<12}" in f"\n{result.stdout}"  # what it calls
        assert f" {name}" in tables
    assert "liger refuses 1x131072 bf16, 16x131072 bf16, 1024x131072 bf16 and 2 more: more than" in " ".join(tables.split())
    assert result.stderr.splitlines()[-1].startswith(f"[{len(PROBLEMS)}/{len(PROBLEMS)}] ")
    found = read_result(tmp_path / "r.json")
    assert isinstance(found, RunResult)
    assert (found.provenance.device, len(found.cases), list(found.calls)) == (DEVICE, len(PROBLEMS), list(SLOWNESS))
    markdown = (tmp_path / "r.md").read_text()
    assert markdown.count("\n| ") == len(PROBLEMS) + 2
    assert "- liger refuses" in markdown
    assert "| best other | × best other |" in markdown
    sentence = "rmsnorm is 1.00 times as fast as the best other provider in the geometric mean over 42 problems, at least 1.00 times ("
    assert sentence in " ".join(result.stdout.split())
    assert sentence in markdown


@pytest.mark.usefixtures("_gpu")
def test_an_absent_provider_is_named_and_an_error_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.Provider, "absence", lambda provider: "quack-kernels is not installed" if provider.module == "quack" else "")
    result = invoke("run")
    assert result.exit_code == 0
    assert "quack       absent: quack-kernels is not installed" in result.stdout
    asked = invoke("run", "--provider", "quack")
    assert (asked.exit_code, asked.stderr) == (2, "Error: quack: quack-kernels is not installed; install it or leave it out\n")


@pytest.mark.usefixtures("_gpu")
def test_record_then_check_passes_and_a_slow_kernel_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    process(monkeypatch, 1.0)
    recorded = invoke("record", columns=200)
    assert recorded.exit_code == 0, recorded.output
    assert (tmp_path / "baselines" / "nvidia" / "sm_90" / "h100-80gb-hbm3.json").is_file()
    assert f"{len(PROBLEMS)} cases of {DEVICE.name}" in recorded.stdout
    for _ in range(3):
        passed = invoke("check", "--require-baseline")
        assert passed.exit_code == 0, passed.output
        assert f"{len(PROBLEMS)} pass" in passed.stdout
    process(monkeypatch, 1.05)
    files = ["--json", str(tmp_path / "c.json"), "--markdown", str(tmp_path / "c.md")]
    slow = invoke("check", *files, columns=160)
    assert slow.exit_code == Exit.REGRESSION
    label = f"{LARGE.rows}x{LARGE.cols} bf16"
    assert f"Look at {label}." in slow.stdout
    assert "process 2: 1 that look slower" in slow.stderr
    plain = json.loads((tmp_path / "c.json").read_text())
    assert plain["exit_code"] == 1
    assert [one["problem"]["cols"] for one in plain["cases"] if one["verdict"] == "regression"] == [LARGE.cols]
    first_row = next(line for line in (tmp_path / "c.md").read_text().splitlines() if "regression: " in line or "| regression" in line)
    assert first_row.startswith(f"| {label} |")


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("columns", [80, 160])
def test_check_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text(to_text(combined("gate", [run_result(slowness={"tuned": 1.0})] * 3)))
    process(monkeypatch, 1.05)
    result = invoke("check", "--baseline", str(path), columns=columns)
    assert result.exit_code == Exit.REGRESSION
    assert max(map(len, result.stdout.splitlines())) <= columns


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(("arguments", "code"), [([], Exit.OK), (["--require-baseline"], Exit.NO_BASELINE)])
def test_without_a_baseline_the_command_that_makes_one_is_named(arguments: list[str], code: Exit) -> None:
    result = invoke("check", *arguments)
    assert result.exit_code == code
    assert "no baseline: there is none for NVIDIA H100" in result.stderr
    assert "`python -m benchmarks record` makes one" in result.stderr


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("suite", ["gate", "other_ops"])
@pytest.mark.parametrize(("ratio", "code", "verdict"), [(1.0, 0, "pass"), (1.05, 1, "regression"), (0.9, 0, "improved")])
def test_compare_ref_exits_as_check_does(
    ratio: float, code: int, verdict: str, suite: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    monkeypatch.setattr(compare_ref, "pair_apart", lambda tree: pair)

    def pair(problems: Sequence[Problem]) -> list[PairedCase]:
        return [paired(problem, ratio) for problem in problems]

    result = invoke("compare-ref", str(tmp_path), "--suite", suite)
    assert result.exit_code == code
    assert f"{len(load_suite(suite))} {verdict}" in result.stdout


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("columns", [80, 160])
def test_compare_ref_says_what_the_other_commit_refuses(columns: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    refusing = [PairedCase(problem, {}, {}, None, "has no add_rmsnorm") for problem in load_suite("add")]
    monkeypatch.setattr(compare_ref, "pair_apart", lambda tree: lambda problems: refusing)
    result = invoke("compare-ref", str(tmp_path), "--suite", "add", columns=columns)
    assert result.exit_code == Exit.OK
    assert max(map(len, result.stdout.splitlines())) <= columns
    assert result.stdout.count("has no") == len(refusing)
    assert f"{len(refusing)} no baseline." in result.stdout


@pytest.mark.usefixtures("_gpu")
def test_an_unknown_commit_is_wrong_usage() -> None:
    assert invoke("compare-ref", "no-such-branch").exit_code == Exit.USAGE


@pytest.mark.usefixtures("_gpu")
def test_host_and_first_call_write_what_report_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        host, "host_times", lambda providers, rows, cols: (asked.extend(providers) or HOST.times_us, {"liger": "refuses: no"})
    )
    printed = invoke("host", "--json", str(tmp_path / "h.json"))
    assert printed.exit_code == 0
    assert "heuristic" not in asked
    assert "liger was not timed, refuses: no" in printed.stdout
    assert "9.80 / 0.71" in printed.stdout  # of eager's 13.9 µs
    assert "10.10 / 0.72" in printed.stdout  # of its 14.1 µs with shapes in turn
    assert "7.60 / 0.55" in printed.stdout  # eager is given no out: of its 13.9 µs
    assert "15.10 / 0.89" in printed.stdout  # of torch's module
    assert isinstance(read_result(tmp_path / "h.json"), HostResult)

    states: list[tuple[str, str]] = []

    def child(way: str, environment: dict[str, str]) -> float:
        states.append((way, environment["TRITON_CACHE_DIR"]))
        return 2.0 if states.count(states[-1]) == 1 else 0.5

    monkeypatch.setattr(first_call, "run_child", child)
    printed = invoke("first-call", "--repeats", "2", "--json", str(tmp_path / "f.json"))
    assert printed.exit_code == 0, printed.output
    assert len(set(states)) == 2 * len(first_call.WAYS)  # a new cache for each way and repeat, used twice
    found = read_result(tmp_path / "f.json")
    assert isinstance(found, FirstCallResult)
    assert {way: (s["empty"].median, s["warm"].median) for way, s in found.seconds.items()} == dict.fromkeys(first_call.WAYS, (2.0, 0.5))


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("columns", [80, 160])
def test_train_prints_and_writes_every_loss(columns: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def faked(steps: int, *_: object) -> dict[str, train.Training]:
        of_all = {"operations": (12.0, 0.5), train.BASE: (10.0, 0.25), train.PATCHED: (8.0, 0.125)}
        return {name: train.Training([9.0 - offset] * steps, ms, 1000 * ms) for name, (ms, offset) in of_all.items()}

    monkeypatch.setattr(train, "trainings", faked)
    printed = invoke("train", "--json", str(tmp_path / "t.json"), columns=columns)
    assert printed.exit_code == 0, printed.output
    assert max(map(len, printed.stdout.split("a training step")[1].splitlines())) <= columns
    row = next(line.split() for line in printed.stdout.splitlines() if line.lstrip().startswith(train.PATCHED))
    assert row[1:4] == ["8.00", "1.25", "8000"]
    assert row[-1] == "8.8750"
    assert "over 50 steps: operations 0.2500, replace_rmsnorm 0.1250." in " ".join(printed.stdout.split())
    written = json.loads((tmp_path / "t.json").read_text())["trainings"]
    assert {name: len(one["losses"]) for name, one in written.items()} == dict.fromkeys(train.NORMS, 50)


@pytest.mark.parametrize("result", [run_result(), HOST, FIRST_CALL], ids=["run", "host", "first call"])
def test_results_survive_json(result: RunResult | HostResult | FirstCallResult, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(to_json(result))
    assert read_result(path) == result


def test_providers_are_split_over_as_many_tables_as_they_need() -> None:
    names = list(SLOWNESS)
    assert fitting(names, 160) == [names]
    assert [len(part) for part in fitting(names, 80)] == [3, 3, 2]
    assert fitting(names, 10) == [[name] for name in names]


def test_markdown_of_a_wrong_result_says_so() -> None:
    wrong = CaseResult(PROBLEMS[0], 1.0, {}, wrong={"tuned": "error is 3 × the tolerance"})
    text = run_markdown(RunResult(run_result().provenance, "gate", {"tuned": ""}, {}, (wrong,)))
    assert "| wrong |" in text
    assert "tuned is wrong on 1x4096 bf16: error is 3 × the tolerance" in text


def test_the_child_of_first_call_imports_nothing_before_its_clock() -> None:
    source = "import sys, benchmarks.first_call_child; sys.exit(bool({'kernels', 'triton', 'tuner'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", source], cwd=ROOT, check=False).returncode == 0
