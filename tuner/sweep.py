"""The pipeline: enumerate, compile, prune, verify, measure, confirm, record; one committed Problem at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

import torch
import triton

from kernels.dispatch import pick_config
from kernels.heuristic import heuristic_config
from kernels.provenance import is_todays
from kernels.variants import candidates
from tuner.architectures import target_of
from tuner.cases import Case
from tuner.compiling import Compiled, CompilePool, binary_for
from tuner.events import Started, Watch
from tuner.failure import Failure
from tuner.invariant import invariant_trials
from tuner.measure import Bench, measurement
from tuner.race import Samples, median_interval, race
from tuner.torch_baseline import torch_baseline
from tuner.trial_book import TrialBook, commit, recorded_sweep
from tuner.verify import Verifier
from tuning_db.lookup import RecordIndex
from tuning_db.model import TORCH_VARIANT, Config, Device, Problem, Resources, Role, Status, Tier, Trial
from tuning_db.store import Store

TORCH = Config.of(TORCH_VARIANT)
FINALISTS = 3
"""Fastest configs of the elimination that race again on fresh buffers, so that luck in one race decides nothing."""
FINAL_ROUNDS = 9


def sweep_gpu(
    problems: Sequence[Problem], device: Device, index: int, store: Store, argv: Sequence[str], watch: Watch, budget_s: float | None
) -> None:
    """Tune each problem on GPU `index` and commit it. Stops after `budget_s` seconds, between two problems.

    Raises Failure where a kernel breaks the GPU's context, which ends what this process can do. The crash is recorded, and the next
    sweep leaves that config out.
    """
    target = target_of(device.arch, device.warp_size)
    gpu = torch.device("cuda", index)
    started = time.monotonic()
    with CompilePool(device, target) as pool, recorded_sweep(store, device, argv) as sweep_uid, torch.cuda.device(index):
        for problem in problems:
            pool.submit(binary_for(problem, config, target) for config in candidates(problem, device))
        known = RecordIndex([(str(store.path), [device], store.records(device.uid))])
        crashed = {trial.config for trial in store.crashes(device.uid) if is_todays(trial)}
        for number, problem in enumerate(problems):
            if budget_s is not None and time.monotonic() - started > budget_s:
                break
            watch(Started(problem, number, len(problems), *pool.progress))
            tuning = Tuning(problem, device, gpu, sweep_uid, known, crashed)
            try:
                trials = tuning.run(pool)
            except Failure as failure:
                store.add_trials(tuning.book.trials)
                raise Failure(f"{failure}: that is recorded, and the same command goes on without that config") from failure
            watch(commit(store, problem, trials))
        store.add_trials(invariant_trials(device, store.trials(device.uid)))


class Tuning:
    """Tunes one problem on one GPU."""

    def __init__(
        self, problem: Problem, device: Device, gpu: torch.device, sweep_uid: str, known: RecordIndex, crashed: Collection[Config]
    ) -> None:
        self.problem, self.device, self.crashed = problem, device, crashed
        self.case = Case(problem, gpu)
        self.book = TrialBook(problem, device, sweep_uid)
        self.launchers: dict[Config, Callable[..., object]] = {}
        self.resources: dict[Config, Resources | None] = {}
        incumbent = pick_config(problem, device, index=known)
        self.incumbent = incumbent.config if incumbent.tier is Tier.EXACT else None
        self.heuristic = heuristic_config(problem, device)

    def run(self, pool: CompilePool) -> list[Trial]:
        """All trials of the problem, the final ones last."""
        self.build(pool, candidates(self.problem, self.device))
        self.verify()
        self.final(self._eliminate() if self.launchers else [])
        return self.book.trials

    def build(self, pool: CompilePool, configs: Sequence[Config]) -> None:
        """Launchers of those that compile; the others' trials."""
        target = target_of(self.device.arch, self.device.warp_size)
        for config in configs:
            if config in self.crashed:
                continue
            compiled: Compiled = pool.result(binary_for(self.problem, config, target))
            if compiled.status is not Status.OK:
                self.book.add(config, compiled.status, error=compiled.error, resources=compiled.resources)
                continue
            try:
                self.launchers[config] = self.case.launcher(config)
            except triton.runtime.errors.OutOfResources as error:
                self.book.add(config, Status.OUT_OF_RESOURCES, error=str(error), resources=compiled.resources)
            self.resources[config] = compiled.resources

    def verify(self) -> None:
        """Leave only launchers with right results. Raises Failure where one breaks the GPU's context."""
        verifier = Verifier(self.case)
        for config, launcher in list(self.launchers.items()):
            try:
                fault = verifier.fault(launcher)
            except torch.AcceleratorError as error:
                what = str(error).partition("\n")[0]
                self.book.add(config, Status.CRASHED, error=what, resources=self.resources[config])
                raise Failure(f"{config} on {self.problem} broke the GPU's context ({what})") from error
            if fault:
                self.book.add(config, Status.WRONG, error=fault, resources=self.resources[config])
                del self.launchers[config]

    def _eliminate(self) -> list[Config]:
        """Race all launchers; the configs fastest by median."""
        bench = Bench(self.case, self.device, seed=2)
        for config, launcher in self.launchers.items():
            bench.enter_launcher(config, launcher)
        samples, reference = _raced(bench, list(self.launchers))
        for config in self.launchers:
            timed = measurement(samples[config], reference, self.case.copies)
            self.book.add(config, Status.OK, resources=self.resources[config], measurement=timed)
        return sorted(self.launchers, key=lambda config: (median_interval(samples[config])[0], str(config)))[:FINALISTS]

    def final(self, finalists: Sequence[Config]) -> None:
        """Finalists, incumbent, heuristic and PyTorch on fresh buffers; every role a config has gets a trial of its own."""
        roles: dict[Config, list[Role]] = {config: [Role.CANDIDATE] for config in finalists}
        for config, role in ((self.incumbent, Role.INCUMBENT), (self.heuristic, Role.HEURISTIC), (TORCH, Role.TORCH)):
            if config == TORCH or config in self.launchers:
                roles.setdefault(config, []).append(role)
        bench = Bench(self.case, self.device, seed=3)
        for config in roles:
            if config == TORCH:
                bench.enter(TORCH, torch_baseline(self.case, bench.sets), max(2, bench.launches // 4))
            else:
                bench.enter_launcher(config, self.launchers[config])
        samples, reference = bench.rounds(list(roles), FINAL_ROUNDS)
        for config, own_roles in roles.items():
            timed = measurement(samples[config], reference, self.case.copies)
            for role in own_roles:
                self.book.add(config, Status.OK, role=role, resources=self.resources.get(config), measurement=timed, final=True)


def _raced(bench: Bench, configs: list[Config]) -> tuple[Samples[Config], list[float]]:
    """Samples by config, fewer of those that were dropped, and the reference's time of each round."""
    reference: list[float] = []

    def sample_round(order: Sequence[Config]) -> dict[Config, float]:
        times = bench.round(order)
        reference.append(times.pop("reference"))
        return {config: times[config] for config in order}

    return race(configs, sample_round), reference
