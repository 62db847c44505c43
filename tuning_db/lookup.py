"""The lookup ladder: which config to run for a Problem on a Device, decided without I/O, a clock or the GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import TypeAlias

from tuning_db.model import NO_WEIGHT, TORCH_VARIANT, Config, Device, Problem, Record, Source, Tier, itemsize

DTYPE_DISTANCE = 0.5
"""What one dtype of another width counts, in octaves of rows. Dtypes of one width count as one: the fastest config for bfloat16 loses
0.04 % in float16 (0.6 % at most, 20 problems, on an H100 as on an H200)."""
COLS_WEIGHT = 4.0
"""What one octave of cols counts, in octaves of rows: cols decide how a row fits a program, rows only how many there are."""

REACH = 0.5
"""How far, by `problem_distance`, a neighbour is still a guide; a farther one is passed over, at last for the heuristic. With every
record of the default workload hidden in turn, what the ladder picks instead loses 0.9 % to the fastest in the geometric mean on an H100
(4.4 % at p95) and 1.1 % (4.8 %) on an H200; within an octave 1.0 % (6.4 %) and 1.3 % (9.3 %), within three octaves 1.1 % (6.8 %) and
1.6 % (9.5 %)."""

Widths: TypeAlias = tuple[int, int, int]
Layer: TypeAlias = tuple[str, Sequence[Device], Sequence[Record]]
Kind: TypeAlias = tuple[str, Widths, int, str, int]
Family: TypeAlias = tuple[str, str, int]


@dataclass(frozen=True)
class Pick:
    """The config to run and why: the step of the ladder, the layer the record came from, how far it was fetched.

    distance is 0 for an exact record, else that of the problems (`problem_distance`) plus that of the devices (`Device.distance`).
    """

    config: Config
    tier: Tier
    layer: str = ""
    record: Record | None = None
    distance: float = 0.0


def problem_distance(a: Problem, b: Problem) -> float:
    """4·|log2 cols ratio| + |log2 inner_rows ratio| + 0.5 per dtype of another width + |log2 rows ratio|."""
    return _kind_distance(a, b) + _octaves(a.rows, b.rows)


class RecordIndex:
    """The records of all layers, first layer first, arranged so that `choose` looks at few of them."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.shelves: dict[tuple[str, Source], Shelf] = {}
        devices: dict[str, Device] = {}
        for name, layer_devices, layer_records in layers:
            for device in sorted(layer_devices, key=repr):
                devices.setdefault(device.uid, device)
            for record in sorted(layer_records, key=lambda r: (r.created_at, r.trial_uid, str(r.config)), reverse=True):
                self.shelves.setdefault((record.device_uid, record.source), Shelf()).add(name, record)
        self.devices = tuple(devices.values())

    def by_distance(self, device: Device) -> Iterator[tuple[float, Device]]:
        """The device, then the others of its arch, nearest first."""
        yield 0.0, device
        others = (other for other in self.devices if other.arch == device.arch and other.uid != device.uid)
        yield from sorted(((device.distance(other), other) for other in others), key=lambda pair: (pair[0], pair[1].uid))


