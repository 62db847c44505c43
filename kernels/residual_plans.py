"""What a kind of call of `add_rmsnorm` runs: the arguments checked, the config looked up, the launch prepared."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.allocation import on_device
from kernels.calls import AddCall, Sums, dtype_name
from kernels.geometry import geometry_of
from kernels.numerics import Numerics
from kernels.overrides import active_override
from kernels.plans import kernels_serve, needs_grad, of_a_subclass, placed, requested_backend, why_no_kernel
from kernels.reference import add_rmsnorm_torch
from kernels.validation import InvalidInput, check_add_arguments, check_add_memory, overlap_offset
from tuning_db.model import ADD_FORWARD, LAYOUTS_OF, NO_WEIGHT


class AddPlan(NamedTuple):
    """What runs, and how that was decided."""

    call: AddCall
    served_by: str


def into(out: torch.Tensor | None, residual_out: torch.Tensor | None, sums: Sums) -> Sums:
    """The results where they were asked for."""
    y, new_residual = sums
    return y if out is None else out.copy_(y), new_residual if residual_out is None else residual_out.copy_(new_residual)


def prepare(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    backend: str,
    batch_invariant: bool,
    numerics: Numerics,
) -> AddPlan:
    """Check the arguments and decide what serves this kind of call."""
    check_add_arguments(x, residual, weight, out, residual_out, backend, numerics)
    backend = requested_backend(backend)
    given = " and ".join(name for name, tensor in (("out", out), ("residual_out", residual_out)) if tensor is not None)
    if given:
        check_results_need_no_grad(given, x, residual, weight, out, residual_out)
        check_add_memory(x, residual, out, residual_out)
    if backend == "torch":
        return _torch_plan(numerics, "torch_requested")
    if x.numel() == 0:
        raise InvalidInput(f'x is empty, shape {tuple(x.shape)}; skip the call, or pass backend="torch"')
    if not kernels_serve(x, weight, backend, of_a_subclass(x=x, residual=residual, weight=weight) or why_no_kernel(residual)):
        return _torch_plan(numerics, "torch_requested")
    plan = _triton_plan(x, residual, weight, out, residual_out, batch_invariant, numerics)
    if not needs_grad(x, residual, weight) or plan.served_by == "torch":  # PyTorch's operations are differentiable already
        return plan
    from kernels.residual_autograd import differentiable

    return AddPlan(differentiable(plan.call, active_override(), numerics), plan.served_by)


def check_results_need_no_grad(given: str, *tensors: torch.Tensor | None) -> None:
    """Raise InvalidInput where a gradient would have to flow through results that are `given`; tensors are these and the inputs."""
    if needs_grad(*tensors):
        raise InvalidInput(f"{given} given, but an input or result requires grad; drop {given} or call under torch.no_grad()")


def _torch_plan(numerics: Numerics, served_by: str) -> AddPlan:
    def call(
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
    ) -> Sums:
        return into(out, residual_out, add_rmsnorm_torch(x, residual, weight, eps, numerics))

    return AddPlan(call, served_by)


def _triton_plan(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    batch_invariant: bool,
    numerics: Numerics,
) -> AddPlan:
    from kernels import dispatch

    geometry = geometry_of(x.shape, residual.stride(), x.stride(), x.dim() - 1)
    y_stride, sum_stride = (torch.empty_like(t).stride() if to is None else to.stride() for t, to in ((x, out), (residual, residual_out)))
    is_readable = geometry is not None and geometry.layout in LAYOUTS_OF[ADD_FORWARD]
    is_readable = is_readable and y_stride == x.stride() and sum_stride == residual.stride() and not (x.is_neg() or residual.is_neg())
    if geometry is None or not is_readable or (weight is not None and (weight.stride(0) != 1 or weight.is_neg())):
        return _copying_plan(x, residual, weight, batch_invariant, numerics)
    choice = dispatch.choose_and_prepare_add(
        geometry,
        (dtype_name(residual.dtype), NO_WEIGHT if weight is None else dtype_name(weight.dtype), dtype_name(x.dtype)),
        x.get_device(),
        in_place=any(a is not None and overlap_offset(a, b) is not None for a, b in ((out, x), (residual_out, residual))),
        batch_invariant=batch_invariant,
        numerics=numerics,
    )
    launch = choice.launch
    if launch is None:
        return _restriding(_torch_plan(numerics, choice.served_by), x, residual)
    new_y, new_sum = (on_device(t.shape, t.stride(), t.dtype, t.device) for t in (x, residual))
    increment_version = torch.autograd.graph.increment_version

    def call(
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
    ) -> Sums:
        y = new_y() if out is None else out
        new_residual = new_sum() if residual_out is None else residual_out
        launch(y, new_residual, x, residual, weight, eps)
        for given in (out, residual_out):
            if given is not None and not given.is_inference():
                increment_version(given)  # a backward that needs its old values can tell that they are gone
        return y, new_residual

    return AddPlan(call, choice.served_by)


def _copying_plan(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, batch_invariant: bool, numerics: Numerics
) -> AddPlan:
    """For what the kernels don't read as it lies: packed copies, and results copied to where they were asked for."""

    def packed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.resolve_neg().contiguous()

    packed_weight = None if weight is None else packed(weight)
    inner = _triton_plan(packed(x), packed(residual), packed_weight, None, None, batch_invariant, numerics)

    def call(
        _: torch.Tensor | None,
        __: torch.Tensor | None,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
    ) -> Sums:
        weight = None if weight is None else packed(weight)
        return inner.call(None, None, packed(x), packed(residual), weight, eps)

    return _restriding(AddPlan(call, inner.served_by), x, residual)


def _restriding(plan: AddPlan, x: torch.Tensor, residual: torch.Tensor) -> AddPlan:
    """For a plan that allocates results at whatever strides: copied into those given, or to the strides that `torch.empty_like` gives."""
    y_stride, sum_stride = torch.empty_like(x).stride(), torch.empty_like(residual).stride()

    def call(
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
    ) -> Sums:
        y, new_residual = plan.call(None, None, x, residual, weight, eps)
        return placed(y, out, y_stride), placed(new_residual, residual_out, sum_stride)

    return AddPlan(call, plan.served_by)
