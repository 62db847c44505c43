"""RMSNorm and its gradients by PyTorch: what runs where no kernel does."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.numerics import PLAIN, Numerics


def rmsnorm_torch(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    axis: int,
    numerics: Numerics = PLAIN,
    y_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y = x / sqrt(mean(x², axis) + eps) * (weight + offset), differentiable; fp32 arithmetic (fp64 where x or y is that).

    Zhang & Sennrich 2019, equation 4, with eps inside the root. y is rounded once, to y_dtype or x's dtype, under autocast too.
    """
    device = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device):  # there is no autocast for meta tensors to ask about
        with torch.autocast(device, enabled=False):
            return rmsnorm_torch(x, weight, eps, axis, numerics, y_dtype)
    y_dtype = y_dtype or x.dtype
    both = torch.promote_types(x.dtype, y_dtype)
    cols = x.shape[axis]
    fused = axis % x.dim() == x.dim() - 1 and (weight is None or weight.dtype == both) and numerics == PLAIN
    if fused and isinstance(cols, int):  # of a symbolic one PyTorch 2.11 makes some other number on a GPU
        return F.rms_norm(x.to(both), (cols,), weight, eps).to(y_dtype)
    wide = x.to(torch.promote_types(both, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(axis, keepdim=True) + eps)
    if numerics.round_normalized:
        y = y.to(x.dtype).to(wide.dtype)
    if weight is not None:
        y = y * _effective_weight(weight, wide, axis, numerics)
    return y.to(y_dtype)


def add_rmsnorm_torch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, numerics: Numerics = PLAIN
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and new_residual = x + residual, differentiable: the sum is rounded to the residual's dtype, then its RMSNorm once to x's."""
    new_residual = (x + residual).to(residual.dtype)
    return rmsnorm_torch(new_residual, weight, eps, -1, numerics, x.dtype), new_residual


def rmsnorm_backward_torch(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    axis: int,
    numerics: Numerics = PLAIN,
    dsum: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx and dw of `rmsnorm_torch`, themselves differentiable; fp32 arithmetic, results in the dtypes of x and weight.

    With x̂ = x / sqrt(mean(x², axis) + eps) and g = dy · (w + offset):
    dx = (g − x̂ · mean(g · x̂)) / sqrt(mean(x²) + eps), dw = Σ dy · x̂. A rounding of x̂ within the forward counts as none. Where x is the
    sum of `add_rmsnorm_torch`, whose own gradient is dsum, that is added to dx before it is rounded.
    """
    wide, wide_dy = (tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in (x, dy))
    rstd = torch.rsqrt(wide.square().mean(axis, keepdim=True) + eps)
    x_hat = wide * rstd
    g, dw = wide_dy, None
    if weight is not None:
        g = wide_dy * _effective_weight(weight, wide_dy, axis, numerics)
        others = [dim for dim in range(x.dim()) if dim != axis % x.dim()]
        dw = wide_dy * x_hat
        dw = (dw.sum(others) if others else dw).to(weight.dtype)
    dx = rstd * (g - x_hat * (g * x_hat).mean(axis, keepdim=True))
    if dsum is not None:
        dx = dx + dsum
    return dx.to(x.dtype), dw


def _effective_weight(weight: torch.Tensor, wide: torch.Tensor, axis: int, numerics: Numerics) -> torch.Tensor:
    """weight + offset in the dtype of `wide`, along its axis."""
    shape = [1] * wide.dim()
    shape[axis] = wide.shape[axis]
    effective = weight.to(wide.dtype)
    return (effective + numerics.weight_offset if numerics.weight_offset else effective).view(shape)