@dataclass
class Shelf:
    """The records of one device and source, by problem; problems by what they have in common."""

    at: dict[Problem, list[tuple[str, Record]]] = field(default_factory=dict)
    by_kind: dict[Kind, list[Problem]] = field(default_factory=dict)
    kinds: dict[Family, list[Problem]] = field(default_factory=dict)

    def add(self, layer: str, record: Record) -> None:
        problem = record.problem
        if problem not in self.at:
            self.at[problem] = []
            same_kind = self.by_kind.setdefault(_kind(problem), [])
            if not same_kind:
                self.kinds.setdefault(_family(problem), []).append(problem)
            same_kind.append(problem)
        self.at[problem].append((layer, record))

    def nearest(self, problem: Problem) -> Iterator[tuple[Tier, float, Problem]]:
        """The problems within REACH whose records may serve: itself, then other rows, then other cols, widths of dtypes, inner rows."""
        if problem in self.at:
            yield Tier.EXACT, 0.0, problem
        others = (other for other in self.by_kind.get(_kind(problem), ()) if other != problem)
        by_distance = ((_octaves(other.rows, problem.rows), _dtypes(other) != _dtypes(problem), -other.rows, other) for other in others)
        for distance, _, _, other in sorted(by_distance):
            if distance <= REACH:
                yield Tier.NEAREST_ROWS, distance, other
        # Best first: a kind waits at the distance of its nearest possible row, and is unpacked only when that comes up.
        kinds = (kind for kind in self.kinds.get(_family(problem), ()) if _kind(kind) != _kind(problem))
        heap = [(_kind_distance(problem, kind), False, 0, kind) for kind in kinds]
        heapify(heap)
        while heap:
            distance, unpacked, _, other = heappop(heap)
            if distance > REACH:
                return
            if unpacked:
                yield Tier.NEAREST_COLS, distance, other
                continue
            for row in self.by_kind[_kind(other)]:
                heappush(heap, (distance + _octaves(row.rows, problem.rows), True, -row.rows, row))


def choose(
    problem: Problem,
    device: Device,
    index: RecordIndex,
    *,
    usable: Callable[[Record], bool],
    fresh: Callable[[Record], bool],
    heuristic: Callable[[Problem, Device], Config | None],
    override: Config | None = None,
) -> Pick:
    """The first step of the ladder (`Tier`) that has an answer; the last always has.

    usable says whether a record's config is valid for this problem and of the present revision; fresh, whether it was measured with
    the present code. Of several records of one problem a fresh one comes first, then the layers' order counts. Between problems at
    the same distance more rows win, then the order of Problem.
    """
    if override is not None:
        return Pick(override, Tier.OVERRIDE)
    for source in (Source.MEASURED, Source.MODELLED):
        for apart, other in index.by_distance(device):
            shelf = index.shelves.get((other.uid, source), Shelf())
            for tier, distance, neighbour in shelf.nearest(problem):
                found = _best(shelf.at[neighbour], usable, fresh)
                if found:
                    if source is Source.MODELLED:
                        tier = Tier.MODELLED
                    elif other is not device:
                        tier = Tier.NEAREST_DEVICE
                    layer, record = found
                    return Pick(record.config, tier, layer, record, apart + distance)
    config = heuristic(problem, device)
    return Pick(config, Tier.HEURISTIC) if config is not None else Pick(Config.of(TORCH_VARIANT), Tier.TORCH)


def _best(
    entries: Sequence[tuple[str, Record]], usable: Callable[[Record], bool], fresh: Callable[[Record], bool]
) -> tuple[str, Record] | None:
    stale = None
    for entry in entries:
        if usable(entry[1]):
            if fresh(entry[1]):
                return entry
            stale = stale or entry
    return stale


def _kind(problem: Problem) -> Kind:
    p = problem
    return (p.op, _widths(p), p.cols, p.layout, p.inner_rows)


def _dtypes(problem: Problem) -> tuple[str, str, str]:
    return (problem.x_dtype, problem.w_dtype, problem.y_dtype)


def _widths(problem: Problem) -> Widths:
    """Bytes an element of x, w (0 without weight) and y."""
    return (itemsize(problem.x_dtype), 0 if problem.w_dtype == NO_WEIGHT else itemsize(problem.w_dtype), itemsize(problem.y_dtype))


def _family(problem: Problem) -> Family:
    return (problem.op, problem.layout, itemsize(problem.x_dtype))


def _kind_distance(a: Problem, b: Problem) -> float:
    differing = sum(width != other for width, other in zip(_widths(a), _widths(b), strict=True))
    return COLS_WEIGHT * _octaves(a.cols, b.cols) + _octaves(a.inner_rows, b.inner_rows) + DTYPE_DISTANCE * differing


def _octaves(a: int, b: int) -> float:
    """|log2(a / b)|, and exactly the same for a ratio and its inverse, so that ties are ties."""
    return math.log2(max(a, b) / min(a, b))
