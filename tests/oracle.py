"""The tests' own RMSNorm in float64, how near a result must come to it, and memory in which a stray read or write shows."""

import math
import os
from collections.abc import Sequence

import torch

from kernels.variants import VARIANTS
from tuner.verify import UNIT_ROUNDOFF, relative_tolerance
from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, BACKWARD, FORWARD

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
"""Where kernels run in these tests: the CPU under Triton's interpreter, else the current GPU."""

FORWARD_VARIANTS = {name: variant for name, variant in VARIANTS.items() if FORWARD in variant.OPS}
BACKWARD_VARIANTS = {name: variant for name, variant in VARIANTS.items() if BACKWARD in variant.OPS}
SUM_VARIANTS = {name: variant for name, variant in VARIANTS.items() if ADD_FORWARD in variant.OPS}
SUM_BACKWARD_VARIANTS = {name: variant for name, variant in VARIANTS.items() if ADD_BACKWARD in variant.OPS}

DEVICE_INDEX = -1 if INTERPRETED else 0
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SMALLEST_SUBNORMAL = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149, torch.float64: 2.0**-1074}
GUARD_ELEMENTS = 1024
"""Elements of NaN on either side; a multiple of 16 bytes in every dtype, so that what lies between starts as aligned as its memory."""


def expected_rmsnorm(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, axis: int = -1) -> torch.Tensor:
    """x / sqrt(mean(x², axis) + eps) * weight, in float64."""
    rows = x.detach().double().movedim(axis, -1)
    y = rows / ((rows * rows).sum(-1, keepdim=True) / rows.shape[-1] + eps).sqrt()
    if weight is not None:
        y = y * weight.detach().double()
    return y.movedim(-1, axis)


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error of a right result of this dtype.

    One rounding to dtype (half a unit in the last place: 2^-11, 2^-8, 2^-24) and at most 256 fp32 roundings before it. bf16 under the
    interpreter: twice that one rounding, because the interpreter cuts fp32 off where hardware rounds to the nearest bf16, and a cut
    costs up to a whole unit. float64 is PyTorch's: 256 roundings of float64.
    """
    if dtype == torch.float64:
        return 256 * 2.0**-53
    cut = 2.0**-8 if INTERPRETED and dtype == torch.bfloat16 else 0.0
    return relative_tolerance(_name(dtype)) + cut


def assert_sum(new_residual: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, note: object = "") -> None:
    """new_residual is x + residual, every element of it, in the residual's dtype: rounded to fp32 and once to that.

    In bf16 under the interpreter, which cuts off, a whole unit is allowed.
    """
    assert (new_residual.shape, new_residual.dtype) == (residual.shape, residual.dtype), note
    want, got = x.detach().double() + residual.detach().double(), new_residual.detach().double()
    rounding = UNIT_ROUNDOFF[_name(residual.dtype)] * (2 if INTERPRETED and residual.dtype == torch.bfloat16 else 1)
    near = (got - want).abs() <= want.abs() * (rounding + 2 * 2.0**-24) + SMALLEST_SUBNORMAL[residual.dtype]
    wrong = ~(near | (got.isnan() & want.isnan()) | (got == want))  # infinity equals itself
    assert not wrong.any(), f"{note} {int(wrong.sum())} of {wrong.numel()} sums are wrong, first at {wrong.nonzero()[0].tolist()}"


def assert_rmsnorm(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, axis: int = -1, note: object = ""
) -> None:
    """y is the RMSNorm of x, every element of it; NaN exactly where the formula gives NaN. `note` goes into the message."""
    assert y.shape == x.shape, note
    want = expected_rmsnorm(x, weight, eps, axis)
    got = y.detach().double()
    near = (got - want).abs() <= want.abs() * tolerance(y.dtype) + SMALLEST_SUBNORMAL[y.dtype]
    wrong = ~(near | (got.isnan() & want.isnan()))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{note} {int(wrong.sum())} of {y.numel()} elements are wrong, first {at}: {got[at]:.9g}, expected {want[at]:.9g} "
            f"within {tolerance(y.dtype):.3g} of it"
        )


class Fenced:
    """A NaN tensor inside more memory of NaN: a read outside it shows in the result, a write in `assert_intact`."""

    def __init__(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, shift: int = 0) -> None:
        span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        self.memory = torch.full((span + shift + 2 * GUARD_ELEMENTS,), math.nan, dtype=dtype, device=DEVICE)
        self._place = (tuple(shape), tuple(strides), GUARD_ELEMENTS + shift)
        self.view = self.memory.as_strided(*self._place)

    def assert_intact(self, note: object = "") -> None:
        """Everything but the view is still NaN, the gaps between its rows too."""
        outside = torch.ones(self.memory.shape, dtype=torch.bool, device=DEVICE)
        outside.as_strided(*self._place).fill_(False)
        written = (~self.memory.isnan() & outside).nonzero()
        assert written.numel() == 0, f"{note} wrote outside its output, at offset {int(written[0]) - self._place[2]} from its start"


def fenced_copy(values: torch.Tensor, strides: Sequence[int] | None = None, shift: int = 0) -> torch.Tensor:
    """`values` at other strides (packed, if none are given), NaN everywhere around and between."""
    fence = Fenced(values.shape, packed_strides(values.shape) if strides is None else strides, values.dtype, shift)
    fence.view.copy_(values)
    return fence.view


def packed_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def random_x(shape: Sequence[int], dtype: torch.dtype, seed: int = 0, axis: int = -1) -> torch.Tensor:
    """Normal values; the second row is 1000 times as large, the third 1000 times as small, the fourth zero."""
    values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    rows = values.movedim(axis, -1).reshape(-1, shape[axis])
    scales = torch.ones(rows.shape[0])
    hard = torch.tensor([1.0, 1e3, 1e-3, 0.0])[: len(scales)]
    scales[: len(hard)] = hard
    others = values.movedim(axis, -1).shape
    return (rows * scales[:, None]).view(others).movedim(-1, axis).contiguous().to(dtype).to(DEVICE)


def random_weight(cols: int, dtype: torch.dtype | None, seed: int = 1) -> torch.Tensor | None:
    """Values from 0.5 to 1.5 between NaN, or None for dtype None."""
    if dtype is None:
        return None
    values = torch.rand(cols, generator=torch.Generator().manual_seed(seed)) + 0.5
    return fenced_copy(values.to(dtype).to(DEVICE))


def dtype_names(x: torch.Tensor, weight: torch.Tensor | None, y: torch.Tensor) -> tuple[str, str, str]:
    """The dtypes of x, w and y as a Problem names them."""
    return _name(x.dtype), "none" if weight is None else _name(weight.dtype), _name(y.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
