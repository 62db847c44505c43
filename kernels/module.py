"""`RMSNorm`, the module: torch.nn.RMSNorm with `rmsnorm` inside."""

from __future__ import annotations

from typing import Any

import torch

from kernels.api import by_shortcut, rmsnorm
from kernels.device import interpreting
from kernels.numerics import FP32, NO_OFFSET
from kernels.validation import InvalidInput, checked_numerics

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
FLOAT32_EPS, FLOAT64_EPS = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


class RMSNorm(torch.nn.RMSNorm):
    """Drop-in for torch.nn.RMSNorm: its arguments, its one parameter `weight`, its state dict and its repr.

    normalized_shape may have several dimensions, which are normalised over together. eps=None is float32's machine epsilon (float64's
    for float64). The result has x's dtype, whatever the weight's and under autocast too; arithmetic is fp32. weight_offset and casting
    are those of `rmsnorm`; the weight starts at 1 - weight_offset. Tensors on the CPU and empty batches are served by PyTorch, so that
    a model needs no branches.

    Raises InvalidInput for an unknown mode, and for a weight_offset without a weight.
    """

    weight_offset: float = NO_OFFSET
    casting: str = FP32

    def __init__(
        self,
        normalized_shape: Any,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        weight_offset: float = NO_OFFSET,
        casting: str = FP32,
    ) -> None:
        numerics = checked_numerics(weight_offset, casting)
        if numerics.weight_offset and not elementwise_affine:
            raise InvalidInput(f"weight_offset is {weight_offset}, but elementwise_affine=False makes no weight; drop one of them")
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        if numerics.weight_offset:
            self.weight_offset = numerics.weight_offset
            self.reset_parameters()
        if casting != FP32:
            self.casting = casting

    def reset_parameters(self) -> None:
        """Let the weight scale by 1."""
        super().reset_parameters()
        if self.weight_offset:
            torch.nn.init.constant_(self.weight, 1 - self.weight_offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (*, *normalized_shape) to the same; where the weight was replaced by one of another shape, that counts.

        For another shape raises what torch.nn.RMSNorm raises.
        """
        weight: torch.Tensor | None
        try:
            weight = self._parameters["weight"]  # what self.weight finds, in a third of the time
        except KeyError:  # parametrized or sharded
            weight = self.weight
        eps = self.eps
        if eps is None:
            eps = FLOAT64_EPS if x.dtype == torch.float64 else FLOAT32_EPS
        if not _is_dynamo_compiling() and (weight is not None or x.shape[-1:] == self.normalized_shape):
            y = by_shortcut(x, weight, eps, self.weight_offset, self.casting)
            if y is not None:
                return y  # x fits the weight, else there were no shortcut
        shape = self.normalized_shape if weight is None else tuple(weight.shape)
        dims = len(shape)
        if x.shape[-dims:] != shape:
            return super().forward(x)  # torch words the error
        backend = "auto" if (x.is_cuda or interpreting()) and x.numel() else "torch"
        if dims == 1:
            return rmsnorm(x, weight, eps, backend=backend, weight_offset=self.weight_offset, casting=self.casting)
        weight = None if weight is None else weight.flatten()
        y = rmsnorm(x.flatten(-dims), weight, eps, backend=backend, weight_offset=self.weight_offset, casting=self.casting)
        return y.unflatten(-1, shape)

    def extra_repr(self) -> str:
        """As torch.nn.RMSNorm's, and the numerics mode where it is not the default."""
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        casting = f", casting={self.casting!r}" if self.casting != FP32 else ""
        return super().extra_repr() + offset + casting
