"""Whether a launch computes RMSNorm or its gradients: against a float64 reference, on poisoned outputs, before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
        self.tensors, self.memories = case.guarded(seed)
        self._rows = max(1, CHUNK_ELEMENTS // max(1, self.tensors.x[0].numel()))

    def fault(self, launch: Callable[..., object], roundings: int = 1) -> str:
        """What is wrong with the result of `launch` (a Launcher or BackwardLauncher), in a few words; empty if nothing is."""
        for memory in self.memories:
            memory.fill_(float("nan"))
        launch(*self.tensors.arguments)
        for memory in self.memories:
            if not all(zone.isnan().all() for zone in guards_of(memory)):
                return "wrote outside its output"
        worst = self._worst_gradient(roundings) if self.case.problem.is_backward else self._worst_result(roundings)
        if worst == float("inf"):
            return "left an element unwritten or not finite"
        return f"error is {worst:.3g} × the tolerance" if worst > 1 else ""

    def _worst_result(self, roundings: int) -> float:
        """Largest error of y and, of a sum, of that, as a multiple of what is allowed with that many roundings to y's dtype.

        y is held against the RMSNorm of the sum that was given, rounded as it is.
        """
        worst = 0.0
        for part in self._parts():
            normalised = self.tensors.x[part]
            if self.tensors.residual is not None and self.tensors.new_residual is not None:
                total = normalised.double() + self.tensors.residual[part].double()
                normalised = self.tensors.new_residual[part]
                worst = max(worst, _excess(normalised, total, sum_tolerance(total, self.case.problem.x_dtype)))
            expected = float64_rmsnorm(normalised, self.tensors.weight, EPS, self.case.axis)
            dtype = self.case.problem.y_dtype
            allowed = expected.abs() * relative_tolerance(dtype, roundings) + roundings * SMALLEST_SUBNORMAL[dtype]
            worst = max(worst, _excess(self.tensors.y[part], expected, allowed))
        return worst

    def _worst_gradient(self, roundings: int) -> float:
        """Largest error of dx (in either dtype) and dw, as a multiple of what is allowed with that many roundings on the way."""
        dy, weight = self.tensors.dy, self.tensors.weight
        assert dy is not None
        problem = self.case.problem
        worst = 0.0
        dw, squares = (torch.zeros(problem.cols, dtype=torch.float64, device=dy.device) for _ in range(2))
        for part in self._parts():
            dsum = None if self.tensors.dsum is None else self.tensors.dsum[part]
            wanted = float64_gradients(dy[part], self.tensors.x[part], weight, EPS, dsum)
            for got, dtype in ((self.tensors.y, problem.x_dtype), (self.tensors.daddend, problem.y_dtype)):
                if got is not None:
                    worst = max(worst, _excess(got[part], wanted.dx, dx_tolerance(wanted, dtype, problem.y_dtype, roundings)))
            dw += wanted.dw_terms.sum(0)
            squares += wanted.dw_terms.square().sum(0)
        if self.tensors.dw is not None:
            worst = max(worst, _excess(self.tensors.dw, dw, dw_tolerance(dw, squares, problem.w_dtype, problem.y_dtype, roundings)))
        return worst

    def _parts(self) -> Iterator[slice]:
        for start in range(0, self.tensors.x.shape[0], self._rows):
            yield slice(start, start + self._rows)


def _excess(got: torch.Tensor, expected: torch.Tensor, allowed: torch.Tensor) -> float:
    return float(((got.double() - expected).abs() / allowed).nan_to_num(nan=float("inf")).max())


@dataclass(frozen=True)
class Gradients:
    """dx of rows in float64, what its rounding errors are relative to, and each row's term of dw."""

    dx: torch.Tensor
    dx_magnitude: torch.Tensor
    dw_terms: torch.Tensor


def float64_gradients(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float, dsum: torch.Tensor | None = None
) -> Gradients:
    """dx = rstd · (g − x̂ · mean(g · x̂)) + dsum and the terms dy · x̂ of dw, over the last axis, in float64; g = dy · w, x̂ = x · rstd.

    dx_magnitude is rstd · (|g| + |x̂| · mean|g · x̂|) + |dsum|: the sum of the absolute values of dx's terms.
    """
    dy, x = dy.double(), x.double()
    g = dy if weight is None else dy * weight.double()
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    x_hat = x * rstd
    products = g * x_hat
    dx = rstd * (g - x_hat * products.mean(-1, keepdim=True))
    magnitude = rstd * (g.abs() + x_hat.abs() * products.abs().mean(-1, keepdim=True))
    if dsum is not None:
        dx += dsum.double()
        magnitude += dsum.double().abs()
    return Gradients(dx, magnitude, dy * x_hat)


def sum_tolerance(total: torch.Tensor, dtype: str) -> torch.Tensor:
    """Largest error of a right sum of two numbers: one rounding to fp32 and one to its dtype, each also of the other's error."""
    return total.abs() * (UNIT_ROUNDOFF[dtype] + 2 * 2.0**-24) + SMALLEST_SUBNORMAL[dtype]


def dx_tolerance(wanted: Gradients, dtype: str, y_dtype: str = "float32", roundings: int = 1) -> torch.Tensor:
    """Largest error of a right dx: one rounding to its dtype, and FP32_STEPS roundings of terms that may cancel.

    The project's kernels round once. Each rounding more is one of g and of x̂ to y's dtype, of which a term has three factors at most.
    """
    steps = FP32_STEPS * 2.0**-24 + (roundings - 1) * 3 * UNIT_ROUNDOFF[y_dtype]
    return wanted.dx.abs() * UNIT_ROUNDOFF[dtype] + wanted.dx_magnitude * steps + SMALLEST_SUBNORMAL[dtype]


def dw_tolerance(dw: torch.Tensor, squares: torch.Tensor, dtype: str, y_dtype: str = "float32", roundings: int = 1) -> torch.Tensor:
    """Largest error of a right dw, the sum over rows of terms t whose squares sum up to `squares`.

    One rounding to dw's dtype. Each term is off by at most FP32_STEPS · 2^-24 · |t|, and one row's error knows nothing of another's:
    together they are off by FP32_STEPS · 2^-24 · √Σt², which grows with √rows. Adding up rounds a running sum of the size of √Σt² or of dw
    at most 1024 times in one accumulator (`kernels.variants.backward_common.MAX_TURNS`), by half an ulp at most and of either sign:
    √1024 = 32 more such steps, inside FP32_STEPS. What all terms are off by alike (the reciprocal root) is relative to dw itself.
    Each rounding more is one of x̂ to y's dtype: errors of up to a unit roundoff, spread evenly, whose sum has a standard deviation of
    that times √(Σt² / 3); four of them are allowed.
    """
    steps = FP32_STEPS * 2.0**-24 + (roundings - 1) * 4 / math.sqrt(3) * UNIT_ROUNDOFF[y_dtype]
    return dw.abs() * (UNIT_ROUNDOFF[dtype] + FP32_STEPS * 2.0**-24) + squares.sqrt() * steps + SMALLEST_SUBNORMAL[dtype]


def float64_rmsnorm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, axis: int) -> torch.Tensor:
    """x / sqrt(mean(x², axis) + eps) * weight in float64."""
    wide = x.double()
    y = wide / (wide.square().mean(axis, keepdim=True) + eps).sqrt()
    if weight is not None:
        shape = [1] * x.dim()
        shape[axis] = x.shape[axis]
        y *= weight.double().view(shape)
    return y
