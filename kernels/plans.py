"""What a kind of call of `rmsnorm` runs: the arguments checked, the config looked up, the launch prepared; paid once, then remembered."""

from __future__ import annotations

import importlib.util
import sys
from typing import NamedTuple

import torch

from kernels.allocation import on_current_gpu
from kernels.calls import Call, NodeOf, dtype_name
from kernels.device import interpreting
from kernels.geometry import geometry_of
from kernels.numerics import Numerics
from kernels.overrides import active_override
from kernels.reference import rmsnorm_torch
from kernels.settings import read_settings
from kernels.validation import KERNEL_DTYPES, InvalidInput, check_arguments, check_out_memory, overlap_offset

MAX_PLANS = 16384
"""Kinds of calls of a function remembered; past that the table starts anew. 16384 take some 30 MB, 200 with gradients (one eps each)."""


class Plan(NamedTuple):
    """What runs, and how that was decided."""

    call: Call
    served_by: str
    node_of: NodeOf | None = None
    """For inputs that require grad: what `call` calls."""


def into(out: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    return y if out is None else out.copy_(y)


def placed(y: torch.Tensor, out: torch.Tensor | None, strides: tuple[int, ...]) -> torch.Tensor:
    """y copied into `out`, or where none is given at these strides, copied only if it has others."""
    if out is None and y.stride() != strides:
        out = torch.empty_strided(y.shape, strides, dtype=y.dtype, device=y.device)
    return into(out, y)


def prepare(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    axis: int,
    out: torch.Tensor | None,
    backend: str,
    batch_invariant: bool,
    numerics: Numerics,
) -> Plan:
    """Check the arguments and decide what serves this kind of call."""
    check_arguments(x, weight, axis, out, backend, numerics)
    backend = requested_backend(backend)
    if out is not None:
        check_out_needs_no_grad(x, weight, out)
    if backend == "torch":
        return _torch_plan(axis, numerics, "torch_requested")
    if x.numel() == 0:
        raise InvalidInput(f'x is empty, shape {tuple(x.shape)}; skip the call, or pass backend="torch"')
    if not kernels_serve(x, weight, backend, of_a_subclass(x=x, weight=weight)):
        return _torch_plan(axis, numerics, "torch_requested")
    if out is not None:
        check_out_memory(x, out)
    plan = _triton_plan(x, weight, axis % x.dim(), out, batch_invariant, numerics)
    return _differentiable_plan(plan, axis % x.dim(), numerics) if needs_grad(x, weight) else plan


def requested_backend(backend: str) -> str:
    """`backend`, or for "auto" what the environment says that it means."""
    return read_settings().backend if backend == "auto" else backend


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether gradients are recorded and one of these wants its own."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def check_out_needs_no_grad(x: torch.Tensor, weight: torch.Tensor | None, out: torch.Tensor) -> None:
    """Raise InvalidInput where a gradient would have to flow through `out`."""
    if needs_grad(x, weight, out):
        raise InvalidInput("out was given, but an input or out requires grad; drop out or call under torch.no_grad()")


def kernels_serve(x: torch.Tensor, weight: torch.Tensor | None, backend: str, reason: str = "") -> bool:
    """Whether kernels are to serve these inputs, of any number of rows, rather than PyTorch; not if the caller has a `reason`.

    backend is "auto" or "triton". Raises InvalidInput for a tensor that is on no GPU, and where backend="triton" can't be had.
    """
    if x.device.type != "cuda" and not interpreting() and has_triton():
        raise InvalidInput(f'x is on {x.device}; move it to a GPU with x.cuda(), or pass backend="torch"')
    reason = reason or why_no_kernel(x, weight)
    if reason and backend == "triton":
        raise InvalidInput(f'backend="triton", but {reason}; pass backend="auto"')
    return not reason


def has_triton() -> bool:
    """Whether Triton is installed. Where it can't be (macOS, Windows) PyTorch serves every device."""
    return sys.platform == "linux" and importlib.util.find_spec("triton") is not None


def why_no_kernel(*inputs: torch.Tensor | None) -> str:
    """Why no kernel serves plain tensors like these; empty if one does."""
    if not has_triton():
        return "Triton is not installed"
    if any(tensor is not None and tensor.dtype not in KERNEL_DTYPES for tensor in inputs):
        return "a float64 tensor is served by PyTorch only"
    if torch.jit.is_tracing():
        return "torch.jit.trace records PyTorch operations only"
    return ""


def of_a_subclass(**inputs: torch.Tensor | None) -> str:
    """Which of them is no plain tensor, in words; empty if all are."""
    for name, tensor in inputs.items():
        if tensor is not None and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return f"{name} is a {type(tensor).__name__}, which has operations of its own"
    return ""


def _differentiable_plan(plan: Plan, axis: int, numerics: Numerics) -> Plan:
    """The plan as a node of autograd's graph; PyTorch's operations are that already."""
    if plan.served_by in ("torch", "torch_requested"):
        return plan
    from kernels.autograd import differentiable

    call, node_of = differentiable(plan.call, axis, active_override(), numerics)
    return Plan(call, plan.served_by, node_of)


def _torch_plan(axis: int, numerics: Numerics, served_by: str) -> Plan:
    return Plan(lambda out, x, weight, eps: into(out, rmsnorm_torch(x, weight, eps, axis, numerics)), served_by)


def _triton_plan(
    x: torch.Tensor, weight: torch.Tensor | None, axis: int, out: torch.Tensor | None, batch_invariant: bool, numerics: Numerics
) -> Plan:
    from kernels import dispatch

    y_strides = (torch.empty_like(x) if out is None else out).stride()
    geometry = geometry_of(x.shape, x.stride(), y_strides, axis)
    if batch_invariant and geometry is not None and geometry.layout == "strided_axis":
        return _adjacent_plan(x, weight, axis, numerics)
    if geometry is None:
        return _copying_plan(x, weight, axis, batch_invariant, numerics)
    choice = dispatch.choose_and_prepare(
        geometry,
        (dtype_name(x.dtype), "none" if weight is None else dtype_name(weight.dtype), dtype_name(x.dtype)),
        x.get_device(),
        in_place=out is not None and overlap_offset(x, out) is not None,
        batch_invariant=batch_invariant,
        allocate=on_current_gpu(x.shape, y_strides, x.dtype) if x.device.type == "cuda" else None,
        numerics=numerics,
    )
    if choice.launch is None:
        return Plan(_restriding(_torch_plan(axis, numerics, choice.served_by).call, y_strides), choice.served_by)
    # Only the imaginary part of a conjugate can have a lazy minus sign, and its elements lie two apart.
    may_be_negated = geometry.x_col_stride != 1 or geometry.cols == 1
    if may_be_negated or (weight is not None and weight.stride(0) != 1):
        return Plan(_resolving_call(choice.launch, axis, batch_invariant, numerics), choice.served_by)
    return Plan(choice.launch if out is None else _marking_call(choice.launch), choice.served_by)


def _marking_call(launch: Call) -> Call:
    """A launch into `out`, after which a backward that needs out's old values can tell that they are gone."""
    increment_version = torch.autograd.graph.increment_version

    def call(out: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        y = launch(out, x, weight, eps)
        if out is not None and not out.is_inference():
            increment_version(out)
        return y

    return call


def _resolving_call(launch: Call, axis: int, batch_invariant: bool, numerics: Numerics) -> Call:
    """For inputs that may have a lazy minus sign, or a weight whose elements are not adjacent."""
    marking = _marking_call(launch)
    of_resolved: list[Plan] = []  # prepared when it is first needed: without the sign x lies in memory of its own, packed

    def call(out: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        if x.is_neg():
            x = x.resolve_neg()
            if not of_resolved:
                of_resolved.append(_triton_plan(x, weight, axis, out, batch_invariant, numerics))
            return of_resolved[0].call(out, x, weight, eps)
        return marking(out, x, None if weight is None else weight.resolve_neg().contiguous(), eps)

    return call


def _copying_plan(x: torch.Tensor, weight: torch.Tensor | None, axis: int, batch_invariant: bool, numerics: Numerics) -> Plan:
    """x (or out) has rows at more than two strides: normalise a contiguous copy, and copy into `out` where that was given."""
    inner = _triton_plan(x.contiguous(), weight, axis, None, batch_invariant, numerics)
    call = _restriding(lambda _, x, weight, eps: inner.call(None, x.contiguous(), weight, eps), torch.empty_like(x).stride())
    return Plan(call, inner.served_by)


def _adjacent_plan(x: torch.Tensor, weight: torch.Tensor | None, axis: int, numerics: Numerics) -> Plan:
    """For batch_invariant: normalise a copy in which the elements of a row are adjacent, for a row then has the bits that it has there.

    Where they lie apart, how many rows lie between them decides how a kernel sums them up.
    """

    def adjacent(x: torch.Tensor) -> torch.Tensor:
        return x.movedim(axis, -1).resolve_neg().contiguous()

    inner = _triton_plan(adjacent(x), weight, x.dim() - 1, None, True, numerics)
    call = _restriding(lambda _, x, weight, eps: inner.call(None, adjacent(x), weight, eps).movedim(-1, axis), torch.empty_like(x).stride())
    return Plan(call, inner.served_by)


def _restriding(call: Call, strides: tuple[int, ...]) -> Call:
    """For a `call` that allocates a result at whatever strides: one more copy into `out`, or to these strides if it has others."""

    def restrided(out: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        return placed(call(None, x, weight, eps), out, strides)

    return restrided
