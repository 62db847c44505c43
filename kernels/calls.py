"""What plans hold and hand on: functions that serve one kind of arguments, everything else decided."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

Call: TypeAlias = Callable[["torch.Tensor | None", torch.Tensor, "torch.Tensor | None", float], torch.Tensor]
"""call(out, x, weight, eps) -> y. Without out it allocates y."""

Node: TypeAlias = Callable[[torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""node(x, weight) -> y, which then is part of autograd's graph; eps is decided too."""

NodeOf: TypeAlias = Callable[[float], Node]
"""The Node for an eps."""

Sums: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""y and new_residual."""

AddCall: TypeAlias = Callable[
    ["torch.Tensor | None", "torch.Tensor | None", torch.Tensor, torch.Tensor, "torch.Tensor | None", float], Sums
]
"""call(out, residual_out, x, residual, weight, eps). Results that are not given are allocated."""


def dtype_name(dtype: torch.dtype) -> str:
    """As Problems have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
