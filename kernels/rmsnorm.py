"""The public function `rmsnorm`: checks, then a dict hit, an allocation and a launch."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.autograd import forward_ad

from kernels.device import interpreting
from kernels.geometry import Geometry, geometry_of
from kernels.overrides import active_override
from kernels.reference import rmsnorm_torch
from kernels.settings import read_settings
from kernels.validation import KERNEL_DTYPES, InvalidInput, check_arguments, check_out_memory, checked_eps, overlap_offset

if TYPE_CHECKING:
    from kernels.launch import Launcher

Call: TypeAlias = Callable[[torch.Tensor, "torch.Tensor | None", float, "torch.Tensor | None"], torch.Tensor]
"""call(x, weight, eps, out) -> y for one kind of arguments, everything else decided."""

MAX_PLANS = 16384
"""Kinds of calls remembered; past that the table starts anew. 16384 plans take some 30 MB."""


class _Plan:
    """A remembered kind of call: what runs, and how that was decided."""

    __slots__ = ("call", "served_by")

    def __init__(self, call: Call, served_by: str) -> None:
        self.call = call
        self.served_by = served_by


_plans: dict[Any, _Plan] = {}
_transform = torch._C._functorch.peek_interpreter_stack  # the innermost torch.func transform (vmap, grad, …), or None


def rmsnorm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    axis: int = -1,
    *,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Root mean square layer normalization: y = x / sqrt(mean(x², axis) + eps) * weight.

    Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4, with eps inside the root. Arithmetic is fp32 whatever
    the dtypes (fp64 for fp64 x), the result is rounded once to x's dtype.

    Args:
        x: tensor of any shape with at least one dimension and no size 0; fp16, bf16, fp32 (kernels) or fp64 (PyTorch). Any strides:
            rows at up to two strides are read in place (a q or k slice of a packed qkv); what needs more is copied once.
        weight: None, or a vector of length x.shape[axis] on x's device, of any of these dtypes.
        eps: added to the mean square; not negative.
        axis: the dimension to normalise over.
        out: where to write the result: x's shape, dtype and device. May be x itself.
        backend: "auto", "triton" (an error where no kernel serves the call) or "torch" (any device, any float dtype, empty x).
            RMSNORM_BACKEND in the environment replaces "auto".
        batch_invariant: choose the config by x.shape[axis] alone, so that a row's bits don't depend on how many rows come with it
            (among tensors whose pointers and strides are multiples of 16 bytes, or all are not). Only for rows whose elements are
            adjacent; slower for rows of more than 32768 elements. It says nothing of the gradients.

    Returns:
        A tensor of x's shape and dtype, strides as `torch.empty_like(x)` gives them; `out` if that was given. Differentiable: the
        gradients come from tuned kernels too (`kernels.backward.prepare_backward` says which strides are read in place), are the same
        bits in every run, and can be differentiated once more (create_graph=True), by PyTorch's operations.

    Raises:
        InvalidInput: a ValueError and an AssertionError, with the value seen and the way out.
    """
    if eps.__class__ is not float or not eps >= 0:
        eps = checked_eps(eps)
    if torch.compiler.is_dynamo_compiling() or _transform() is not None or forward_ad._current_level >= 0:
        # Traced, or under a torch.func transform or forward-mode AD: PyTorch's operations know what to do.
        check_arguments(x, weight, axis, out, backend)
        return _into(out, rmsnorm_torch(x, weight, eps, axis))
    key: tuple[Any, ...] | None
    try:
        key = (
            x.shape, x.stride(), x.dtype, x.get_device(), x.__class__, axis, axis.__class__, backend, batch_invariant, active_override(),
            None if weight is None else (weight.shape, weight.stride(), weight.dtype, weight.get_device(), weight.__class__),
            None if out is None else (out.shape, out.stride(), out.dtype, out.get_device(), overlap_offset(x, out), out.requires_grad),
            torch.is_grad_enabled(), x.requires_grad or (weight is not None and weight.requires_grad),
        )  # fmt: skip
        plan = _plans.get(key)
    except (AttributeError, TypeError, RuntimeError):
        # No tensor, an unhashable argument, or a tensor without strides: the checks say which.
        key = plan = None
    if plan is None:
        plan = _prepare(x, weight, axis, out, backend, batch_invariant)
        if key is not None:
            if len(_plans) >= MAX_PLANS:
                _plans.clear()
            _plans[key] = plan
    return plan.call(x, weight, eps, out)


