"""Heatmaps of what unmeasured picks lose, for a device whose trials are known."""

from __future__ import annotations

from collections.abc import Sequence

from tuner.display import problem_label
from tuner.regret import PICKERS, Regret
from tuner.report import heatmap
from tuner.report.sections import MAIN_KIND, percent
from tuner.report.style import Drawing, drawing_style

TITLES = {
    "heuristic": "the heuristic chose",
    "nearest": "the nearest neighbour chose",
    "model": "the model chose",
    "invariant": "batch_invariant was asked for",
}


def regret_maps(slug: str, origin: str, cells: Sequence[Regret]) -> list[Drawing]:
    """One map for each picker: its loss in % by rows and cols, of the problems of MAIN_KIND whose race has a time of its pick."""
    own = [cell for cell in cells if problem_label(cell.problem).partition(" ")[2] == MAIN_KIND]
    drawings = []
    with drawing_style():
        for picker in PICKERS:
            losses = {(c.problem.rows, c.problem.cols): 100 * loss for c in own if (loss := c.loss(picker)) is not None}
            if losses:
                title = f"Loss in % to the fastest of the sweep if {TITLES[picker]}, {MAIN_KIND}"
                name = f"{slug}-regret-{picker}"
                drawings.append(heatmap.number_map(name, title, origin, losses, colours="OrRd", low=0.0, high=30.0, text=percent))
    return drawings
