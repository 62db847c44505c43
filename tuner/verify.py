"""Whether a launch computes RMSNorm: against a float64 reference, on poisoned outputs, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tuner.cases import EPS, Case, guards_of

UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
"""Half a unit in the last place: 11, 8 and 24 significant bits."""

SMALLEST_SUBNORMAL = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}

FP32_STEPS = 256
"""Most fp32 roundings on the way to a result. The sum of squares is the longest chain: at most 64 additions in a thread (512 for a
looped row of 10^6 elements in 4 warps), 10 between threads, 8 between programs, each relative to a sum of positives and halved by the
square root; the reciprocal root adds 2, the two products 2."""

CHUNK_ELEMENTS = 1 << 25


def relative_tolerance(y_dtype: str, roundings: int = 1) -> float:
    """Largest relative error of a right result: `roundings` to y's dtype and FP32_STEPS fp32 roundings before it.

    The project's kernels round once. An implementation that rounds x · rstd to y's dtype before it multiplies by the weight rounds
    twice.
    """
    return roundings * UNIT_ROUNDOFF[y_dtype] + FP32_STEPS * 2.0**-24


class Verifier:
    """The float64 result of one Case, to hold launches against."""

    def __init__(self, case: Case, seed: int = 1) -> None:
        self.case = case
        self.tensors, self.memory = case.guarded(seed)
        self._rows = max(1, CHUNK_ELEMENTS // max(1, self.tensors.x[0].numel()))

    def fault(self, launch: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, float], object], roundings: int = 1) -> str:
        """What is wrong with what `launch(y, x, weight, eps)` wrote, in a few words; empty if nothing is."""
        self.memory.fill_(float("nan"))
        launch(self.tensors.y, self.tensors.x, self.tensors.weight, EPS)
        for zone in guards_of(self.memory):
            if not zone.isnan().all():
                return "wrote outside its output"
        worst = 0.0
        for start in range(0, self.tensors.x.shape[0], self._rows):
            part = slice(start, start + self._rows)
            expected = float64_rmsnorm(self.tensors.x[part], self.tensors.weight, EPS, self.case.axis)
            dtype = self.case.problem.y_dtype
            allowed = expected.abs() * relative_tolerance(dtype, roundings) + roundings * SMALLEST_SUBNORMAL[dtype]
            excess = (self.tensors.y[part].double() - expected).abs() / allowed
            worst = max(worst, float(excess.nan_to_num(nan=float("inf")).max()))
        if worst == float("inf"):
            return "left an element unwritten or not finite"
        return f"error is {worst:.3g} × the tolerance" if worst > 1 else ""


def float64_rmsnorm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, axis: int) -> torch.Tensor:
    """x / sqrt(mean(x², axis) + eps) * weight in float64."""
    wide = x.double()
    y = wide / (wide.square().mean(axis, keepdim=True) + eps).sqrt()
    if weight is not None:
        shape = [1] * x.dim()
        shape[axis] = x.shape[axis]
        y *= weight.double().view(shape)
    return y
