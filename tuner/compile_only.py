"""The sweep without a GPU, one problem: compile what the model can't rule out, and take the model's pick."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from kernels.launch import Binary
from kernels.variants import candidates
from tuner.architectures import target_of
from tuner.compiling import Compiled, CompilePool, binary_for
from tuner.jobs import Job, Outcome
from tuner.model import least_us, modelled
from tuner.trials import TrialBook
from tuning_db.derive import TIE, derive_record
from tuning_db.model import Config, Status

SEARCHES_PER_WORKER = 4
"""Problems in work, each with one binary under way: enough that no worker waits, few enough to lose little when interrupted."""


def search(job: Job, pool: CompilePool, barred: Collection[Config]) -> Outcome:
    """The model's pick of all candidates but the barred ones, and what its binary loads at once."""
    found = Search(job, barred)
    while found.config is not None:
        found.take(found.config, pool.result(found.binary_for(found.config)))
    return Outcome(job, tuple(found.book.trials), load_bytes=None if found.pick is None else pool.load_bytes(found.pick))


class Search:
    """The fastest candidate for one problem by the model, compiling as few as possible: branch and bound.

    Without a binary's resources the model still gives a bound that no binary of the config goes below. Candidates are compiled in the
    order of their bounds, until the next bound is above the fastest estimate by more than a tie: no candidate left could be the record.
    """

    def __init__(self, job: Job, barred: Collection[Config] = ()) -> None:
        assert job.architecture is not None
        self.problem, self.architecture = job.problem, job.architecture
        self.book = TrialBook(job)
        self._target = target_of(job.device.arch, job.device.warp_size)
        tried = (config for config in candidates(job.problem, job.device) if config not in barred)
        bounds = ((least_us(job.problem, config, job.architecture), config) for config in tried)
        self._left = deque(sorted(bounds, key=lambda pair: (pair[0], str(pair[1]))))
        self._fastest_us = float("inf")

    @property
    def config(self) -> Config | None:
        """The candidate to compile next; None once the pick is certain."""
        return self._left[0][1] if self._left and self._left[0][0] <= self._fastest_us * TIE else None

    @property
    def pick(self) -> Binary | None:
        """What the fastest so far needs."""
        record = derive_record(self.book.trials)
        return None if record is None else self.binary_for(record.config)

    def binary_for(self, config: Config) -> Binary:
        return binary_for(self.problem, config, self._target)

    def take(self, config: Config, compiled: Compiled) -> None:
        """Note what the binary of `config`, the next, takes, and the estimate that follows."""
        self._left.popleft()
        estimate = None
        if compiled.status is Status.OK and compiled.resources is not None:
            estimate = modelled(self.problem, config, compiled.resources, self.architecture)
            self._fastest_us = min(self._fastest_us, estimate.median_us)
        self.book.add(config, compiled.status, error=compiled.error, resources=compiled.resources, measurement=estimate, final=True)
