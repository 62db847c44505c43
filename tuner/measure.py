"""The only clock: GPU time of launches by CUDA graphs over rotating buffers, beside a reference copy in the same rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tuner.cases import Case, Tensors
from tuner.race import Name, median_interval
from tuner.reference_copy import reference_copy
from tuning_db.model import Device, Measurement

POLICY = "graph-cold-1"
"""Name of this way to measure; figures of different policies are never compared.

A CUDA graph of K launches (about GRAPH_US) over sets of x and y. Either the sets span COLD_L2S × L2, so that no launch finds its data
there, or each of the K launches has a set of its own and L2 is filled with other data by reads before each replay. Rounds are
[reference, entrants shuffled, reference] with one synchronisation at the end.
"""

GRAPH_US = 1000.0
MAX_LAUNCHES = 400
MIN_LAUNCHES = 4
COLD_L2S = 3

Launch = Callable[[Tensors], object]
"""Launches one piece of work on a set of tensors; what it returns is kept alive, so that its memory is not reused at once."""


@dataclass(frozen=True)
class Rotation:
    """How a graph's launches go around the sets. `refills_l2`: other data is read before each replay, and each launch has its own set."""

    sets: int
    launches: int
    refills_l2: bool

    @classmethod
    def of(cls, set_bytes: int, device: Device) -> Rotation:
        """For sets of `set_bytes`, so that COLD_L2S × L2 lie between two launches on one set, also from one graph to the next."""
        floor_us = max(1.5, set_bytes / (device.bandwidth_gbs * 1e3) * 1.1)
        launches = max(MIN_LAUNCHES, min(MAX_LAUNCHES, math.ceil(GRAPH_US / floor_us)))
        rotating = max(2, math.ceil(COLD_L2S * device.l2_bytes / set_bytes))
        if rotating > launches:
            return cls(launches, launches, refills_l2=True)
        rotation = cls(rotating, launches // rotating * rotating, refills_l2=False)
        assert rotation.sets * set_bytes >= COLD_L2S * device.l2_bytes, "a set would be touched again before it left L2"
        return rotation

    def rounded(self, launches: int) -> int:
        """So many launches or a few more: whole turns, for a graph that ended in mid-turn would leave sets in L2 for the next."""
        return min(launches, self.sets) if self.refills_l2 else -(-launches // self.sets) * self.sets


class Bench:
    """Sets of tensors of one Case, graphs of launches over them, and rounds of their times."""

    def __init__(self, case: Case, device: Device, seed: int, rotation: Rotation | None = None) -> None:
        self.case = case
        self.rotation = rotation or Rotation.of(case.set_bytes, device)
        self.launches = self.rotation.launches
        self.sets = case.sets(self.rotation.sets, seed)
        # Read, not written: dirty lines would be written back while the next entrant is timed.
        self._other_data = None
        if self.rotation.refills_l2:
            self._other_data = torch.zeros(COLD_L2S * device.l2_bytes // 4, dtype=torch.int32, device=case.device)
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph, int]] = {}
        self._alive: list[object] = []
        self.enter("reference", copy_of_what_is_normalised)

    def enter(self, name: object, launch: Launch, launches: int | None = None, before: Launch | None = None) -> None:
        """Capture a graph of `launches` (default: as many as a candidate gets) under `name`. Runs the work once before.

        `before` is run on every set first, on the stream of the capture, and is not timed.
        """
        count = self.rotation.rounded(launches or self.launches)
        stream = None
        if before is not None:
            torch.cuda.synchronize()
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for tensors in self.sets:
                    before(tensors)
                torch.cuda.synchronize()
        launch(self.sets[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        kept: list[object] = [None] * len(self.sets)
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                kept[i % len(self.sets)] = launch(self.sets[i % len(self.sets)])
        self._alive.append(kept)
        self._graphs[name] = (graph, count)
        graph.replay()
        torch.cuda.synchronize()

    def enter_launcher(self, name: object, launcher: Callable[..., object]) -> None:
        """Enter what the runtime would launch, a Launcher or BackwardLauncher."""
        self.enter(name, lambda tensors: launcher(*tensors.arguments))

    def round(self, order: Sequence[object]) -> dict[object, float]:
        """µs per launch of each name, and under "reference" the mean of the copy's two, taken first and last."""
        laps = ["reference", *order, "reference"]
        marks = []
        for name in laps:
            graph, count = self._graphs[name]
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if self._other_data is not None:
                self._other_data.sum()
            start.record()
            graph.replay()
            end.record()
            marks.append((start, end, count))
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) * 1e3 / count for start, end, count in marks]
        return {**dict(zip(laps[1:-1], times[1:-1], strict=True)), "reference": (times[0] + times[-1]) / 2}

    def rounds(self, names: Sequence[Name], count: int) -> tuple[dict[Name, list[float]], list[float]]:
        """Times of `count` rounds by name, and the reference's. Each round begins with the next name, and nobody is dropped."""
        samples: dict[Name, list[float]] = {name: [] for name in names}
        reference = []
        for turn in range(count):
            first = turn % len(names) if names else 0
            times = self.round([*names[first:], *names[:first]])
            reference.append(times["reference"])
            for name in names:
                samples[name].append(times[name])
        return samples, reference


def copy_of_what_is_normalised(tensors: Tensors) -> None:
    """The reference copy of x to y, or of a residual stream, whose dtype can be another than y's, to the new one."""
    if tensors.residual is not None and tensors.new_residual is not None:
        reference_copy(tensors.new_residual, tensors.residual)
    else:
        reference_copy(tensors.y, tensors.x)


def measurement(own: Sequence[float], reference: Sequence[float], copies: float = 1.0) -> Measurement:
    """Median and interval of an entrant's samples; the fraction is the median over its rounds of copies × reference time / own time.

    `copies` is `Case.copies`: the floor of three streams is one and a half times a copy of two.
    """
    median, low, high = median_interval(own)
    fractions = [copies * copy / time for copy, time in zip(reference, own, strict=False)]
    return Measurement(POLICY, median, low, high, median_interval(fractions)[0], len(own))