def stats() -> dict[str, int]:
    """How many distinct kinds of calls (shape, strides, dtypes, device, …) each tier of the ladder serves in this process.

    Keys are tier names in lower case: `exact`, `nearest_rows`, `nearest_cols`, `nearest_device`, `modelled`, `heuristic`, `torch`,
    `override`; besides, `torch_requested` counts those that went to PyTorch without a lookup (fp64, backend="torch"). Backwards
    are not counted.
    """
    return dict(Counter(plan.served_by for plan in list(_plans.values())))


def forget_plans() -> None:
    """Drop all prepared plans and what was read from the databases, so that the next call looks again."""
    _plans.clear()
    if _has_triton():
        from kernels import dispatch

        dispatch.record_index.cache_clear()


def _into(out: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    return y if out is None else out.copy_(y)


def _prepare(
    x: torch.Tensor, weight: torch.Tensor | None, axis: int, out: torch.Tensor | None, backend: str, batch_invariant: bool
) -> _Plan:
    """Check the arguments and decide what serves this kind of call."""
    check_arguments(x, weight, axis, out, backend)
    if backend == "auto":
        backend = read_settings().backend
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad))
    if out is not None and (needs_grad or (torch.is_grad_enabled() and out.requires_grad)):
        raise InvalidInput("out was given, but an input or out requires grad; drop out or call under torch.no_grad()")
    if backend == "torch":
        return _torch_plan(axis, "torch_requested")
    if x.numel() == 0:
        raise InvalidInput(f'x is empty, shape {tuple(x.shape)}; skip the call, or pass backend="torch"')
    if x.device.type != "cuda" and not interpreting() and _has_triton():
        raise InvalidInput(f'x is on {x.device}; move it to a GPU with x.cuda(), or pass backend="torch"')
    reason = _why_not_triton(x, weight)
    if reason:
        if backend == "triton":
            raise InvalidInput(f'backend="triton", but {reason}; pass backend="auto"')
        return _torch_plan(axis, "torch_requested")
    if out is not None:
        check_out_memory(x, out)
    plan = _triton_plan(x, weight, axis % x.dim(), out, batch_invariant)
    return _differentiable_plan(plan, axis % x.dim()) if needs_grad else plan


def _has_triton() -> bool:
    """Whether Triton is installed. Where it can't be (macOS, Windows) PyTorch serves every device."""
    return sys.platform == "linux" and importlib.util.find_spec("triton") is not None


def _why_not_triton(x: torch.Tensor, weight: torch.Tensor | None) -> str:
    """Why no kernel serves these inputs; empty if one does."""
    if not _has_triton():
        return "Triton is not installed"
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor is not None and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return f"{name} is a {type(tensor).__name__}, which has operations of its own"
    if x.dtype not in KERNEL_DTYPES or (weight is not None and weight.dtype not in KERNEL_DTYPES):
        return "a float64 tensor is served by PyTorch only"
    if torch.jit.is_tracing():
        return "torch.jit.trace records PyTorch operations only"
    return ""


def _differentiable_plan(plan: _Plan, axis: int) -> _Plan:
    """The plan as a node of autograd's graph; PyTorch's operations are that already."""
    if plan.served_by in ("torch", "torch_requested"):
        return plan
    from kernels.autograd import Differentiable

    return _Plan(Differentiable(plan.call, axis, active_override()), plan.served_by)


