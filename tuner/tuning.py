"""Tunes one problem on the one GPU that this process sees: build, verify, eliminate, race again. Tells before each risk what it tries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import triton

from kernels.device import describe
from kernels.heuristic import heuristic_config
from tuner.cases import Case
from tuner.compiling import Compiled
from tuner.failure import ContextBroken, Failure, StationGone
from tuner.jobs import Job
from tuner.measure import Bench, measurement
from tuner.race import Samples, median_interval, race
from tuner.torch_baseline import torch_baseline
from tuner.trials import TrialBook
from tuner.verify import Verifier
from tuner.worker import tell
from tuning_db.model import TORCH_VARIANT, Config, Device, Role, Status, Trial

TORCH = Config.of(TORCH_VARIANT)
GPU = torch.device("cuda", 0)
FINALISTS = 3
"""Fastest configs of the elimination that race again on fresh buffers, so that luck in one race decides nothing."""
FINAL_ROUNDS = 9


def open_gpu() -> Device:
    """Set the GPU up for work, if that is still to do, and say which one it is. Raises StationGone where there is none to be had."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        raise StationGone(f"the GPU can't be opened: {error}") from error
    return describe(0)


def tune(job: Job, compiled: Mapping[Config, Compiled]) -> tuple[Trial, ...]:
    """All trials of the configs that were compiled, the final ones last. Raises ContextBroken; Failure without GPU memory."""
    try:
        return _Tuning(job).run(compiled)
    except torch.OutOfMemoryError as error:
        raise Failure("GPU memory ran out: free it, or leave out the largest problems by --rows and --cols") from error
    except RuntimeError as error:
        what = str(error).partition("\n")[0]
        # A launch by Triton itself reports what an earlier one broke, and Triton has no class for that.
        if isinstance(error, torch.AcceleratorError) or what.startswith("Triton Error ["):
            raise ContextBroken(what) from error
        raise


class _Tuning:
    """One problem's way through."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.case = Case(job.problem, GPU)
        self.book = TrialBook(job)
        self.launchers: dict[Config, Callable[..., object]] = {}

    def run(self, compiled: Mapping[Config, Compiled]) -> tuple[Trial, ...]:
        self.resources = {config: one.resources for config, one in compiled.items()}
        self._build(compiled)
        self._verify()
        eliminates = self.job.entrants is None and self.launchers
        self._final(self._eliminate() if eliminates else list(self.launchers))
        return tuple(self.book.trials)

    def _build(self, compiled: Mapping[Config, Compiled]) -> None:
        for config, one in compiled.items():
            if one.status is not Status.OK:
                self.book.add(config, one.status, error=one.error, resources=one.resources)
                continue
            tell(config)
            try:
                self.launchers[config] = self.case.launcher(config)
            except triton.runtime.errors.OutOfResources as error:
                self.book.add(config, Status.OUT_OF_RESOURCES, error=str(error), resources=one.resources)

    def _verify(self) -> None:
        tell(None)
        verifier = Verifier(self.case)
        for config, launcher in list(self.launchers.items()):
            tell(config)
            fault = verifier.fault(launcher)
            if fault:
                self.book.add(config, Status.WRONG, error=fault, resources=self.resources[config])
                del self.launchers[config]

    def _eliminate(self) -> list[Config]:
        """Race all launchers; the configs fastest by median."""
        tell(None)
        bench = Bench(self.case, self.job.device, seed=2)
        for config, launcher in self.launchers.items():
            tell(config)
            bench.enter_launcher(config, launcher)
        tell(None)
        samples, reference = _raced(bench, list(self.launchers))
        for config in self.launchers:
            timed = measurement(samples[config], reference, self.case.copies)
            self.book.add(config, Status.OK, resources=self.resources[config], measurement=timed)
        return sorted(self.launchers, key=lambda config: (median_interval(samples[config])[0], str(config)))[:FINALISTS]

    def _final(self, finalists: list[Config]) -> None:
        """Finalists, incumbent, heuristic and PyTorch on fresh buffers; every role a config has gets a trial of its own."""
        roles: dict[Config, list[Role]] = {config: [Role.CANDIDATE] for config in finalists}
        heuristic = heuristic_config(self.job.problem, self.job.device)
        for config, role in ((self.job.incumbent, Role.INCUMBENT), (heuristic, Role.HEURISTIC), (TORCH, Role.TORCH)):
            if config is not None and (config == TORCH or config in self.launchers):
                roles.setdefault(config, []).append(role)
        tell(None)
        bench = Bench(self.case, self.job.device, seed=3)
        for config in roles:
            tell(config if config in self.launchers else None)
            if config == TORCH:
                bench.enter(TORCH, torch_baseline(self.case, bench.sets), max(2, bench.launches // 4))
            else:
                bench.enter_launcher(config, self.launchers[config])
        tell(None)
        samples, reference = bench.rounds(list(roles), FINAL_ROUNDS)
        for config, own_roles in roles.items():
            timed = measurement(samples[config], reference, self.case.copies)
            for role in own_roles:
                self.book.add(config, Status.OK, role=role, resources=self.resources.get(config), measurement=timed, final=True)


def _raced(bench: Bench, configs: list[Config]) -> tuple[Samples[Config], list[float]]:
    """Samples by config, fewer of those that were dropped, and the reference's time of each round."""
    reference: list[float] = []

    def sample_round(order: Sequence[Config]) -> dict[Config, float]:
        tell(None)
        times = bench.round(order)
        reference.append(times.pop("reference"))
        return {config: times[config] for config in order}

    return race(configs, sample_round), reference
