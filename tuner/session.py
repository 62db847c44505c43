"""One sweep of the command line on one device: what it has to do, and how it ends.

torch is imported where there is something to do, so that a finished sweep is told so in a second or two.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernels.variants import candidates
from tuner.architectures import Architecture, target_of
from tuner.boards import Board
from tuner.events import Finished, Watch
from tuner.unfinished import unfinished
from tuning_db.errors import DatabaseError
from tuning_db.model import Device, Problem, Record, Resources, Source
from tuning_db.store import Store, read_records


@dataclass(frozen=True)
class Plan:
    """What a sweep would do: configs to try, and binaries to compile for them unless Triton's cache has them."""

    problems: int
    candidates: int
    binaries: int


@dataclass(frozen=True)
class Session:
    """`architecture` is None where the problems are measured on GPUs. `retry`: with the configs that crashed or hung on them."""

    board: Board
    problems: tuple[Problem, ...]
    path: Path
    retune: bool
    budget_s: float | None
    retry: bool = False

    @property
    def device(self) -> Device:
        return self.board.device

    @property
    def architecture(self) -> Architecture | None:
        return self.board.architecture

    @property
    def source(self) -> Source:
        return Source.MODELLED if self.architecture else Source.MEASURED

    def todo(self, records: Sequence[Record]) -> list[Problem]:
        """The problems still to be done, given the device's records."""
        return list(self.problems) if self.retune else unfinished(self.problems, records, self.source, self.device)

    def is_done(self) -> bool:
        """Whether there is nothing to do, as far as the file can be read; opening it for writing mends it or says what is wrong."""
        try:
            return not self.todo(self._read())
        except DatabaseError:
            return False

    def plan(self) -> Plan:
        """Count the work without touching any file."""
        from tuner.compiling import binary_for

        todo = self.todo(self._read())
        target = target_of(self.device.arch, self.device.warp_size)
        pairs = [(problem, config) for problem in todo for config in candidates(problem, self.device)]
        return Plan(len(todo), len(pairs), len({binary_for(problem, config, target) for problem, config in pairs}))

    def _read(self) -> list[Record]:
        """The device's records; none if there is no file."""
        records = read_records(self.path, self.device.arch)[1] if os.path.exists(self.path) else []
        return [record for record in records if record.device_uid == self.device.uid]

    def run(self, todo: Sequence[Problem], store: Store, argv: Sequence[str], watch: Watch) -> None:
        """Sweep `todo`. Raises Failure where the machine, not the code, is at fault."""
        from tuner.sweep import sweep

        sweep(todo, self.device, self.architecture, self.board.stations(), store, argv, watch, self.budget_s, self.retry)

    def recorded(self, finished: Sequence[Finished], store: Store) -> int:
        """How many of the problems have records: of today's kernels or, with retune, of this session."""
        if self.retune:
            return sum(one.record is not None for one in finished)
        return len(self.problems) - len(unfinished(self.problems, store.records(self.device.uid), self.source, self.device))

    def resources(self, finished: Sequence[Finished], store: Store) -> dict[Problem, Resources]:
        """What the winners' binaries take, where that is known."""
        found: dict[Problem, Resources] = {}
        for record in (one.record for one in finished if one.record):
            trials = store.trials(self.device.uid, record.problem)
            found |= {t.problem: t.resources for t in trials if t.uid == record.trial_uid and t.resources}
        return found


def is_writable(path: Path) -> bool:
    """Whether a file, and what SQLite puts beside it, can be written or created."""
    folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))  # unlike Path's own never an error
    writable = folder.is_dir() and os.access(folder, os.W_OK)
    return writable and (not os.path.exists(path) or (path.is_file() and os.access(path, os.W_OK)))
