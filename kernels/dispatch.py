"""From a Problem to a plan: look the config up once, prepare its launch, remember both."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import triton

from kernels.add_launch import build_add_launcher
from kernels.allocation import Allocate
from kernels.backward_launch import BackwardLauncher, build_backward_launcher
from kernels.device import INTERPRETER, describe, interpreting
from kernels.geometry import Geometry
from kernels.heuristic import heuristic_config
from kernels.launch import build_launcher
from kernels.numerics import PLAIN, Numerics
from kernels.overrides import active_override
from kernels.provenance import is_current, is_fresh
from kernels.settings import read_settings, user_database
from kernels.strips import build_invariant_launcher, build_invariant_over_input
from kernels.variants import VARIANTS, is_legal
from tuning_db.errors import DatabaseError
from tuning_db.jsonl import shipped_records
from tuning_db.lookup import Pick, RecordIndex, choose
from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, ANY_ROWS, BACKWARD, TORCH_VARIANT, Config, Device, Problem, Tier
from tuning_db.store import read_records

log = logging.getLogger("tuned_rmsnorm")

BATCH_INVARIANT_ROWS = 4096
"""With batch_invariant=True every call of add_rmsnorm is looked up as if it had this many rows, so that cols alone decide the config."""

MANY_ROWS = 2**30
"""A config that is legal at so many rows can serve any number."""


@dataclass(frozen=True)
class Choice:
    """What the ladder answered for one kind of call, and the launch it prepared (None: PyTorch runs)."""

    pick: Pick
    launch: Any
    """A Launcher, or of a backward a BackwardLauncher."""

    @property
    def served_by(self) -> str:
        """The tier's name in lower case; `torch` where a config was picked that can't run here."""
        return (Tier.TORCH if self.launch is None and self.pick.config.variant != TORCH_VARIANT else self.pick.tier).name.lower()


_indexes: dict[str, RecordIndex] = {}
_reading = threading.RLock()
os.register_at_fork(before=_reading.acquire, after_in_parent=_reading.release, after_in_child=_reading.release)


def record_index(arch: str) -> RecordIndex:
    """All records of an architecture, read once a process. A database that can't be read is a miss and one log line.

    Of several threads one reads and tells, and the others wait. A fork waits too: its child could never take the locks that SQLite and
    this function held in another thread.
    """
    with _reading:
        if arch not in _indexes:
            _indexes[arch] = _read_index(arch)
        return _indexes[arch]


def forget_records() -> None:
    """Read the databases again when they are next asked for."""
    _indexes.clear()


def _read_index(arch: str) -> RecordIndex:
    layers = []
    for path in read_settings().databases:
        if not os.path.exists(path):  # False, not an error, where a folder may not be searched
            if path != user_database():  # a user who never tuned has none, and that is nothing to tell
                log.info("tuning database %s does not exist: `python -m tuner sweep` writes it", path)
            continue
        try:
            layers.append((str(path), *read_records(path, arch)))
        except DatabaseError as error:
            log.warning("tuning database ignored: %s", error)
    try:
        layers.append(("shipped", *shipped_records(arch)))
    except DatabaseError as error:
        log.warning("shipped records ignored: %s", error)
    return RecordIndex(layers)


def device_of(index: int) -> Device:
    """The Device behind a CUDA device index; the interpreter's for -1."""
    return INTERPRETER if index < 0 else describe(index)


def pick_config(
    problem: Problem,
    device: Device,
    *,
    in_place: bool = False,
    any_rows: bool = False,
    config: Config | None = None,
    index: RecordIndex | None = None,
) -> Pick:
    """Ask the ladder. `config` overrides it where legal.

    `in_place` leaves out variants that read x after y was written, `any_rows` configs that can't serve every number of rows in one launch.
    """

    def allowed(candidate: Config) -> bool:
        if candidate.variant == TORCH_VARIANT:
            return problem.rows != ANY_ROWS and not interpreting()
        if any_rows and not is_legal(candidate, replace(problem, rows=MANY_ROWS), device):
            return False
        return is_legal(candidate, problem, device) and (VARIANTS[candidate.variant].IN_PLACE or not in_place)

    return choose(
        problem,
        device,
        record_index(device.arch) if index is None else index,
        usable=lambda record: is_current(record) and allowed(record.config),
        fresh=is_fresh,
        heuristic=lambda problem, device: heuristic_config(problem, device, allowed),
        override=config if config is not None and allowed(config) else None,
    )


