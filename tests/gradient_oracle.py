"""The tests' own gradients of RMSNorm in float64, by autograd, and how near a result must come to them."""

from __future__ import annotations

import torch

from oracle import INTERPRETED, SMALLEST_SUBNORMAL
from tuner.verify import FP32_STEPS, UNIT_ROUNDOFF, float64_gradients


def expected_gradients(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6, axis: int = -1
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx and dw in float64, by autograd through the formula."""
    wide = x.detach().double().requires_grad_()
    rows = wide.movedim(axis, -1)
    y = rows / ((rows * rows).sum(-1, keepdim=True) / rows.shape[-1] + eps).sqrt()
    if weight is None:
        return torch.autograd.grad(y.movedim(-1, axis), wide, dy.double())[0], None
    wide_weight = weight.detach().double().requires_grad_()
    return torch.autograd.grad((y * wide_weight).movedim(-1, axis), (wide, wide_weight), dy.double())


def assert_gradients(
    dx: torch.Tensor | None,
    dw: torch.Tensor | None,
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float = 1e-6,
    axis: int = -1,
    note: object = "",
    dsum: torch.Tensor | None = None,
    daddend: torch.Tensor | None = None,
) -> None:
    """Every element of dx and dw, where given, is as near as `tuner.verify` says and derives; NaN where the formula gives NaN.

    dsum is to be added to dx; daddend is to be the same, in dy's dtype.

    In bf16 under the interpreter twice the one rounding is allowed, because the interpreter cuts fp32 off (`oracle.tolerance`).
    """
    wanted_dx, wanted_dw = expected_gradients(dy, x, weight, eps, axis)
    parts = float64_gradients(dy.movedim(axis, -1), x.detach().movedim(axis, -1), weight if weight is None else weight.detach(), eps)
    steps = FP32_STEPS * 2.0**-24
    magnitude = parts.dx_magnitude.movedim(-1, axis)
    if dsum is not None:
        wanted_dx = wanted_dx + dsum.double()
        magnitude = magnitude + dsum.double().abs()
    for name, gradient, dtype in (("dx", dx, x.dtype), ("daddend", daddend, dy.dtype)):
        if gradient is not None:
            assert gradient.shape == x.shape, note
            assert gradient.dtype == dtype, note
            _assert_near(gradient, wanted_dx, magnitude * steps, f"{note} {name}")
    if dw is not None:
        assert weight is not None
        assert wanted_dw is not None
        assert (dw.shape, dw.dtype) == (weight.shape, weight.dtype), note
        terms = parts.dw_terms.reshape(-1, weight.numel())
        _assert_near(dw, wanted_dw, (terms.square().sum(0).sqrt() + wanted_dw.abs()) * steps, f"{note} dw")


def _assert_near(got: torch.Tensor, want: torch.Tensor, beyond_rounding: torch.Tensor, note: str) -> None:
    roundings = 2 if INTERPRETED and got.dtype == torch.bfloat16 else 1
    allowed = want.abs() * roundings * UNIT_ROUNDOFF[str(got.dtype).removeprefix("torch.")] + beyond_rounding
    wide = got.detach().double()
    wrong = ~(((wide - want).abs() <= allowed + SMALLEST_SUBNORMAL[got.dtype]) | (wide.isnan() & want.isnan()))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{note}: {int(wrong.sum())} of {got.numel()} elements are wrong, first {at}: {wide[at]:.9g}, expected {want[at]:.9g} "
            f"within {allowed[at]:.3g}"
        )


def root_mean_square_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).square().mean().sqrt())
