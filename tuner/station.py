"""A station of this host: compile, then tune in a worker process that sees one GPU alone, and find out who was at fault if it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence

import torch

from kernels.variants import candidates
from tuner.architectures import target_of
from tuner.compile_only import SEARCHES_PER_WORKER, search
from tuner.compiling import Compiled, CompilePool, binary_for
from tuner.failure import ContextBroken, JobLost, StationGone
from tuner.jobs import Job, Outcome
from tuner.trials import TrialBook
from tuner.tuning import open_gpu, tune
from tuner.worker import Died, TimedOut, Worker
from tuning_db.model import Config, Device, Status

STEP_LIMIT_S = 30.0
"""Longest time for one step of tuning, a config's verification say, before it counts as hung."""
OPEN_LIMIT_S = 120.0
"""Longest time for a new process to import torch and open its GPU."""


class LocalStation:
    """Runs jobs on one GPU of this host, or, with `worker` None, such as need none."""

    lookahead = sys.maxsize

    def __init__(self, pool: CompilePool, worker: Worker | None, step_limit_s: float = STEP_LIMIT_S) -> None:
        self.compiler = pool
        self._worker = worker
        self._step_limit_s = step_limit_s

    @property
    def progress(self) -> tuple[int, int]:
        return self.compiler.progress

    def prepare(self, job: Job, barred: Collection[Config]) -> None:
        if self._worker is None:  # a search compiles one binary after the other
            return
        target = target_of(job.device.arch, job.device.warp_size)
        self.compiler.submit(binary_for(job.problem, config, target) for config in _configs(job, barred))

    def run(self, job: Job, barred: Collection[Config]) -> Outcome:
        if self._worker is None:
            return search(job, self.compiler, barred)
        self.prepare(job, barred)
        self._open(self._worker, job.device)
        target = target_of(job.device.arch, job.device.warp_size)
        compiled = {config: self.compiler.result(binary_for(job.problem, config, target)) for config in _configs(job, barred)}
        return self._tune(self._worker, job, compiled)

    def close(self) -> None:
        self.compiler.close()
        if self._worker is not None:
            self._worker.close()

    def _open(self, worker: Worker, device: Device) -> None:
        """Open the GPU while binaries compile; a moment's work where it is open. Never measure under another device's name."""
        for _ in range(2):  # an idle process may have been killed
            try:
                found = worker.call(open_gpu, limit_s=OPEN_LIMIT_S)
                break
            except (TimedOut, Died) as error:
                reason = error
        else:
            raise StationGone(f"the GPU can't be opened: {reason}") from reason
        if found != device:
            raise StationGone(f"this GPU is a {found.uid}, not a {device.uid}")

    def _tune(self, worker: Worker, job: Job, compiled: Mapping[Config, Compiled]) -> Outcome:
        try:
            return Outcome(job, worker.call(tune, job, compiled, limit_s=self._step_limit_s))
        except TimedOut as error:
            status, what, blameless = Status.TIMED_OUT, str(error), False
        except ContextBroken as error:
            status, what, blameless = Status.CRASHED, str(error), False
        except Died as error:
            status, what, blameless = Status.CRASHED, str(error), error.killed
        worker.discard()
        config = worker.doing
        if blameless or not isinstance(config, Config):
            raise JobLost(what)
        book = TrialBook(job)
        book.add(config, status, error=what, resources=compiled[config].resources)
        return Outcome(job, tuple(book.trials), finished=False)


def local_stations(device: Device, gpus: Sequence[int]) -> list[LocalStation]:
    """One for each of this process's GPUs by index, or as many that need no GPU as keep the compilers busy, which all of them share."""
    pool = CompilePool(device, target_of(device.arch, device.warp_size))
    if gpus:
        return [LocalStation(pool, Worker(sees_only(gpu))) for gpu in gpus]
    return [LocalStation(pool, None) for _ in range(SEARCHES_PER_WORKER * pool.workers)]


def sees_only(gpu: int) -> dict[str, str]:
    """The environment in which a new process sees one of this process's GPUs, as its GPU 0."""
    name = "CUDA_VISIBLE_DEVICES" if torch.version.hip is None else "HIP_VISIBLE_DEVICES"
    listed = os.environ.get(name, "")
    return {name: listed.split(",")[gpu].strip() if listed else str(gpu)}


def _configs(job: Job, barred: Collection[Config]) -> list[Config]:
    wanted = candidates(job.problem, job.device) if job.entrants is None else job.entrants
    return [config for config in wanted if config not in barred]
