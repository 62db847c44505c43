"""Worker processes and what is built on them: whoever exits, hangs, raises or is killed costs one process, and is named."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import stand_ins
from stand_ins import BEST, DEVICE, PROBLEMS, TROUBLE, FakePool
from tuner import compiling
from tuner import station as stations
from tuner.architectures import target_of
from tuner.compiling import CompilePool, usable_cores
from tuner.events import Event, Faulted, Finished
from tuner.failure import Failure, StationGone
from tuner.station import LocalStation, local_stations, sees_only
from tuner.sweep import sweep
from tuner.worker import Died, TimedOut, Worker
from tuning_db.model import Status
from tuning_db.store import Store, open_for_writing

LIMIT_S = 60.0
"""For what is to succeed: far longer than a process takes to start on a busy machine."""
SHORT_S = 1.5
"""For what is to hang."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_for_writing(tmp_path / "tuning.sqlite") as opened:
        yield opened


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker({"OWN": "yes"})
    yield made
    made.close()


def is_alive(process_id: int) -> bool:
    """Whether a process runs; one that has ended and is not reaped does not."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_calls_share_a_process_with_an_environment_of_its_own(worker: Worker) -> None:
    first = worker.call(stand_ins.process_id, limit_s=LIMIT_S)
    assert first != os.getpid()
    assert worker.call(stand_ins.process_id, limit_s=LIMIT_S) == first
    assert worker.call(stand_ins.environment, "OWN", limit_s=LIMIT_S) == "yes"
    assert "OWN" not in os.environ


def test_the_limit_is_for_each_step(worker: Worker) -> None:
    worker.call(stand_ins.process_id, limit_s=LIMIT_S)
    assert worker.call(stand_ins.steps, 6, SHORT_S / 3, limit_s=SHORT_S) == "done"
    assert worker.doing == 5


@pytest.mark.parametrize(
    ("kind", "said", "killed"), [("abort", "SIGABRT", False), ("exit", "exit code 3", False), ("killed", "SIGKILL", True)]
)
def test_a_process_that_ends_is_told_how_and_replaced(worker: Worker, kind: str, said: str, killed: bool) -> None:
    with pytest.raises(Died, match=said) as died:
        worker.call(stand_ins.make_trouble, kind, limit_s=LIMIT_S)
    assert died.value.killed is killed
    assert worker.call(stand_ins.environment, "OWN", limit_s=LIMIT_S) == "yes"


def test_a_bug_arrives_with_its_traceback_and_costs_no_process(worker: Worker) -> None:
    before = worker.call(stand_ins.process_id, limit_s=LIMIT_S)
    with pytest.raises(RuntimeError, match=r"(?s)stand_ins.py.*KeyError: 'a programming error'"):
        worker.call(stand_ins.make_trouble, "bug", limit_s=LIMIT_S)
    assert worker.call(stand_ins.process_id, limit_s=LIMIT_S) == before


def test_what_hangs_is_killed_with_what_it_started(worker: Worker, tmp_path: Path) -> None:
    process = worker.call(stand_ins.process_id, limit_s=LIMIT_S)
    file = tmp_path / "child"
    with pytest.raises(TimedOut, match=r"no sign of life for 1\.5 s"):
        worker.call(stand_ins.hang_with_a_child, file, limit_s=SHORT_S)
    wait_until(lambda: not is_alive(process) and not is_alive(int(file.read_text())))
    assert worker.call(stand_ins.process_id, limit_s=LIMIT_S) != process


def test_a_process_that_can_not_be_killed_ends_its_worker(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that hung is told as such first, so that it can be recorded."""
    process = worker.call(stand_ins.process_id, limit_s=LIMIT_S)
    with monkeypatch.context() as patched:
        patched.setattr("tuner.worker.kill_group", lambda process: None)
        patched.setattr("tuner.worker.END_LIMIT_S", 0.1)
        with pytest.raises(TimedOut):
            worker.call(stand_ins.steps, 1, 600.0, limit_s=SHORT_S)
        assert worker.doing == 0
        with pytest.raises(StationGone, match=f"process {process} can't be killed"):
            worker.call(stand_ins.process_id, limit_s=LIMIT_S)
    worker.close()
    wait_until(lambda: not is_alive(process))


