"""What a config that was picked without measuring loses against the fastest one, computed from a database's trials."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kernels.dispatch import pick_config
from kernels.heuristic import heuristic_config
from kernels.variants import is_legal
from tuner.architectures import Architecture, architectures
from tuner.eliminations import elimination_races
from tuner.invariant import invariant_records
from tuner.model import modelled
from tuning_db.derive import derive_record
from tuning_db.lookup import RecordIndex
from tuning_db.model import ANY_ROWS, FORWARD, Config, Device, Problem, Record, Role, Source, Trial, to_dict
from tuning_db.store import Store

PICKERS = ("heuristic", "nearest", "model", "invariant")
"""Who picks: tier 7; the ladder once the problem's own record is hidden; tier 6, from the resources that the trials hold; what
batch_invariant runs, whatever the rows."""

ROWS_LIMITS = (16, 256, 4096)
COLS_LIMITS = (1024, 8192, 32768)
"""Upper ends of the regions' ranges; what is above the last is a range of its own."""


@dataclass(frozen=True)
class Regret:
    """One measured problem: the fastest config of its newest elimination race, and what each picker takes instead.

    picks holds None where a picker has no answer, times_us none where the race has no time of the pick.
    """

    problem: Problem
    best: Config
    best_us: float
    picks: dict[str, Config | None]
    times_us: dict[str, float]

    def loss(self, picker: str) -> float | None:
        """The pick's time over the fastest one's, less 1; None without a time."""
        return self.times_us[picker] / self.best_us - 1 if picker in self.times_us else None

    @property
    def region(self) -> str:
        """`17-256 x 1025-8192`, rows by cols."""
        return f"{_range(self.problem.rows, ROWS_LIMITS)} x {_range(self.problem.cols, COLS_LIMITS)}"

    def to_dict(self) -> dict[str, Any]:
        picks = {
            picker: {"config": config and {"variant": config.variant, "params": config.params}, "loss": self.loss(picker)}
            for picker, config in self.picks.items()
        }
        best = {"variant": self.best.variant, "params": self.best.params, "median_us": self.best_us}
        return {"problem": to_dict(self.problem), "region": self.region, "best": best, "picks": picks}


@dataclass(frozen=True)
class Summary:
    """Losses of one picker over a group of problems: geometric mean and 95th percentile, None without a time."""

    problems: int
    timed: int
    mean: float | None
    p95: float | None


def regrets(store: Store, device: Device, wanted: Callable[[Problem], bool]) -> list[Regret]:
    """Every wanted problem of a device that has an elimination race, in the order of Problem."""
    architecture = architectures().get(device.arch)
    board = replace(architecture, device=device) if architecture else None
    records = [record for record in store.records(device.uid) if record.source is Source.MEASURED]
    trials = store.trials(device.uid)
    races = elimination_races(trials)
    invariant = RecordIndex([("", [device], invariant_records(device, trials))])
    return [_regret(problem, races[problem], records, invariant, device, board) for problem in sorted(races) if wanted(problem)]


def model_pick(race: Sequence[Trial], board: Architecture) -> Config | None:
    """What a compile-only sweep would record, had it found the resources that the race's trials hold."""
    estimated = [
        replace(trial, final=True, role=Role.CANDIDATE, measurement=modelled(trial.problem, trial.config, trial.resources, board))
        for trial in race
        if trial.resources is not None
    ]
    record = derive_record(estimated)
    return record.config if record else None


def summary(cells: Sequence[Regret], picker: str) -> Summary:
    """p95 is the least loss that at least 95 % of the problems with a time don't exceed."""
    losses = sorted(loss for loss in (cell.loss(picker) for cell in cells) if loss is not None)
    if not losses:
        return Summary(len(cells), 0, None, None)
    mean = statistics.geometric_mean([1 + loss for loss in losses]) - 1
    return Summary(len(cells), len(losses), mean, losses[-(-95 * len(losses) // 100) - 1])


def groups(cells: Sequence[Regret]) -> dict[str, dict[str, list[Regret]]]:
    """The problems by op, by the fastest config's variant, by dtype of x and by region; each grouping in the order of size or name."""
    key: dict[str, Callable[[Regret], tuple[Any, str]]] = {
        "op": lambda cell: (cell.problem.op, cell.problem.op),
        "fastest variant": lambda cell: (cell.best.variant, cell.best.variant),
        "dtype": lambda cell: (cell.problem.x_dtype, cell.problem.x_dtype),
        "rows x cols": lambda cell: ((_step(cell.problem.rows, ROWS_LIMITS), _step(cell.problem.cols, COLS_LIMITS)), cell.region),
    }
    made: dict[str, dict[str, list[Regret]]] = {}
    for grouping, key_of in key.items():
        own = made.setdefault(grouping, {})
        for cell in sorted(cells, key=key_of):
            own.setdefault(key_of(cell)[1], []).append(cell)
    return made


def worst(cells: Sequence[Regret], picker: str, number: int) -> list[tuple[float, Regret]]:
    """The problems on which a picker loses most, and how much, most first."""
    known = [(loss, cell) for cell in cells if (loss := cell.loss(picker)) is not None]
    return sorted(known, key=lambda pair: (-pair[0], pair[1].problem))[:number]


def _regret(
    problem: Problem, race: Sequence[Trial], records: Sequence[Record], invariant: RecordIndex, device: Device, board: Architecture | None
) -> Regret:
    times_us = {trial.config: trial.measurement.median_us for trial in race if trial.measurement}
    legal = {config: us for config, us in times_us.items() if is_legal(config, problem, device)} or times_us
    best = min(legal, key=lambda config: (legal[config], str(config)))
    others = RecordIndex([("", [device], [record for record in records if record.problem != problem])])
    picks = {
        "heuristic": heuristic_config(problem, device),
        "nearest": pick_config(problem, device, index=others).config,
        "model": model_pick(race, board) if board else None,
        "invariant": None,
    }
    if problem.op == FORWARD and problem.layout != "strided_axis":  # of those a copy is normalised
        picks["invariant"] = pick_config(replace(problem, rows=ANY_ROWS, layout="contiguous"), device, index=invariant).config
    picked_us = {picker: times_us[config] for picker, config in picks.items() if config in times_us}
    return Regret(problem, best, legal[best], picks, picked_us)


def _step(value: int, limits: Sequence[int]) -> int:
    return sum(value > limit for limit in limits)


def _range(value: int, limits: Sequence[int]) -> str:
    step = _step(value, limits)
    low = limits[step - 1] + 1 if step else 1
    return f"{low}-{limits[step]}" if step < len(limits) else f"{low}-"
