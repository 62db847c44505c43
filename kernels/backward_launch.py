"""The launch of a backward: the variant's kernel, then the sum of dw's partial rows; for runtime and tuner alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from kernels.allocation import packed
from kernels.device import INTERPRETER, describe, interpreting
from kernels.driver import driver_version
from kernels.geometry import Geometry
from kernels.launch import Binary, binary_of, has_pdl, kernel_arguments
from kernels.numerics import PLAIN, Numerics
from kernels.pointer_launch import pointer_launcher
from kernels.variants import COLUMN_SUM, VARIANTS, column_sum
from tuning_db.model import NO_WEIGHT, Config

BackwardLauncher: TypeAlias = Callable[..., None]
"""launch(dx, dw, dy, x, weight, eps, dsum=None, daddend=None) on the current stream of x's device, for tensors like those it was built for.

dx, dw, dsum and daddend are packed."""

PDL_DRIVER = 12030
"""CUDA 12.3: drivers before it can't capture a programmatic dependent launch in a graph."""


def build_backward_launcher(
    config: Config,
    geometry: Geometry,
    dtypes: tuple[str, str, str],
    device_index: int,
    *,
    wants_dx: bool = True,
    wants_dw: bool = True,
    adds: bool = False,
    sm_count: int | None = None,
    numerics: Numerics = PLAIN,
) -> BackwardLauncher:
    """Prepare the launch of a legal config. dtypes are those of x, w (or `none`) and dy, whose strides are the geometry's y strides.

    What is not wanted is neither computed nor stored, and its argument is None. adds: x is the sum of an add_rmsnorm, dsum its
    gradient; dx is then that of both addends, daddend the same in dy's dtype if that is another. sm_count is the GPU's if not given.
    """
    variant: Any = VARIANTS[config.variant]
    wants_dw = wants_dw and dtypes[1] != NO_WEIGHT
    device = INTERPRETER if interpreting() else describe(device_index)
    pdl = has_pdl(device.arch) and driver_version() >= PDL_DRIVER
    ptx = not interpreting() and torch.version.hip is None
    arguments = kernel_arguments(config, geometry, ptx=ptx, pdl=pdl, numerics=numerics)
    sized = {**arguments, "sm_count": device.sm_count if sm_count is None else sm_count}
    words = variant.workspace_words(sized) if hasattr(variant, "workspace_words") else 0
    unwanted = {name for name, wanted in (("dx_ptr", wants_dx), ("partials_ptr", wants_dw)) if not wanted}
    binary = binary_of(config, dtypes, arguments, aligned=True, adds=adds)
    binary = replace(binary, pointers=tuple((name, NO_WEIGHT if name in unwanted else dtype) for name, dtype in binary.pointers))
    grid = variant.grid(sized)
    gradients = pointer_launcher(binary, grid, arguments, device_index, words=words, use=("backward", *grid))
    partial_rows = variant.partial_rows(sized) if wants_dw else 0
    summing = column_sum.arguments_for(partial_rows, geometry.cols, pdl=pdl)
    column_sums = new_partials = None
    if wants_dw:
        column_sums = pointer_launcher(column_sum_binary(summing, dtypes[1]), column_sum.grid(summing), summing, device_index)
        torch_device = torch.device("cpu") if interpreting() else torch.device("cuda", device_index)
        new_partials = packed(torch.Size((partial_rows, geometry.cols)), torch.float32, torch_device)

    def launch(
        dx: torch.Tensor | None,
        dw: torch.Tensor | None,
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        dsum: torch.Tensor | None = None,
        daddend: torch.Tensor | None = None,
    ) -> None:
        partials = None if new_partials is None else new_partials()
        gradients((dx, partials, dy, x, weight, dsum, daddend), eps)
        if column_sums is not None:
            column_sums((dw, partials))

    return launch


def column_sum_binary(arguments: dict[str, Any], w_dtype: str) -> Binary:
    """The Binary of `column_sum` with these arguments."""
    return Binary(
        variant=COLUMN_SUM,
        pointers=(("dw_ptr", w_dtype), ("partials_ptr", "float32")),
        constexprs=tuple((name, value) for name, value in arguments.items() if name.isupper()),
        options=(("num_warps", column_sum.NUM_WARPS), *((("launch_pdl", True),) if arguments["PDL"] else ())),
        aligned=True,
    )
