"""`python -m tuner`: what it prints, writes and exits with. What compiles runs in processes without Triton's interpreter."""

import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from stand_ins import BEST, DEVICE, PROBLEMS, TROUBLE
from tuner.cli import main
from tuner.jobs import Job
from tuner.trials import TrialBook, now
from tuning_db.model import Source, Status, Sweep
from tuning_db.store import open_for_writing, read_records

ROOT = Path(__file__).resolve().parent.parent
TINY = ["sweep", "--arch", "sm_90", "--rows", "1,8", "--cols", "512", "--db", "t.sqlite"]
SLOWER = [
    "sweep",
    "--arch",
    "sm_90",
    "--rows",
    "1",
    "--dtype",
    "bf16,fp16,fp32",
    "--cols",
    "512,1024,2048,4096,8192,16384",
    "--db",
    "t.sqlite",
]
SLOWER_PROBLEMS = 18


class Shop:
    """A directory with a database, a Triton cache and a user's data directory of its own."""

    def __init__(self, path: Path, cache: Path) -> None:
        self.path, self.database = path, path / "t.sqlite"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RMSNORM_", "TRITON_", "COLUMNS"))}
        own = {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache), "XDG_DATA_HOME": str(path / "data")}
        self.environment = {**kept, **own, "PYTHONDONTWRITEBYTECODE": "1"}

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tuner", *arguments]
        return subprocess.Popen(
            command,
            cwd=self.path,
            env={**self.environment, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job starts with it ignored
        )

    def run(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*arguments, **environment)
        stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def stop_after_one(self, signal_number: int) -> tuple[int, str, str]:
        """Start the slower sweep and send its processes a signal as soon as one problem is recorded."""
        process = self.start(*SLOWER)
        assert process.stdout is not None
        for line in process.stdout:
            if line.lstrip("[ ").startswith("1/"):
                break
        os.killpg(process.pid, signal_number)
        stdout, stderr = process.communicate(timeout=120)
        return process.returncode, stdout, stderr

    def files(self) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in self.path.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shop, str]:
    """A shop after its first compile-only sweep, and what that printed at 80 columns."""
    shop = Shop(tmp_path_factory.mktemp("shop"), tmp_path_factory.mktemp("cache"))
    done = shop.run(*TINY, COLUMNS="80")
    assert (done.returncode, done.stderr) == (0, "")
    return shop, done.stdout


@pytest.fixture
def shop(tmp_path: Path, swept: tuple[Shop, str]) -> Shop:
    """An empty shop that shares the first one's compiled kernels."""
    return Shop(tmp_path, Path(swept[0].environment["TRITON_CACHE_DIR"]))