def test_a_worker_killed_while_idle_is_replaced(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    monkeypatch.setattr(stations, "open_gpu", stand_ins.open_fake)
    monkeypatch.setattr(stations, "tune", stand_ins.tune)
    pool: Any = FakePool()
    worker = Worker({"TROUBLE": ""})
    os.kill(worker.call(stand_ins.process_id, limit_s=LIMIT_S), signal.SIGKILL)
    sweep(PROBLEMS, DEVICE, None, [LocalStation(pool, worker)], store, ["sweep"], lambda event: None, None)
    assert [record.problem for record in store.records()] == PROBLEMS


def test_a_closed_worker_starts_nothing(worker: Worker) -> None:
    worker.close()
    with pytest.raises(StationGone):
        worker.call(stand_ins.process_id, limit_s=LIMIT_S)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompilePool]:
    """Two processes that compile nothing: the names of what they are given say how it ends."""
    monkeypatch.setattr(compiling, "compile_and_inspect", stand_ins.compile_or_not)
    made = CompilePool(DEVICE, target_of(DEVICE.arch, 32), workers=2, limit_s=SHORT_S)
    for worker in made._workers:  # else the start of a process would count
        worker.call(stand_ins.process_id, limit_s=LIMIT_S)
    yield made
    made.close()


def test_a_compiler_that_hangs_or_dies_costs_one_process(pool: CompilePool) -> None:
    binaries: Any = ["hang", "good", "abort", "fine"]
    pool.submit(binaries)
    hung, good, aborted, fine = map(pool.result, binaries)
    assert (hung.status, hung.error) == (Status.TIMED_OUT, "compiling: no sign of life for 1.5 s")
    assert (aborted.status, aborted.error) == (Status.COMPILE_ERROR, "the process ended with SIGABRT")
    assert good.status is fine.status is Status.OK
    assert pool.progress == (4, 4)


def test_a_disassembler_that_hangs_or_dies_costs_one_process_and_tells_nothing(pool: CompilePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "compile_and_disassemble", stand_ins.disassemble_or_not)
    binaries: Any = ["hang", "good", "abort", "fine"]
    assert [pool.load_bytes(binary) for binary in binaries] == [None, 16, None, 16]
    assert pool.progress == (0, 0)  # those are no compilations


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux's affinity of processes to cores")
def test_a_pool_takes_the_cores_that_it_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cores() == len(before)


def test_a_compile_process_killed_from_outside_is_replaced_once(pool: CompilePool, tmp_path: Path) -> None:
    for worker in pool._workers:
        worker.discard()
        worker._environment["MARK"] = str(tmp_path / "mark")
        worker.call(stand_ins.process_id, limit_s=LIMIT_S)
    binaries: Any = ["killed once", "killed"]
    pool.submit(binaries)
    assert pool.result(binaries[0]).status is Status.OK
    with pytest.raises(Failure, match="a compile process was killed twice, likely for want of memory"):
        pool.result(binaries[1])


def swept(monkeypatch: pytest.MonkeyPatch, store: Store, *troubles: str, events: list[Event] | None = None) -> None:
    """A sweep of PROBLEMS on a station for each of `troubles`, whose worker has that trouble with TROUBLE."""
    monkeypatch.setattr(stations, "open_gpu", stand_ins.open_nothing if "no gpu" in troubles else stand_ins.open_fake)
    monkeypatch.setattr(stations, "tune", stand_ins.tune)
    pool: Any = FakePool()
    made = [LocalStation(pool, Worker({"TROUBLE": trouble}), step_limit_s=SHORT_S) for trouble in troubles]
    sweep(PROBLEMS, DEVICE, None, made, store, ["sweep"], (events if events is not None else []).append, None)


