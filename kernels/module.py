"""`RMSNorm`, the module: torch.nn.RMSNorm with `rmsnorm` inside."""

from __future__ import annotations

import torch

from kernels.api import rmsnorm
from kernels.device import interpreting


class RMSNorm(torch.nn.RMSNorm):
    """Drop-in for torch.nn.RMSNorm: its arguments, its one parameter `weight`, its state dict and its repr.

    normalized_shape may have several dimensions, which are normalised over together. eps=None is float32's machine epsilon (float64's
    for float64). The result has x's dtype, whatever the weight's and under autocast too; arithmetic is fp32. Tensors on the CPU and
    empty batches are served by PyTorch, so that a model needs no branches.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (*, *normalized_shape) to the same. For another shape raises what torch.nn.RMSNorm raises."""
        dims = len(self.normalized_shape)
        if x.shape[-dims:] != self.normalized_shape:
            return super().forward(x)  # torch words the error
        eps = self.eps
        if eps is None:
            eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        backend = "auto" if (x.is_cuda or interpreting()) and x.numel() else "torch"
        if dims == 1:
            return rmsnorm(x, self.weight, eps, backend=backend)
        weight = None if self.weight is None else self.weight.flatten()
        return rmsnorm(x.flatten(-dims), weight, eps, backend=backend).unflatten(-1, self.normalized_shape)
