"""RMSNorm by PyTorch: what runs where no kernel does, and the oracle of the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rmsnorm_torch(x: torch.Tensor, weight: torch.Tensor | None, eps: float, axis: int) -> torch.Tensor:
    """y = x / sqrt(mean(x², axis) + eps) * weight, differentiable; fp32 arithmetic (fp64 for fp64), result in x's dtype.

    Zhang & Sennrich 2019, equation 4, with eps inside the root. Under autocast the result's dtype is still x's.
    """
    device = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device):  # there is no autocast for meta tensors to ask about
        with torch.autocast(device, enabled=False):
            return rmsnorm_torch(x, weight, eps, axis)
    cols = x.shape[axis]
    if axis % x.dim() == x.dim() - 1 and (weight is None or weight.dtype == x.dtype):
        return F.rms_norm(x, (cols,), weight, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.square().mean(axis, keepdim=True) + eps)
    if weight is not None:
        shape = [1] * x.dim()
        shape[axis] = cols
        y = y * weight.to(y.dtype).view(shape)
    return y.to(x.dtype)
