"""Other projects' RMSNorm kernels, where they are installed. Nothing of theirs is imported before it is asked for."""

from __future__ import annotations

from benchmarks.other_ops import with_other_ops
from benchmarks.providers import OURS, PYTORCH, Launch, Provider, Refusal
from tuner.cases import EPS, Case
from tuning_db.model import NO_WEIGHT, Device


def _needs(case: Case, *, weight: bool) -> None:
    if case.axis != -1:
        raise Refusal("normalises the last axis only")
    if weight and case.problem.w_dtype == NO_WEIGHT:
        raise Refusal("needs a weight")


def _liger(case: Case, _: Device) -> Launch:
    _needs(case, weight=True)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda tensors: LigerRMSNormFunction.apply(tensors.x, tensors.weight, EPS)


def _quack(case: Case, _: Device) -> Launch:
    _needs(case, weight=False)
    from quack.rmsnorm import rmsnorm_fwd

    if case.problem.layout == "contiguous":
        return lambda tensors: rmsnorm_fwd(tensors.x, tensors.weight, eps=EPS)[0]
    cols = case.problem.cols  # it takes two dimensions; rows at two strides are copied for that
    return lambda tensors: rmsnorm_fwd(tensors.x.reshape(-1, cols), tensors.weight, eps=EPS)[0].view(tensors.x.shape)


def _flashinfer(case: Case, _: Device) -> Launch:
    _needs(case, weight=True)
    from flashinfer.norm import rmsnorm

    return lambda tensors: rmsnorm(tensors.x, tensors.weight, eps=EPS, out=tensors.y)


def _flashinfer_allocating(case: Case, _: Device) -> Launch:
    _needs(case, weight=True)
    from flashinfer.norm import rmsnorm

    return lambda tensors: rmsnorm(tensors.x, tensors.weight, eps=EPS)


def _flaggems(case: Case, _: Device) -> Launch:
    _needs(case, weight=True)
    from flag_gems import rms_norm

    shape = [case.problem.cols]
    return lambda tensors: rms_norm(tensors.x, shape, tensors.weight, EPS)


TWICE = 2
"""Liger (casting mode "llama") and FlagGems round x · rstd to x's dtype before they multiply by the weight."""

PEERS = {
    "liger": Provider(
        calls="liger_kernel.ops.rms_norm.LigerRMSNormFunction.apply(x, weight, eps)",
        distribution="liger-kernel",
        module="liger_kernel",
        prepare=_liger,
        roundings=TWICE,
        foreign=True,
    ),
    "quack": Provider("quack.rmsnorm.rmsnorm_fwd(x, weight, eps=eps)", "quack-kernels", "quack", _quack, foreign=True),
    "flashinfer": Provider(
        calls="flashinfer.norm.rmsnorm(x, weight, eps, out=y)",
        distribution="flashinfer-python",
        module="flashinfer",
        prepare=_flashinfer,
        prepare_allocating=_flashinfer_allocating,
        foreign=True,
    ),
    "flaggems": Provider(
        calls="flag_gems.rms_norm(x, [cols], weight, eps)",
        distribution="flag-gems",
        module="flag_gems",
        prepare=_flaggems,
        roundings=TWICE,
        foreign=True,
    ),
}

PROVIDERS: dict[str, Provider] = {name: with_other_ops(name, provider) for name, provider in {**OURS, **PYTORCH, **PEERS}.items()}
"""Every provider by name, in the order of tables and figures."""
