"""Stand-ins for what a sweep's stations need: a compile pool, and calls of a worker that succeed, crash, hang or raise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from kernels.heuristic import heuristic_config
from kernels.variants import candidates
from tuner import tuning
from tuner.cases import LAUNCHER_OF
from tuner.compiling import Compiled
from tuner.failure import ContextBroken, StationGone
from tuner.jobs import Job
from tuner.measure import Bench
from tuner.station import LocalStation
from tuner.trials import TrialBook
from tuner.tuning import TORCH
from tuner.worker import tell
from tuning_db.model import OPS, Config, Device, Measurement, Problem, Resources, Role, Status, Trial

if TYPE_CHECKING:
    import pytest

DEVICE = Device("sm_90", 132, 50 * 2**20, 227 * 2**10, 3352, name="a fake H100")
PROBLEMS = [Problem("rmsnorm", "bfloat16", "bfloat16", "bfloat16", rows, 4096) for rows in (1, 128, 2048)]
CONFIGS = [config for config in candidates(PROBLEMS[1], DEVICE) if config != heuristic_config(PROBLEMS[1], DEVICE)]
"""All but the heuristic's."""
TROUBLE = CONFIGS[0]
"""The config that `tune` has trouble with."""
BEST = CONFIGS[1]


class FakePool:
    """Stands for a CompilePool: everything compiles at once, but variants may be given another end."""

    progress = (0, 0)

    def __init__(self, ends: Mapping[str, Compiled] | None = None) -> None:
        self.ends = ends or {}
        self.submitted: set[Any] = set()

    def submit(self, binaries: Iterable[Any]) -> None:
        self.submitted.update(binaries)

    def result(self, binary: Any) -> Compiled:
        return self.ends.get(binary.variant, Compiled(Status.OK, Resources(32, 0, 0)))

    def load_bytes(self, binary: Any) -> int:
        return 8

    def close(self) -> None:
        pass


def measured(job: Job, configs: Iterable[Config]) -> tuple[Trial, ...]:
    """A final trial of each config: BEST takes 10 µs, the others 20."""
    book = TrialBook(job)
    for config in configs:
        median = 10.0 if config == BEST else 20.0
        timed = Measurement("graph-cold-1", median, median * 0.99, median * 1.01, 0.9, 9)
        book.add(config, Status.OK, role=Role.CANDIDATE, measurement=timed, final=True)
    return tuple(book.trials)


# What a worker calls instead of `tuner.tuning.open_gpu` and `tune`.


def open_fake() -> Device:
    return DEVICE


def open_nothing() -> Device:
    raise StationGone("the GPU can't be opened: it fell off the bus")


def tune(job: Job, compiled: Mapping[Config, Compiled]) -> tuple[Trial, ...]:
    for config in compiled:
        tell(config)
        if config == TROUBLE:
            make_trouble(os.environ["TROUBLE"])
    tell(None)
    if os.environ.get("TROUBLE") == "unknown":
        os.abort()
    return measured(job, compiled)


def make_trouble(kind: str) -> None:
    if kind == "abort":
        os.abort()
    if kind == "exit":
        os._exit(3)
    if kind == "hang":
        time.sleep(600)
    if kind == "broken":
        raise ContextBroken("CUDA error: an illegal memory access was encountered")
    if kind == "bug":
        raise KeyError("a programming error")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


# Calls for the tests of Worker and CompilePool.


def process_id() -> int:
    return os.getpid()


def environment(name: str) -> str | None:
    return os.environ.get(name)


def steps(count: int, seconds: float) -> str:
    for step in range(count):
        tell(step)
        time.sleep(seconds)
    return "done"


def hang_with_a_child(file: Path) -> None:
    """Start a process, as the compiler starts the assembler, note its id, and wait for it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    file.write_text(str(child.pid))
    child.wait()


def compile_or_not(binary: Any, *_: object) -> Compiled:
    """Instead of `tuner.compiling.compile_and_inspect`; a binary's name says how it ends."""
    make_trouble(str(binary))
    if binary == "killed once":
        mark = Path(os.environ["MARK"])
        if not mark.exists():
            mark.touch()
            make_trouble("killed")
    return Compiled(Status.OK, Resources(os.getpid(), 0, 0))


def disassemble_or_not(binary: Any, _: object) -> int:
    """Instead of `tuner.compiling.compile_and_disassemble`."""
    make_trouble(str(binary))
    return 16


# What a test of the pipeline has in its own process.

SLOW_US, TORCH_US, COPY_US = 20.0, 80.0, 9.0


class Lab:
    """Stands for GPU and compiler: each config's time, verdict of the verifier and of the compiler. Notes what was asked of it."""

    def __init__(self) -> None:
        self.times: dict[Config, float] = {}
        self.faults: dict[Config, str] = {}
        self.compiled: dict[str, Compiled] = {}
        self.built: set[Config] = set()
        self.built_ops: set[str] = set()
        self.timed: set[Config] = set()
        self.crash: Config | None = None
        self.told: object = None

    def time_us(self, config: Config) -> float:
        return TORCH_US if config == TORCH else self.times.get(config, SLOW_US)


class InProcess:
    """Stands for a Worker: calls here."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    @property
    def doing(self) -> object:
        return self.lab.told

    def call(self, function: Callable[..., Any], *arguments: object, limit_s: float) -> Any:
        assert limit_s > 0
        return function(*arguments)

    def discard(self) -> None:
        pass

    def close(self) -> None:
        pass


def faked(monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A Lab that answers instead of GPU, worker and compiler until the test ends."""
    lab = Lab()

    class FakeVerifier:
        def __init__(self, case: object) -> None:
            pass

        def fault(self, launcher: Any) -> str:
            if launcher.config == lab.crash:
                raise torch.AcceleratorError("CUDA error: an illegal memory access\nCompile with …")
            return lab.faults.get(launcher.config, "")

    class FakeBench:
        launches = 8
        sets = ()
        rounds = Bench.rounds

        def __init__(self, case: object, device: Device, seed: int) -> None:
            pass

        def enter(self, name: Config, launch: object, launches: int | None = None) -> None:
            lab.timed.add(name)

        def enter_launcher(self, name: Config, launcher: Any) -> None:
            assert launcher.config == name
            lab.timed.add(name)

        def round(self, order: list[Config]) -> dict[object, float]:
            assert set(order) <= lab.timed
            return {**{name: lab.time_us(name) for name in order}, "reference": COPY_US}

    def build_for(op: str) -> Any:
        def build(config: Config, *_: object) -> SimpleNamespace:
            lab.built.add(config)
            lab.built_ops.add(op)
            return SimpleNamespace(config=config)

        return build

    monkeypatch.setattr(tuning, "describe", lambda index: DEVICE)
    monkeypatch.setattr(tuning.torch.cuda, "init", lambda: None)
    monkeypatch.setattr(tuning, "tell", lambda doing: setattr(lab, "told", doing))
    monkeypatch.setattr(tuning, "Verifier", FakeVerifier)
    monkeypatch.setattr(tuning, "Bench", FakeBench)
    for op in OPS:
        monkeypatch.setitem(LAUNCHER_OF, op, build_for(op))
    monkeypatch.setattr("tuner.station.local_stations", lambda _, gpus: [stand_in_station(lab, gpu=bool(gpus))])
    return lab


def stand_in_station(lab: Lab, *, gpu: bool = True) -> LocalStation:
    pool: Any = FakePool(lab.compiled)
    worker: Any = InProcess(lab) if gpu else None
    return LocalStation(pool, worker)
