"""`rmsnorm` and the commands with bad databases, without a home, with threads and forks at the first lookup."""

import logging
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import platformdirs
import pytest
import torch
from click.testing import CliRunner, Result

from databases import DAMAGES, DEVICE, PROBLEM, SWEEP, damage_empty, damage_missing, edit, fill, make_trial
from interpreters import run_python
from kernels import dispatch, rmsnorm, stats
from kernels.api import forget_plans
from kernels.device import current_device
from kernels.settings import read_settings, user_database
from kernels.variants import VARIANTS, candidates
from oracle import INTERPRETED, assert_rmsnorm, random_x
from tuner.cli import main
from tuning_db.derive import derive_record
from tuning_db.jsonl import write_jsonl
from tuning_db.model import Config, Problem
from tuning_db.store import open_for_writing, read_records

ROOT = Path(__file__).parents[1]
HERE = Problem("rmsnorm", "float32", "none", "float32", 4, 200)
LEGAL = Config.of("looped", block_cols=2048, num_warps=8)
posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")


def record_here(path: Path, *configs: Config) -> Path:
    """A database whose records for HERE and its neighbours on this device name these configs."""
    device = current_device()
    with open_for_writing(path) as database:
        database.add_device(device)
        database.add_sweep(replace(SWEEP, device_uid=device.uid))
        for rows, config in enumerate(configs, start=4):
            revision = VARIANTS[config.variant].REVISION if config.variant in VARIANTS else 1
            problem = replace(HERE, rows=rows)
            trial = make_trial(f"t{rows}", config=config, problem=problem, device_uid=device.uid, revision=revision)
            database.add_trials([trial])
    return path


