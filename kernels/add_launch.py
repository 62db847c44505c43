"""The launch of add_rmsnorm's forward, for runtime and tuner alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from kernels.device import interpreting
from kernels.geometry import Geometry
from kernels.launch import binary_of, kernel_arguments
from kernels.numerics import PLAIN, Numerics
from kernels.pointer_launch import pointer_launcher
from kernels.variants import VARIANTS
from tuning_db.model import Config

AddLauncher: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None", float], None]
"""launch(y, new_residual, x, residual, weight, eps) on the current stream of x's device, for tensors like those it was built for."""


def build_add_launcher(
    config: Config, geometry: Geometry, dtypes: tuple[str, str, str], device_index: int, numerics: Numerics = PLAIN
) -> AddLauncher:
    """Prepare the launch of a legal config. dtypes are those of residual, w (or `none`) and y.

    Of the geometry's strides x's are those of residual and new_residual, y's those of y and x: the residual is the kernel's x, and what
    the caller names x is what is added to it.
    """
    variant: Any = VARIANTS[config.variant]
    arguments = kernel_arguments(config, geometry, ptx=not interpreting() and torch.version.hip is None, numerics=numerics)
    words = variant.workspace_words(arguments) if hasattr(variant, "workspace_words") else 0
    binary = binary_of(config, dtypes, arguments, aligned=True, adds=True)
    grid = variant.grid(arguments)
    # The workspace is shared with rmsnorm's launches of as many programs a row, which leave there what these go by.
    run = pointer_launcher(binary, grid, arguments, device_index, words=words, use=grid[0])

    def launch(
        y: torch.Tensor, new_residual: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
    ) -> None:
        run((y, residual, weight, x, new_residual), eps)

    return launch