def choose_and_prepare(
    geometry: Geometry,
    dtypes: tuple[str, str, str],
    device_index: int,
    *,
    in_place: bool,
    batch_invariant: bool,
    allocate: Allocate | None = None,
    numerics: Numerics = PLAIN,
) -> Choice:
    """The whole slow path of one kind of call: ladder, then compile or load. Taken once per shape, layout, dtypes, device and mode."""
    problem = geometry.problem(*dtypes)
    if batch_invariant:
        # Rows at two strides are summed as those at one: how many strides there are can depend on how many rows there are.
        # A result over its own input has the bits of any other.
        problem = replace(problem, rows=ANY_ROWS, layout="contiguous")
        pick = pick_config(problem, device_of(device_index), config=active_override())
        build = build_invariant_over_input if in_place else build_invariant_launcher
        return prepared(pick, problem, lambda config: build(config, geometry, dtypes, device_index, allocate, numerics))
    pick = pick_config(problem, device_of(device_index), in_place=in_place, config=active_override())
    return prepared(pick, problem, lambda config: build_launcher(config, geometry, dtypes, device_index, allocate, numerics))


def choose_and_prepare_add(
    geometry: Geometry,
    dtypes: tuple[str, str, str],
    device_index: int,
    *,
    in_place: bool,
    batch_invariant: bool,
    numerics: Numerics = PLAIN,
) -> Choice:
    """As `choose_and_prepare`, for add_rmsnorm. dtypes are those of residual, w and y."""
    problem = geometry.problem(*dtypes, op=ADD_FORWARD)
    if batch_invariant:
        problem = replace(problem, rows=BATCH_INVARIANT_ROWS, layout="contiguous")
    pick = pick_config(problem, device_of(device_index), in_place=in_place, any_rows=batch_invariant, config=active_override())
    return prepared(pick, problem, lambda config: build_add_launcher(config, geometry, dtypes, device_index, numerics))


def choose_and_prepare_backward(
    geometry: Geometry,
    dtypes: tuple[str, str, str],
    device_index: int,
    config: Config | None,
    *,
    wants_dx: bool,
    wants_dw: bool,
    adds: bool = False,
    numerics: Numerics = PLAIN,
) -> Choice:
    """As `choose_and_prepare`, for a backward, with `adds` that of add_rmsnorm. dtypes are those of x (or the sum), w and dy.

    `config` overrides the ladder where it is legal.
    """
    problem = geometry.problem(*dtypes, op=ADD_BACKWARD if adds else BACKWARD)
    pick = pick_config(problem, device_of(device_index), config=config)

    def build(config: Config) -> BackwardLauncher:
        return build_backward_launcher(
            config, geometry, dtypes, device_index, wants_dx=wants_dx, wants_dw=wants_dw, adds=adds, numerics=numerics
        )

    return prepared(pick, problem, build)


def prepared(pick: Pick, problem: Problem, build: Callable[[Config], Any]) -> Choice:
    """The Choice that a Pick leads to, once `build` has made its launcher."""
    if pick.config.variant == TORCH_VARIANT:
        return Choice(pick, None)
    try:
        launch = build(pick.config)
    except triton.runtime.errors.OutOfResources as error:
        # A modelled or neighbour's config can ask for more than this board has.
        log.warning("%s can't run on this GPU (%s); PyTorch serves %s", pick.config, error, problem)
        return Choice(pick, None)
    return Choice(pick, launch)
