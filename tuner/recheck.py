"""Whether records still win: measured again, in this process, against what might beat them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kernels.dispatch import pick_config
from kernels.heuristic import heuristic_config
from kernels.variants import candidates, is_legal
from tuner.architectures import Architecture, architectures, target_of
from tuner.compile_only import Search
from tuner.compiling import CompilePool, binary_for
from tuner.eliminations import elimination_races
from tuner.events import Started
from tuner.model import least_us
from tuner.sweep import Tuning
from tuning_db.derive import TIE, derive_record
from tuning_db.lookup import RecordIndex
from tuning_db.model import ANY_ROWS, TORCH_VARIANT, Config, Device, Problem, Record, Source, Status, Tier, Trial, to_dict

RIVALS = 4
"""Fastest configs of the problem's newest elimination race that a record is held against, or as many that the model finds promising."""


@dataclass(frozen=True)
class Recheck:
    """A record after a new race: the µs of everybody in it, itself included unless `fault` says why it has none, and the model's pick."""

    record: Record
    times_us: dict[Config, float]
    model: Config | None
    fault: str = ""

    @property
    def fastest(self) -> Config:
        return min(self.times_us, key=lambda config: (self.times_us[config], str(config)))

    @property
    def loss(self) -> float | None:
        """The record's time over the fastest one's, less 1; None without a time."""
        return self._loss(self.record.config)

    @property
    def model_loss(self) -> float | None:
        return self._loss(self.model)

    @property
    def holds(self) -> bool:
        """Whether the record is within the tie band of the fastest."""
        return self.loss is not None and 1 + self.loss <= TIE

    def _loss(self, config: Config | None) -> float | None:
        return self.times_us[config] / self.times_us[self.fastest] - 1 if config in self.times_us else None

    def to_dict(self) -> dict[str, Any]:
        times = [{"variant": c.variant, "params": c.params, "median_us": us} for c, us in sorted(self.times_us.items(), key=lambda p: p[1])]
        figures = {"holds": self.holds, "loss": self.loss, "model_loss": self.model_loss, "fault": self.fault}
        return {"problem": to_dict(self.record.problem), **figures, "times": times}


def records_in_use(index: RecordIndex, device: Device, wanted: Callable[[Problem], bool]) -> list[Record]:
    """The measured records that the dispatcher runs on a device, in the order of Problem; those for any number of rows were summed up."""
    shelf = index.shelves.get((device.uid, Source.MEASURED))
    problems = [problem for problem in sorted(shelf.at if shelf else ()) if problem.rows != ANY_ROWS and wanted(problem)]
    picks = [pick_config(problem, device, index=index) for problem in problems]
    return [pick.record for pick in picks if pick.record is not None and pick.tier is Tier.EXACT]


def sampled(records: Sequence[Record], number: int) -> list[Record]:
    """So many of the records, the same each time, in their order."""
    chosen = random.Random(0).sample(range(len(records)), min(number, len(records)))
    return [records[i] for i in sorted(chosen)]


def recheck_gpu(
    records: Sequence[Record], trials: Sequence[Trial], device: Device, index: int, watch: Callable[[Started], None]
) -> list[Recheck]:
    """Race each record again on GPU `index`; nothing is stored. `trials` are what is known of the device.

    The rivals: the fastest of the trials, the model's pick, the heuristic's, PyTorch. Raises Failure as `sweep_gpu` does.
    """
    usual = architectures().get(device.arch)
    board = replace(usual, device=device) if usual else None
    target = target_of(device.arch, device.warp_size)
    races = elimination_races(trials)
    gpu = torch.device("cuda", index)
    checked = []
    with CompilePool(device, target) as pool, torch.cuda.device(index):
        for number, record in enumerate(records):
            watch(Started(record.problem, number, len(records), *pool.progress))
            model = _model_pick(record.problem, board, pool) if board else None
            known = RecordIndex([("", [device], [record])])
            tuning = Tuning(record.problem, device, gpu, "", known, ())
            rivals = _rivals(record.problem, races.get(record.problem, ()), device, board)
            wanted = dict.fromkeys([record.config, heuristic_config(record.problem, device), model, *rivals])
            configs = [config for config in wanted if config is not None and config.variant != TORCH_VARIANT]
            pool.submit(binary_for(record.problem, config, target) for config in configs)
            tuning.build(pool, configs)
            tuning.verify()
            tuning.final(list(tuning.launchers))
            checked.append(_judged(record, tuning.book.trials, model))
    return checked


def _rivals(problem: Problem, race: Sequence[Trial], device: Device, board: Architecture | None) -> list[Config]:
    """Up to RIVALS configs, most promising first."""
    if race:
        timed = sorted((trial.measurement.median_us, str(trial.config), trial.config) for trial in race if trial.measurement)
        return [config for _, _, config in timed if is_legal(config, problem, device)][:RIVALS]
    if board is None:
        return []
    return sorted(candidates(problem, device), key=lambda config: (least_us(problem, config, board), str(config)))[:RIVALS]


def _model_pick(problem: Problem, board: Architecture, pool: CompilePool) -> Config | None:
    search = Search(problem, board, "")
    while search.config is not None and search.binary is not None:
        search.take(search.config, pool.result(search.binary))
    record = derive_record(search.book.trials)
    return record.config if record else None


def _judged(record: Record, trials: Sequence[Trial], model: Config | None) -> Recheck:
    times_us = {trial.config: trial.measurement.median_us for trial in trials if trial.measurement}
    faults = [f"{t.status.value}: {t.error}" for t in trials if t.config == record.config and t.status is not Status.OK]
    return Recheck(record, times_us, model, next(iter(faults), ""))