@pytest.mark.parametrize(
    ("trouble", "status", "said"),
    [
        ("abort", Status.CRASHED, "the process ended with SIGABRT"),
        ("exit", Status.CRASHED, "the process ended with exit code 3"),
        ("broken", Status.CRASHED, "CUDA error: an illegal memory access was encountered"),
        ("hang", Status.TIMED_OUT, "no sign of life for 1.5 s"),
    ],
)
def test_a_config_costs_its_worker_not_the_sweep(
    monkeypatch: pytest.MonkeyPatch, store: Store, trouble: str, status: Status, said: str
) -> None:
    events: list[Event] = []
    swept(monkeypatch, store, trouble, events=events)
    (trial,) = (trial for trial in store.trials(DEVICE.uid) if trial.status is not Status.OK)
    assert (trial.config, trial.problem, trial.status, trial.error) == (TROUBLE, PROBLEMS[0], status, said)
    assert trial.resources is not None
    assert [(record.problem, record.config) for record in store.records()] == [(problem, BEST) for problem in PROBLEMS]
    assert [event.trial for event in events if isinstance(event, Faulted)] == [trial]
    swept(monkeypatch, store, trouble)
    assert [trial.uid for trial in store.trials_with(DEVICE.arch, (status,))] == [trial.uid]  # not tried again


def test_a_worker_killed_from_outside_says_nothing_against_a_config(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    events: list[Event] = []
    with pytest.raises(Failure, match="the sweep can't go on: the process ended with SIGKILL"):
        swept(monkeypatch, store, "killed", events=events)
    notes = [event.note for event in events if isinstance(event, Finished)]
    assert notes == ["given up after 3 tries: the process ended with SIGKILL"]
    assert store.trials(DEVICE.uid) == []


def test_a_job_that_is_lost_on_one_station_is_done_by_another(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    """The first station loses whatever it gets; it is left behind once it has lost too much in a row, or the work is done."""
    monkeypatch.setattr("tuner.fleet.JOB_LOSSES", 9)
    monkeypatch.setattr("tuner.fleet.STATION_LOSSES", 1)
    swept(monkeypatch, store, "unknown", "")
    assert [(record.problem, record.config) for record in store.records()] == [(problem, BEST) for problem in PROBLEMS]


def test_without_a_gpu_that_works_the_sweep_says_why(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    with pytest.raises(Failure, match="the sweep can't go on: the GPU can't be opened: it fell off the bus"):
        swept(monkeypatch, store, "no gpu", "no gpu")
    assert [row.state for row in store.sweeps()] == ["interrupted"]


def test_a_bug_ends_the_sweep(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    with pytest.raises(RuntimeError, match="a programming error"):
        swept(monkeypatch, store, "bug")
    assert store.trials(DEVICE.uid) == []


@pytest.mark.parametrize(("listed", "gpu", "seen"), [(None, 2, "2"), ("5,7", 1, "7"), ("GPU-a, GPU-b", 1, "GPU-b"), ("", 1, "1")])
def test_a_worker_sees_one_gpu_of_those_that_this_process_sees(
    monkeypatch: pytest.MonkeyPatch, listed: str | None, gpu: int, seen: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert sees_only(gpu) == {"CUDA_VISIBLE_DEVICES": seen}


def test_gpus_share_their_compile_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    made = local_stations(DEVICE, (0, 2))
    try:
        assert len({id(station.compiler) for station in made}) == 1
        assert [station._worker and station._worker._environment for station in made] == [sees_only(0), sees_only(2)]
    finally:
        for station in made:
            station.close()


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """Killed in mid-call, the parent leaves neither its worker nor the worker's child behind."""
    file = tmp_path / "child"
    source = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from stand_ins import hang_with_a_child, process_id
from tuner.worker import Worker
worker = Worker()
print(worker.call(process_id, limit_s=60), flush=True)
worker.call(hang_with_a_child, Path({str(file)!r}), limit_s=60)
"""
    parent = subprocess.Popen([sys.executable, "-c", source], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        process = int(parent.stdout.readline())
        wait_until(lambda: file.exists() and file.read_text() != "")
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.communicate()
    wait_until(lambda: not is_alive(process) and not is_alive(int(file.read_text())))