def _torch_plan(axis: int, served_by: str) -> _Plan:
    return _Plan(lambda x, weight, eps, out: _into(out, rmsnorm_torch(x, weight, eps, axis)), served_by)


def _triton_plan(x: torch.Tensor, weight: torch.Tensor | None, axis: int, out: torch.Tensor | None, batch_invariant: bool) -> _Plan:
    from kernels import dispatch

    y_strides = (torch.empty_like(x) if out is None else out).stride()
    geometry = geometry_of(x.shape, x.stride(), y_strides, axis)
    if batch_invariant and geometry is not None and geometry.layout == "strided_axis":
        raise InvalidInput(
            f"batch_invariant=True, but the elements along axis {axis} are {x.stride(axis)} apart; "
            f"pass x.movedim({axis}, -1).contiguous() and axis=-1"
        )
    if geometry is None:
        return _copying_plan(x, weight, axis, batch_invariant)
    choice = dispatch.choose_and_prepare(
        geometry,
        (_name(x.dtype), "none" if weight is None else _name(weight.dtype), _name(x.dtype)),
        x.get_device(),
        in_place=out is not None and overlap_offset(x, out) is not None,
        batch_invariant=batch_invariant,
    )
    if choice.launch is None:
        return _torch_plan(axis, choice.served_by)
    return _Plan(_launching_call(choice.launch, geometry, x, weight, y_strides, axis), choice.served_by)


def _launching_call(
    launch: Launcher, geometry: Geometry, x: torch.Tensor, weight: torch.Tensor | None, y_strides: tuple[int, ...], axis: int
) -> Call:
    allocate = _allocator(x, y_strides)

    def call(x: torch.Tensor, weight: torch.Tensor | None, eps: float, out: torch.Tensor | None) -> torch.Tensor:
        if out is None:
            y = allocate(x)
            launch(y, x, weight, eps)
            return y
        launch(out, x, weight, eps)
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)  # so that a backward that needs the old values can tell
        return out

    def odd_call(x: torch.Tensor, weight: torch.Tensor | None, eps: float, out: torch.Tensor | None) -> torch.Tensor:
        if x.is_neg():
            return rmsnorm(x.resolve_neg(), weight, eps, axis, out=out)
        return call(x, None if weight is None else weight.resolve_neg().contiguous(), eps, out)

    # Only the imaginary part of a conjugate can have a lazy minus sign, and its elements lie two apart.
    may_be_negated = geometry.x_col_stride != 1 or geometry.cols == 1
    return odd_call if may_be_negated or (weight is not None and weight.stride(0) != 1) else call


def _copying_plan(x: torch.Tensor, weight: torch.Tensor | None, axis: int, batch_invariant: bool) -> _Plan:
    """x (or out) has rows at more than two strides: normalise a contiguous copy, and copy into `out` where that was given."""
    packed = x.contiguous()
    inner = _triton_plan(packed, weight, axis, None, batch_invariant)

    def call(x: torch.Tensor, weight: torch.Tensor | None, eps: float, out: torch.Tensor | None) -> torch.Tensor:
        return _into(out, inner.call(x.contiguous(), weight, eps, None))

    return _Plan(call, inner.served_by)


def _allocator(x: torch.Tensor, strides: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Allocates the result. On CUDA with the function that Inductor's code calls, where torch has it: 2.5 µs instead of 4.1 (H100)."""
    fast = getattr(getattr(torch._C._dynamo, "guards", None), "_empty_strided_cuda", None)
    if x.device.type != "cuda" or fast is None:
        return torch.empty_like
    shape, dtype, index = tuple(x.shape), x.dtype, x.get_device()
    device_now = torch._C._cuda_getDevice

    def allocate(x: torch.Tensor) -> torch.Tensor:
        return fast(shape, strides, dtype) if device_now() == index else torch.empty_like(x)

    return allocate


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