def lines_of_calls(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is logged while calls of four kinds run, each checked."""
    with caplog.at_level(logging.DEBUG, logger="tuned_rmsnorm"):
        for shape in ((4, 200), (4, 32), (8, 200), (5, 64)):
            x = random_x(shape, torch.float32)
            assert_rmsnorm(rmsnorm(x), x)
    return [record.getMessage() for record in caplog.records if record.name == "tuned_rmsnorm"]


# rmsnorm


@pytest.mark.parametrize(("damage", "found"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_a_bad_database_is_a_miss_and_one_line(
    damage: Callable[[Path], None], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = record_here(tmp_path / "a.db", LEGAL)
    damage(path)
    before = path.read_bytes() if path.is_file() else b""
    monkeypatch.setenv("RMSNORM_TUNING_DB", str(path))
    (line,) = lines_of_calls(caplog)
    assert str(path) in line
    assert found in line
    assert (path.read_bytes() if path.is_file() else b"") == before
    assert stats() == {"heuristic": 4}


def test_damaged_rows_are_one_line_and_the_others_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = record_here(tmp_path / "a.db", LEGAL, LEGAL, LEGAL)
    edit(path, "UPDATE record SET median_us = 1.0 WHERE rows > 4")
    edit(path, "UPDATE device SET name = 'another'")
    monkeypatch.setenv("RMSNORM_TUNING_DB", str(path))
    (line,) = lines_of_calls(caplog)
    assert "damaged" in line
    assert stats()["exact"] == 1


def test_no_database_of_ones_own_is_nothing_to_tell(caplog: pytest.LogCaptureFixture) -> None:
    assert lines_of_calls(caplog) == []
    assert not user_database().parent.exists()


@pytest.mark.parametrize("path", ["~nobody_has_this_name/tuning.sqlite", "x" * 300, "relative/tuning.sqlite"])
def test_an_odd_path_is_a_miss_and_one_line(path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("RMSNORM_TUNING_DB", path)
    assert len(lines_of_calls(caplog)) == 1


@pytest.fixture
def nobodys_folder() -> Iterator[Path]:
    """A folder that tests take permissions away from; root becomes nobody for as long."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    if os.getuid() == 0:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


@posix
@pytest.mark.parametrize(("mode", "file_mode", "served", "lines"), [(0o555, 0o644, 1, 0), (0o755, 0o000, 0, 1), (0o000, 0o644, 0, 1)])
def test_what_may_not_be_written_is_read_and_what_may_not_be_read_is_a_miss(
    mode: int,
    file_mode: int,
    served: int,
    lines: int,
    nobodys_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = record_here(nobodys_folder / "a.db", LEGAL)
    lines_of_calls(caplog)
    monkeypatch.setenv("RMSNORM_TUNING_DB", str(path))
    forget_plans()
    lines_of_calls(caplog)  # now all is compiled, with and without the record, that nobody could not write to root's cache
    caplog.clear()
    forget_plans()
    path.chmod(file_mode)
    nobodys_folder.chmod(mode)
    if os.geteuid() == 0:
        os.seteuid(65534)
    assert len(lines_of_calls(caplog)) == lines
    assert stats().get("exact", 0) == served


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The working folder of a user without a home: a container's number without a name."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_home_calls_work_and_nothing_is_written(
    homeless: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert lines_of_calls(caplog) == []
    assert list(homeless.iterdir()) == []
    monkeypatch.setattr(platformdirs, "user_data_dir", lambda *_, **__: "~/.local/share/tuned-rmsnorm")  # as older ones answer
    assert read_settings().databases == ()
    forget_plans()
    assert lines_of_calls(caplog) == []
    assert list(homeless.iterdir()) == []


ILLEGAL = [
    Config.of("looped", block_cols=3, num_warps=8),
    Config.of("looped", block_cols=2048, num_warps=64),
    Config.of("looped", block_cols=2048, num_warps=8, PTX="ret;"),
    Config.of("looped", block_cols="2048", num_warps=8),
    Config.of("looped"),
    Config.of("strided_axis", block_inner=16, block_cols=16, num_warps=4),
    Config.of("backward_whole_row", num_warps=4),
    Config.of("os.system", command="true"),
    Config.of("torch", command="true") if INTERPRETED else Config.of("no such variant"),
]


@pytest.mark.parametrize("config", ILLEGAL, ids=str)
def test_a_record_outside_its_space_is_never_launched(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wrote it, checksum and evidence and all; the record of a neighbour that is legal serves."""
    monkeypatch.setenv("RMSNORM_TUNING_DB", str(record_here(tmp_path / "a.db", config, LEGAL)))
    built: list[Config] = []
    real = dispatch.build_launcher
    monkeypatch.setattr(dispatch, "build_launcher", lambda config, *rest: built.append(config) or real(config, *rest))
    x = random_x((4, 200), torch.float32)
    assert_rmsnorm(rmsnorm(x), x)
    assert built == [LEGAL]
    assert stats() == {"nearest_rows": 1}


# Threads and forks


FIRST_CALLS = """
    import logging, os, threading, time
    from pathlib import Path
    import torch
    from kernels import dispatch, rmsnorm
    from kernels.api import forget_plans
    from kernels.reference import rmsnorm_torch

    torch.set_num_threads(1)  # a child of a fork can't use its parent's pool of threads
    os.environ["RMSNORM_TUNING_DB"] = {path!r}
    lines, xs = [], [torch.randn(rows, 64) for rows in range(1, 9)]
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((os.getpid(), record.getMessage()))
    logging.getLogger("tuned_rmsnorm").addHandler(handler)
    logging.getLogger("tuned_rmsnorm").propagate = False
    # Triton's interpreter serves one thread at a time: PyTorch runs instead of the kernels, and the lookup is the real one.
    dispatch.build_launcher = lambda *_: lambda y, x, weight, eps: rmsnorm_torch(x, weight, eps, -1)

    def call_all():
        return all(torch.equal(rmsnorm(x), rmsnorm_torch(x, None, 1e-6, -1)) for x in xs)

    # Imports and PyTorch's own first calls take locks as well: they are over, and what a fork finds under way is the lookup alone.
    assert call_all()
    forget_plans()
    lines.clear()

    def in_child(seconds=20):
        pid = os.fork()
        if pid == 0:
            lines.clear()
            os._exit(0 if call_all() and len(lines) <= 1 else 1)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert os.waitstatus_to_exitcode(status) == 0, "a child failed"
                return
            time.sleep(0.002)
        os.kill(pid, 9)
        raise SystemExit("a child hangs")
"""


@pytest.mark.skipif(not INTERPRETED, reason="a forked child can't use its parent's GPU")
def test_a_fork_while_a_thread_reads_the_databases(tmp_path: Path) -> None:
    """The child can look up and say so for itself: it inherits no lock that a thread of its parent held."""
    source = (
        FIRST_CALLS.format(path=str(tmp_path / "absent.db"))
        + """
    real, reading = dispatch.read_settings, threading.Event()

    def slowly():
        if not reading.is_set():
            reading.set()
            time.sleep(0.3)
        return real()

    dispatch.read_settings = slowly
    thread = threading.Thread(target=call_all)
    thread.start()
    reading.wait()
    in_child()
    thread.join()
    in_child()
    """
    )
    assert run_python(source) == ""


@pytest.mark.skipif(not INTERPRETED, reason="a forked child can't use its parent's GPU")
def test_threads_and_forks_at_the_first_lookup(tmp_path: Path) -> None:
    """Thirty times four threads call first at once while two forks happen: each process tells of a bad database once, and nobody hangs."""
    path = tmp_path / "bad.db"
    path.write_bytes(b"no database, " * 1000)
    source = (
        FIRST_CALLS.format(path=str(path))
        + """
    import random

    draw = random.Random(1)
    for _ in range(30):
        forget_plans()
        lines.clear()
        together, results = threading.Barrier(5), []

        def work():
            together.wait()
            results.append(call_all())

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        together.wait()
        for _ in range(2):
            time.sleep(draw.uniform(0, 0.003))
            in_child()
        for thread in threads:
            thread.join()
        assert results == [True] * 4, results
        assert [pid for pid, _ in lines] == [os.getpid()], lines
    """
    )
    assert run_python(source) == ""


@pytest.mark.skipif(not INTERPRETED, reason="a forked child can't use its parent's GPU")
def test_a_fork_works_before_and_after_the_first_call() -> None:
    """The child of a process with and without plans runs the kernels and gets the same values."""
    source = """
    import os, torch
    from kernels import rmsnorm
    x = torch.randn(4, 64)

    def in_child(want):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if torch.equal(rmsnorm(x), want if want is not None else rmsnorm(x)) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    in_child(None)
    in_child(rmsnorm(x))
    """
    assert run_python(source) == ""


# Commands


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return CliRunner()


def invoke(runner: CliRunner, *arguments: object, columns: int = 80) -> Result:
    result = runner.invoke(main, list(map(str, arguments)), env={"COLUMNS": str(columns)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize("columns", [80, 160])
def test_merge_says_what_it_found(runner: CliRunner, tmp_path: Path, columns: int) -> None:
    one = fill(tmp_path / "a.db", make_trial("t1", 50.0), make_trial("edited", 60.0, final=False))
    faster = Config.of("multi_row", rows_per_program=2, num_warps=8)
    two = fill(tmp_path / "b.db", make_trial("t2", 40.0, faster, race_uid="r2", created_at="2026"), make_trial("edited", 61.0, final=False))
    for new in ([2, 2], [0, 0]):
        done = invoke(runner, "merge", one, two, "--into", tmp_path / "c.db", columns=columns)
        assert done.exit_code == 0
        said = " ".join(done.output.split())
        for path, number in zip((one, two), new, strict=True):
            assert f"{path.name}: {number} new trials" in said
        assert "c.db: 1 record of 1 device, 0 of them imported without trials" in said
        assert "1 trial edited after being written; both versions are kept: edited" in said
        for text in ("name different winners", "multi_row", "40.00", "50.00", "The newest race decides"):
            assert text in said
        assert max(len(line) for line in done.output.splitlines() if str(tmp_path) not in line) <= columns
    assert [record.config for record in read_records(tmp_path / "c.db", "sm_90")[1]] == [faster]


def test_merge_goes_into_the_users_database(runner: CliRunner, filled: Path) -> None:
    assert invoke(runner, "merge", filled).exit_code == 0
    assert len(read_records(user_database(), "sm_90")[1]) == 2


def test_import_names_the_command_for_databases(runner: CliRunner, filled: Path) -> None:
    done = invoke(runner, "import", filled)
    said = f"Error: {filled} is a database: `python -m tuner merge {filled}` takes it in with its trials\n"
    assert (done.exit_code, done.stderr) == (1, said)


def test_an_imported_record_is_marked(runner: CliRunner, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(PROBLEM, cols=512)
    config = candidates(problem, DEVICE)[0]
    record = derive_record([make_trial("elsewhere", config=config, problem=problem, revision=VARIANTS[config.variant].REVISION)])
    (tmp_path / "e.jsonl").write_text(write_jsonl([*read_records(filled, "sm_90")[0]], [record]))
    assert "1 records taken" in invoke(runner, "import", tmp_path / "e.jsonl", "--db", filled, columns=400).output
    shown = [line for line in invoke(runner, "show", "--db", filled, columns=200).output.splitlines() if "imported" in line]
    assert len(shown) == 1
    assert "4096x512" in shown[0]
    assert '"has_trials": false' in invoke(runner, "show", "--db", filled, "--cols", "512", "--json").output
    assert '"has_trials": true' in invoke(runner, "show", "--db", filled, "--cols", "4096", "--json").output
    assert "1 record imported without trials" in invoke(runner, "status", "--db", filled).output
    monkeypatch.setenv("RMSNORM_TUNING_DB", str(filled))
    explained = invoke(runner, "explain", "4096", "512", "--weight", "float32", "--arch", "sm_90").output
    assert "imported, without its trials" in " ".join(explained.split())


COMMANDS = ("merge into", "merge from", "import", "sweep")
CREATED = (damage_missing, damage_empty)
"""What a command that writes creates, or takes for new."""


@pytest.mark.parametrize(
    ("command", "damage"),
    [(command, damage) for command in COMMANDS for damage, _ in DAMAGES if command == "merge from" or damage not in CREATED],
)
def test_a_bad_file_is_one_line_and_stays_as_it_is(
    command: str, damage: Callable[[Path], None], filled: Path, tmp_path: Path, runner: CliRunner
) -> None:
    good = fill(tmp_path / "good.db", make_trial("t3"))
    exported = tmp_path / "e.jsonl"
    exported.write_text(invoke(runner, "export", "--db", good).output)
    damage(filled)
    before = filled.read_bytes() if filled.is_file() else b""
    arguments = {
        "merge into": ("merge", good, "--into", filled),
        "merge from": ("merge", good, filled, "--into", tmp_path / "new.db"),
        "import": ("import", exported, "--db", filled),
        "sweep": ("sweep", "--arch", "sm_90", "--rows", "1", "--cols", "64", "--db", filled),
    }[command]
    done = invoke(runner, *arguments)
    assert done.exit_code in (1, 2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert str(filled) in line
    assert (filled.read_bytes() if filled.is_file() else b"") == before
    new = tmp_path / "new.db"
    assert not new.exists() or read_records(new, "sm_90") == ([], [])


@pytest.mark.parametrize(
    "arguments", [("merge", "a.db"), ("sweep", "--arch", "sm_90", "--rows", "1", "--cols", "64")], ids=["merge", "sweep"]
)
def test_without_a_home_a_command_asks_for_a_file(arguments: tuple[str, ...], filled: Path, homeless: Path, runner: CliRunner) -> None:
    before = sorted(homeless.iterdir())
    done = invoke(runner, *arguments)
    said = "Error: this user has no home directory for a database: name a file by RMSNORM_TUNING_DB or --db\n"
    assert (done.exit_code, done.stderr) == (1, said)
    assert sorted(homeless.iterdir()) == before
    assert filled in before


@pytest.mark.parametrize("command", [("merge", "a.db"), ("devices",), ("status",)], ids=lambda command: command[0])
def test_an_odd_path_is_one_line_to_a_command(
    command: tuple[str, ...], filled: Path, monkeypatch: pytest.MonkeyPatch, runner: CliRunner
) -> None:
    monkeypatch.chdir(filled.parent)
    monkeypatch.setenv("RMSNORM_TUNING_DB", "x" * 300)
    done = invoke(runner, *command)
    assert done.exit_code == (0 if command == ("devices",) else 1)
    assert [line.startswith("Error: xxx") for line in done.stderr.splitlines()] == [True] * done.exit_code


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
def test_a_disk_that_is_full_in_the_middle_of_a_commit(filled: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk's end. The merge says one line, and goes through once there is room."""
    many = fill(tmp_path / "many.db", *(make_trial(f"m{at}", race_uid="r2", created_at="2026", error="e" * 300) for at in range(1000)))
    before = read_records(filled, "sm_90")
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
    merge = "sys.argv[1:] = ['merge', *sys.argv[1:]]; runpy.run_module('tuner', run_name='__main__')"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    for start, code in ((limited, 1), ("import runpy, sys; ", 0)):
        command = [sys.executable, "-c", start + merge, str(many), "--into", str(filled)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code, done.stderr
        if code:
            (line,) = done.stderr.splitlines()
            assert f"Error: {filled} can't be written further" in line
            assert "free some space; what was recorded before is kept" in line
            assert read_records(filled, "sm_90") == before
    assert "1000 new trials" in done.stdout
    assert len(read_records(filled, "sm_90")[1]) == 2
