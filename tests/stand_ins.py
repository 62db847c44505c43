"""Stand-ins for what a sweep's stations need: a compile pool, and calls of a worker that succeed, crash, hang or raise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kernels.heuristic import heuristic_config
from kernels.variants import candidates
from tuner.compiling import Compiled
from tuner.failure import ContextBroken, StationGone
from tuner.jobs import Job
from tuner.trials import TrialBook
from tuner.worker import tell
from tuning_db.model import Config, Device, Measurement, Problem, Resources, Role, Status, Trial

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
