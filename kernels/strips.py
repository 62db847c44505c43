"""Launches of one config for any number of rows, for batch_invariant: where it can't take them all at once, one strip after the other."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch

from kernels.device import INTERPRETER, describe
from kernels.geometry import Geometry
from kernels.launch import Allocate, Launcher, build_launcher
from kernels.numerics import PLAIN, Numerics
from kernels.variants import STRIP_ROWS, VARIANTS, is_legal
from tuning_db.model import Config


def build_invariant_launcher(
    config: Config,
    geometry: Geometry,
    dtypes: tuple[str, str, str],
    device_index: int,
    allocate: Allocate | None = None,
    numerics: Numerics = PLAIN,
) -> Launcher:
    """As `build_launcher`, for a config that is legal for ANY_ROWS."""
    device = INTERPRETER if device_index < 0 else describe(device_index)
    if geometry.rows <= STRIP_ROWS or is_legal(config, geometry.problem(*dtypes), device):
        return build_launcher(config, geometry, dtypes, device_index, allocate, numerics)
    return _strip_launcher(config, geometry, dtypes, device_index, numerics)


def build_invariant_over_input(
    config: Config,
    geometry: Geometry,
    dtypes: tuple[str, str, str],
    device_index: int,
    allocate: Allocate | None = None,
    numerics: Numerics = PLAIN,
) -> Launcher:
    """As `build_invariant_launcher`, and y may lie over x, whatever the variant allows."""
    launch = build_invariant_launcher(config, geometry, dtypes, device_index, allocate, numerics)
    return launch if VARIANTS[config.variant].IN_PLACE else functools.partial(_over_its_input, launch)


def strips(geometry: Geometry) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each strip: at most STRIP_ROWS, each a nest of the geometry's strides."""
    rows, inner = geometry.rows, geometry.inner_rows
    if 0 < inner <= STRIP_ROWS:
        step = STRIP_ROWS // inner * inner
        yield from ((first, min(step, rows - first)) for first in range(0, rows, step))
        return
    for start in range(0, rows, inner or rows):
        end = start + (inner or rows)
        yield from ((first, min(STRIP_ROWS, end - first)) for first in range(start, end, STRIP_ROWS))


def _strip_launcher(config: Config, geometry: Geometry, dtypes: tuple[str, str, str], device_index: int, numerics: Numerics) -> Launcher:
    @functools.cache
    def of_rows(rows: int) -> Launcher:
        return build_launcher(config, replace(geometry, rows=rows), dtypes, device_index, numerics=numerics)

    launches = [(*_offsets(geometry, first), of_rows(rows)) for first, rows in strips(geometry)]

    def launch(y: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        y = torch.empty_like(x) if y is None else y
        for y_offset, x_offset, of_strip in launches:
            of_strip(_from(y, y_offset), _from(x, x_offset), weight, eps)
        return y

    return launch


def _offsets(geometry: Geometry, row: int) -> tuple[int, int]:
    """Elements from the first row to this one, of y and of x."""
    outer, inner = divmod(row, geometry.inner_rows or geometry.rows)
    return (
        outer * geometry.y_outer_stride + inner * geometry.y_row_stride,
        outer * geometry.x_outer_stride + inner * geometry.x_row_stride,
    )


def _from(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A view of one element, so many elements on: a launcher takes a tensor's address and knows the rest."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + offset)


def _over_its_input(launch: Launcher, y: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    assert y is not None  # it is what lies over x
    elsewhere = torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device)
    return y.copy_(launch(elsewhere, x, weight, eps))
