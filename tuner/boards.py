"""Which boards a sweep is for, and where it finds them: the GPUs here, those of a Ray cluster, or an architecture's usual board.

torch is imported by what asks for GPUs, so that a finished sweep is told so in a second or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuner.architectures import Architecture, architectures
from tuner.failure import Failure
from tuner.jobs import Station
from tuning_db.model import Device

if TYPE_CHECKING:
    from tuner.cluster import Cluster


@dataclass(frozen=True)
class Board:
    """A kind of GPU, measured on `gpus` of this host or in a cluster; with an architecture it is compiled for, here or in a cluster."""

    device: Device
    architecture: Architecture | None = None
    gpus: tuple[int, ...] = ()
    cluster: Cluster | None = None

    @property
    def place(self) -> str:
        """Where it is worked for, in a few words; empty for one GPU here, which needs none."""
        if self.cluster:
            return "a Ray cluster"
        return f"GPUs {', '.join(map(str, self.gpus))}" if len(self.gpus) > 1 else ""

    def stations(self) -> Sequence[Station]:
        if self.cluster:
            return self.cluster.stations(self.device, gpus=self.architecture is None)
        from tuner.station import local_stations

        return local_stations(self.device, self.gpus)


def modelled_boards(arches: Sequence[str], cluster: Cluster | None) -> list[Board]:
    known = architectures()
    return [Board(known[arch].device, known[arch], cluster=cluster) for arch in arches]


def boards_here(wanted: Sequence[int] | None) -> list[Board]:
    """The boards of the GPUs `wanted` by index (None: all), one for each kind. Raises Failure for an index that there is not."""
    from kernels.device import describe, gpu_count

    count = gpu_count()
    for index in wanted or ():
        if index >= count:
            rest = f"name some of {', '.join(map(str, range(count)))} by --gpus" if count else "leave out --gpus to compile only"
            raise Failure(f"there is no GPU {index} here: {rest}")
    gpus: dict[Device, list[int]] = {}
    for index in sorted(set(range(count) if wanted is None else wanted)):
        gpus.setdefault(describe(index), []).append(index)
    return [Board(device, gpus=tuple(indices)) for device, indices in gpus.items()]
