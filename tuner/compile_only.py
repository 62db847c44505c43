"""The sweep without a GPU: compile what the model can't rule out, and record its pick for each problem."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from kernels.launch import Binary
from kernels.variants import candidates
from tuner.architectures import Architecture
from tuner.compiling import Compiled, CompilePool, binary_for
from tuner.events import Started, Watch
from tuner.model import least_us, modelled
from tuner.trial_book import TrialBook, commit, recorded_sweep
from tuning_db.derive import TIE, derive_record
from tuning_db.model import Config, Problem, Status
from tuning_db.store import Store

SEARCHES_PER_WORKER = 4
"""Problems in work, each with one binary under way: enough that no worker waits, few enough to lose little when interrupted."""


def sweep_compile_only(
    problems: Sequence[Problem], architecture: Architecture, store: Store, argv: Sequence[str], watch: Watch, budget_s: float | None
) -> None:
    """Record the model's pick of all candidates for each problem, and commit it. Begins no problem after `budget_s` seconds."""
    started = time.monotonic()
    waiting = deque(problems)
    searches: deque[tuple[Search, Binary | None]] = deque()
    done = 0

    def go_on(search: Search, pool: CompilePool) -> None:
        binary = search.binary
        if binary is not None:
            pool.submit([binary])
        elif search.pick is not None:
            pool.submit_load_bytes(search.pick)
        searches.append((search, binary))

    with CompilePool(architecture.device, architecture.target) as pool, recorded_sweep(store, architecture.device, argv) as sweep_uid:
        while waiting or searches:
            if budget_s is not None and time.monotonic() - started > budget_s:
                waiting.clear()
            while waiting and len(searches) < SEARCHES_PER_WORKER * pool.workers:
                go_on(Search(waiting.popleft(), architecture, sweep_uid), pool)
            if not searches:
                break
            search, binary = searches.popleft()
            watch(Started(search.problem, done, len(problems), *pool.progress))
            if search.config is not None and binary is not None:
                search.take(search.config, pool.result(binary))
                go_on(search, pool)
            else:
                finished = commit(store, search.problem, search.book.trials)
                watch(replace(finished, load_bytes=None if search.pick is None else pool.load_bytes(search.pick)))
                done += 1


class Search:
    """The fastest candidate for one problem by the model, compiling as few as possible: branch and bound.

    Without a binary's resources the model still gives a bound that no binary of the config goes below. Candidates are compiled in the
    order of their bounds, until the next bound is above the fastest estimate by more than a tie: no candidate left could be the record.
    """

    def __init__(self, problem: Problem, architecture: Architecture, sweep_uid: str) -> None:
        self.problem, self.architecture = problem, architecture
        self.book = TrialBook(problem, architecture.device, sweep_uid)
        bounds = ((least_us(problem, config, architecture), config) for config in candidates(problem, architecture.device))
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
        return None if record is None else binary_for(self.problem, record.config, self.architecture.target)

    @property
    def binary(self) -> Binary | None:
        """What `config` needs."""
        return None if self.config is None else binary_for(self.problem, self.config, self.architecture.target)

    def take(self, config: Config, compiled: Compiled) -> None:
        """Note what the binary of `config` takes, and the estimate that follows."""
        self._left.popleft()
        estimate = None
        if compiled.status is Status.OK and compiled.resources is not None:
            estimate = modelled(self.problem, config, compiled.resources, self.architecture)
            self._fastest_us = min(self._fastest_us, estimate.median_us)
        self.book.add(config, compiled.status, error=compiled.error, resources=compiled.resources, measurement=estimate, final=True)