@pytest.fixture
def in_process(swept: tuple[Shop, str], monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """Runs commands that compile nothing, on the swept database."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("RMSNORM_TUNING_DB", str(swept[0].database))
    from kernels.dispatch import forget_records

    forget_records()
    return CliRunner()


def invoke(runner: CliRunner, *arguments: str, columns: int = 80) -> Result:
    result = runner.invoke(main, list(arguments), env={"COLUMNS": str(columns)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


def test_the_command_line_imports_neither_torch_nor_rich() -> None:
    check = "import sys, tuner.cli; sys.exit(bool({'torch', 'triton', 'rich', 'sqlite_utils'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


def test_help_documents_the_exit_codes() -> None:
    result = CliRunner().invoke(main, ["--help"], terminal_width=200)
    assert "0 all went well, 1 something failed, 2 wrong usage, 130 interrupted" in result.output
    for name in ("sweep", "status", "show", "explain", "export", "import", "devices", "doctor", "regret", "verify", "distil", "merge"):
        assert f"\n  {name} " in result.output
        assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0


def test_a_compile_only_sweep_from_end_to_end(swept: tuple[Shop, str]) -> None:
    shop, stdout = swept
    devices, records = read_records(shop.database, "sm_90")
    assert [device.name for device in devices] == ["H100 SXM5"]
    assert [(record.source, record.problem.rows) for record in records] == [(Source.MODELLED, 1), (Source.MODELLED, 8)]
    with open_for_writing(shop.database) as store:
        (sweep,) = store.sweeps()
        assert (sweep.state, json.loads(sweep.argv)) == ("finished", TINY)
        trials = {trial.uid: trial for trial in store.trials(devices[0].uid)}
    for record in records:
        taken = trials[record.trial_uid].resources
        assert taken is not None
        assert taken.registers > 0
        assert f"{taken.registers}" in stdout
    for text in ("registers", "spills", "shared", "load", "1x512 bf16", "2 of 2 problems are recorded", "t.sqlite"):
        assert text in stdout


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="needs a machine without a GPU")
def test_without_a_gpu_the_first_line_says_so(swept: tuple[Shop, str]) -> None:
    sentence = "No GPU here: compiling for sm_90 and recording the model's picks. Run this on a GPU to measure."
    assert " ".join(swept[1].splitlines()[:2]) == sentence  # two lines of 80 columns


def test_a_second_run_has_nothing_to_do(swept: tuple[Shop, str]) -> None:
    shop, _ = swept
    before = read_records(shop.database, "sm_90")
    done = shop.run(*TINY)
    assert done.returncode == 0
    last = done.stdout.splitlines()[-1]
    assert last.startswith("Nothing to do: 2 of 2 problems have records of today's kernels on sm_90-")
    assert last.endswith("in t.sqlite. Use --retune to model again.")
    assert read_records(shop.database, "sm_90") == before


def test_json_goes_to_stdout_and_progress_to_stderr(shop: Shop) -> None:
    done = shop.run(*TINY, "--json")
    assert done.returncode == 0
    (sweep,) = json.loads(done.stdout)["sweeps"]
    assert (sweep["problems"], sweep["recorded"], sweep["finished"], sweep["failed"]) == (2, 2, 2, 0)
    assert [record["problem"]["rows"] for record in sweep["records"]] == [1, 8]
    assert {record["load_bytes"] for record in sweep["records"]} == {16}  # whole vectors
    assert "[2/2] " in done.stderr  # of whichever was slower
    assert "] 8x512 bf16" in done.stderr


def test_a_dry_run_touches_no_file(shop: Shop) -> None:
    done = shop.run(*TINY, "--dry-run")
    assert done.returncode == 0
    assert "Would compile and model 2 problems" in done.stdout
    assert "Nothing was written." in done.stdout
    assert shop.files() == {}


def test_a_dry_run_counts_what_is_recorded(in_process: CliRunner) -> None:
    result = invoke(in_process, "sweep", "--arch", "sm_90", "--rows", "1,16", "--cols", "512", "--dry-run", columns=400)
    assert "Would compile and model 1 problem, " in result.output
    assert "skip 1 that are recorded" in result.output


def test_killed_then_interrupted_then_finished(shop: Shop) -> None:
    code, _, _ = shop.stop_after_one(signal.SIGKILL)
    assert code == -signal.SIGKILL
    killed_with = len(read_records(shop.database, "sm_90")[1])
    assert 1 <= killed_with < SLOWER_PROBLEMS
    code, stdout, stderr = shop.stop_after_one(signal.SIGINT)
    recorded = len(read_records(shop.database, "sm_90")[1])
    assert code == 130
    said = f"Interrupted: {recorded} of {SLOWER_PROBLEMS} problems are recorded in t.sqlite. The same command goes on from there."
    assert stdout.splitlines()[-1] == said
    assert stderr == ""
    assert recorded > killed_with
    done = shop.run(*SLOWER)
    assert done.returncode == 0
    assert f"{SLOWER_PROBLEMS} of {SLOWER_PROBLEMS} problems" in done.stdout
    assert len({record.problem for record in read_records(shop.database, "sm_90")[1]}) == SLOWER_PROBLEMS
    with open_for_writing(shop.database) as store:
        assert [sweep.state for sweep in store.sweeps()][:2] == ["running", "interrupted"]


def test_the_budget_ends_a_sweep(shop: Shop) -> None:
    done = shop.run(*TINY, "--budget", "0s")
    assert done.returncode == 0
    assert "0 of 2 problems are recorded" in done.stdout
    assert "The same command goes on from there." in done.stdout


@pytest.mark.parametrize("columns", [80, 160])
def test_no_line_is_longer_than_the_terminal(swept: tuple[Shop, str], in_process: CliRunner, columns: int) -> None:
    outputs = [swept[1] if columns == 80 else swept[0].run(*TINY, "--retune", COLUMNS=str(columns)).stdout]
    for arguments in (["show"], ["explain", "1", "512"], ["explain", "7", "8192"], ["devices"]):
        outputs.append(invoke(in_process, *arguments, columns=columns).output)
    for output in outputs:
        prose = [line for line in output.splitlines() if str(swept[0].database) not in line]
        assert widest("\n".join(prose)) <= columns, output


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["sweep", "--budget", "5"], 2, "'5' is no duration; write 90s, 10m or 1h"),
        (["sweep", "--budget", "-5m"], 2, "no duration"),
        (["sweep", "--arch", "sm_90", "sm_91"], 2, "'sm_91' is none of sm_80, sm_86"),
        (["sweep", "sm_90", "sm_80"], 2, "write --arch sm_90 sm_80"),
        (["sweep", "--arch", "sm_91"], 2, "'sm_91' is none of sm_80, sm_86"),
        (["sweep", "--dtype", "int8"], 2, "'int8' is none of float16, bfloat16, float32"),
        (["sweep", "--rows", "0"], 2, "'0' is no positive whole number"),
        (["sweep", "--rows", "9" * 5000, "--cols", "1"], 2, "is no positive whole number below 2**48"),
        (["sweep", "--workload", "quick", "--arch", "sm_90", "--cols", "7"], 2, "of workload quick has --cols 7"),
        (["sweep", "--workload", "absent.yaml", "--arch", "sm_90"], 1, "'absent.yaml' is neither one of quick, llm, full"),
        (["sweep", "--gpus", "one"], 2, "'one' is neither the number of a GPU nor `all`"),
        (["sweep", "--gpus", "0", "--arch", "sm_90"], 2, "--gpus names GPUs of this host; leave it out with --arch"),
        (["sweep", "--gpus", "0", "--ray", "auto"], 2, "--gpus names GPUs of this host; leave it out with --ray"),
        (["sweep", "--gpus", "0,99"], 1, "here: "),
        (["sweep", "--shard", "0/4"], 2, "'0/4' is no part of a whole; write 1/4, 2/4, 3/4 or 4/4"),
        (["sweep", "--shard", "5/4"], 2, "'5/4' is no part of a whole"),
        (["explain", "1", "512", "--inner-rows", "4"], 2, "--layout strided_axis"),
        (["explain", "1", "512", "--op", "rmsnorm_backward", "--layout", "two_stride"], 2, "--layout contiguous"),
        (["explain", "0", "512"], 2, "0 is not in the range"),
        (["explain", "1", "512", "--weight", "int8"], 2, "'int8' is none of"),
        (["export", "--arch", "sm_80"], 1, "has no records for sm_80"),
        (["status", "--db", "absent.sqlite"], 1, "absent.sqlite does not exist: `python -m tuner sweep` writes it"),
        (["show", "--db", __file__], 1, "can't be used"),
        (["import", __file__], 1, "line 1"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(in_process: CliRunner, arguments: list[str], code: int, said: str) -> None:
    result = invoke(in_process, *arguments)
    assert result.exit_code == code
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert said in last
    assert len(result.stderr.splitlines()) == 1


def test_a_broken_workload_names_file_line_and_key(in_process: CliRunner, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("problems:\n  - {x_dtype: bfloat16, w_dtype: same, rows: 1,\n     cols: wide}\n")
    result = invoke(in_process, "sweep", "--arch", "sm_90", "--workload", str(file))
    assert result.exit_code == 1
    assert result.stderr == f"Error: {file}, line 3, key `cols`: 'wide' is no positive whole number below 2**48\n"


def test_a_bad_setting_is_one_line(in_process: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMSNORM_BACKEND", "cuda")
    result = invoke(in_process, "status")
    assert (result.exit_code, result.stderr) == (1, "Error: RMSNORM_BACKEND is 'cuda'; use one of auto, triton, torch\n")


def test_the_interpreter_is_refused(in_process: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = invoke(in_process, "sweep", "--arch", "sm_90")
    assert (result.exit_code, "unset it" in result.stderr) == (1, True)


def test_status_counts(in_process: CliRunner) -> None:
    output = invoke(in_process, "status", columns=160).output
    (line,) = (line for line in output.splitlines() if line.split()[:2] == ["rmsnorm", "bfloat16"])
    assert line.split()[2:] == ["2", "0", "2", "0"]
    assert "failed: none" in output
    assert "finished" in output


def test_status_lists_what_is_not_tried_again(in_process: CliRunner, tmp_path: Path) -> None:
    """On its architecture and at today's revision, and so that it fits the terminal."""
    path = tmp_path / "faults.sqlite"
    job = Job(PROBLEMS[0], DEVICE, None, None, "sweep")
    book = TrialBook(job)
    book.add(TROUBLE, Status.TIMED_OUT, error="no sign of life for 30 s")
    book.add(BEST, Status.CRASHED, error="CUDA error: an illegal memory access was encountered")
    book.trials[1] = replace(book.trials[1], revision=book.trials[1].revision + 1)
    with open_for_writing(path) as store:
        store.add_device(DEVICE)
        store.add_sweep(Sweep("sweep", DEVICE.uid, now(), "", "host", "[]", "running", "3.6.0", "2.13.0"))
        store.add_trials(book.trials)
    for columns in (80, 160):
        output = invoke(in_process, "status", "--db", str(path), columns=columns).output
        assert widest("\n".join(line for line in output.splitlines() if str(path) not in line)) <= columns
    assert "Not tried again on sm_90" in output
    assert f"{TROUBLE}" in output
    assert "timed_out" in output
    assert "no sign of life for 30 s" in output
    assert "illegal memory access" not in output  # of another revision


def test_shards_are_the_whole(in_process: CliRunner) -> None:
    arguments = ["sweep", "--arch", "sm_90", "--workload", "quick", "--dry-run", "--json"]
    whole, *shards = (
        json.loads(invoke(in_process, *arguments, *more).stdout)[0] for more in ([], *(["--shard", f"{part}/3"] for part in (1, 2, 3)))
    )
    assert sum(shard["problems"] for shard in shards) == whole["problems"]
    assert all(shard["problems"] for shard in shards)


def test_show_filters(in_process: CliRunner) -> None:
    assert [record["problem"]["rows"] for record in json.loads(invoke(in_process, "show", "--json").output)] == [1, 8]
    (record,) = json.loads(invoke(in_process, "show", "--json", "--rows", "7").output)
    assert record["problem"]["rows"] == 8
    for nothing in (["--dtype", "fp32"], ["--cols", "1024"], ["--source", "measured"], ["--device", "sm_80"]):
        assert json.loads(invoke(in_process, "show", "--json", *nothing).output) == []


def test_explain_of_the_backward(in_process: CliRunner) -> None:
    explained = json.loads(invoke(in_process, "explain", "512", "4096", "--op", "rmsnorm_backward", "--arch", "sm_90", "--json").output)
    assert explained["problem"]["op"] == "rmsnorm_backward"
    assert explained["pick"]["config"]["variant"] == "backward_whole_row"


def test_explain_gives_the_record_and_what_came_without_it(in_process: CliRunner) -> None:
    (record, _) = json.loads(invoke(in_process, "show", "--json").output)
    explained = json.loads(invoke(in_process, "explain", "1", "512", "--arch", "sm_90", "--json").output)
    assert explained["assumed_device"] is True
    assert explained["fresh"] is True
    assert {**explained["pick"]["record"], "has_trials": not explained["imported"]} == record
    assert (explained["pick"]["tier"], explained["pick"]["distance"]) == ("modelled", 0)
    assert (explained["otherwise"]["tier"], explained["otherwise"]["record"]) == ("heuristic", None)  # 8 rows are no guide for one
    text = invoke(in_process, "explain", "1", "512", "--arch", "sm_90").output
    for part in ("6 of 8, modelled", "assumed", "fresh", "otherwise"):
        assert part in text


def test_explain_without_records_names_the_heuristic(in_process: CliRunner) -> None:
    explained = json.loads(invoke(in_process, "explain", "1", "512", "--arch", "gfx942", "--json").output)
    assert (explained["pick"]["tier"], explained["pick"]["record"], explained["otherwise"]) == ("heuristic", None, None)
    assert "sweep" in invoke(in_process, "explain", "1", "512", "--arch", "gfx942").output


def test_export_and_import_keep_every_record(in_process: CliRunner, tmp_path: Path, swept: tuple[Shop, str]) -> None:
    exported, copy = tmp_path / "e.jsonl", str(tmp_path / "copy.sqlite")
    assert invoke(in_process, "export", "--output", str(exported)).output == ""
    assert invoke(in_process, "export").output == exported.read_text()
    assert "2 records taken" in invoke(in_process, "import", "--db", copy, str(exported), columns=400).output
    assert invoke(in_process, "export", "--db", copy).output == exported.read_text()
    assert json.loads(invoke(in_process, "show", "--db", copy, "--json").output)[0]["has_trials"] is False
    invoke(in_process, "merge", str(swept[0].database), "--into", copy)
    assert invoke(in_process, "show", "--db", copy, "--json").output == invoke(in_process, "show", "--json").output


def test_devices_lists_databases_and_architectures(in_process: CliRunner) -> None:
    output = invoke(in_process, "devices", columns=240).output
    for text in ("t.sqlite", "--arch gfx942", "--arch sm_120", "sm_90-132sm-50MB-227KB-3352GBs"):
        assert text in output


def test_doctor_finds_nothing_wrong(in_process: CliRunner) -> None:
    result = invoke(in_process, "doctor")
    assert result.exit_code == 0, result.output
    assert "2 records for sm_90" in result.output or "GPU" in result.output


def test_doctor_names_the_cures(in_process: CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.sqlite"
    broken.write_text("no database at all, " * 100)
    monkeypatch.setenv("RMSNORM_TUNING_DB", str(broken))
    monkeypatch.setenv("RMSNORM_TUNING_DATABASE", "x")
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: {"kernels": ["kernels", "tuned-rmsnorm"]})
    result = invoke(in_process, "doctor")
    assert result.exit_code == 1
    lines = result.output.splitlines()
    found = [(line.split()[1], cure.split()[0]) for line, cure in itertools.pairwise(lines) if line.startswith("PROBLEM")]
    assert found == [("package", "cure:"), ("database", "cure:"), ("variable", "cure:")]
    assert "pip uninstall kernels" in result.output
