"""The only clock: GPU time of launches by CUDA graphs over rotating buffers, beside a reference copy in the same rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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


class Bench:
    """Sets of tensors of one Case, graphs of launches over them, and rounds of their times."""

    def __init__(self, case: Case, device: Device, seed: int) -> None:
        self.case = case
        floor_us = max(1.5, case.set_bytes / (device.bandwidth_gbs * 1e3) * 1.1)
        self.launches = max(MIN_LAUNCHES, min(MAX_LAUNCHES, math.ceil(GRAPH_US / floor_us)))
        rotating = max(2, math.ceil(COLD_L2S * device.l2_bytes / case.set_bytes))
        self.sets = case.sets(min(rotating, self.launches), seed)
        # Read, not written: dirty lines would be written back while the next entrant is timed.
        self._other_data = None
        if len(self.sets) * case.set_bytes < COLD_L2S * device.l2_bytes:
            assert len(self.sets) == self.launches, "a set would be touched twice without leaving L2"
            self._other_data = torch.zeros(COLD_L2S * device.l2_bytes // 4, dtype=torch.int32, device=case.device)
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph, int]] = {}
        self._alive: list[object] = []
        self.enter("reference", lambda tensors: reference_copy(tensors.y, tensors.x))

    def enter(self, name: object, launch: Launch, launches: int | None = None) -> None:
        """Capture a graph of `launches` (default: as many as a candidate gets) under `name`. Runs the work once before."""
        count = launches or self.launches
        launch(self.sets[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        kept: list[object] = [None] * len(self.sets)
        with torch.cuda.graph(graph):
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


def measurement(own: Sequence[float], reference: Sequence[float], copies: float = 1.0) -> Measurement:
    """Median and interval of an entrant's samples; the fraction is the median over its rounds of copies × reference time / own time.

    `copies` is `Case.copies`: the floor of three streams is one and a half times a copy of two.
    """
    median, low, high = median_interval(own)
    fractions = [copies * copy / time for copy, time in zip(reference, own, strict=False)]
    return Measurement(POLICY, median, low, high, median_interval(fractions)[0], len(own))
