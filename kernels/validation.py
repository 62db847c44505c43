"""What `rmsnorm` accepts: one clear error for everything else."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch

from kernels.numerics import CASTINGS, PLAIN, Numerics
from kernels.settings import BACKENDS

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float64)


class InvalidInput(ValueError, AssertionError):
    """An argument that `rmsnorm` can't work with. The text names the value seen and what would work."""


def checked_eps(eps: Any) -> float:
    """eps as a float. Raises InvalidInput."""
    if isinstance(eps, torch.Tensor):
        raise InvalidInput("eps is a tensor, which would make every call wait for the GPU; pass a float")
    if not _is_number(eps) or not float(eps) >= 0:
        raise InvalidInput(f"eps is {eps!r}; pass a number that is not negative, such as 1e-6")
    return float(eps)


def checked_numerics(weight_offset: Any, casting: Any) -> Numerics:
    """The numerics mode of these arguments. Raises InvalidInput."""
    if weight_offset.__class__ is not float or not -math.inf < weight_offset < math.inf:
        if isinstance(weight_offset, torch.Tensor):
            raise InvalidInput("weight_offset is a tensor, which would make every call wait for the GPU; pass a float")
        if not _is_number(weight_offset) or not -math.inf < float(weight_offset) < math.inf:
            raise InvalidInput(f"weight_offset is {weight_offset!r}; pass a finite number, such as 1.0")
        weight_offset = float(weight_offset)
    if casting not in CASTINGS:
        raise InvalidInput(f"casting is {casting!r}; use one of {', '.join(CASTINGS)}")
    return Numerics(weight_offset, casting == "llama")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_arguments(x: Any, weight: Any, axis: Any, out: Any, backend: Any, numerics: Numerics = PLAIN) -> None:
    """Raise InvalidInput for what no backend takes."""
    if not isinstance(x, torch.Tensor):
        raise InvalidInput(f"x is a {type(x).__name__}; pass a torch.Tensor")
    if x.layout != torch.strided:
        raise InvalidInput(f"x has layout {x.layout}; pass a dense tensor, for example x.to_dense()")
    if x.dtype not in FLOAT_DTYPES:
        raise InvalidInput(f"x.dtype is {x.dtype}; use float16, bfloat16, float32 or float64")
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise InvalidInput(f"axis is {axis!r}; pass an int")
    if x.dim() == 0:
        raise InvalidInput("x has no dimensions; pass at least a vector, for example x.view(1)")
    if not -x.dim() <= axis < x.dim():
        raise InvalidInput(f"axis is {axis}, but x has {x.dim()} dimensions; use {-x.dim()} … {x.dim() - 1}")
    cols = x.shape[axis]
    if weight is not None:
        if not isinstance(weight, torch.Tensor):
            raise InvalidInput(f"weight is a {type(weight).__name__}; pass a torch.Tensor or None")
        if weight.dim() != 1 or weight.shape[0] != cols:
            raise InvalidInput(f"weight has shape {tuple(weight.shape)}; x.shape[{axis}] = {cols} asks for ({cols},)")
        if weight.dtype not in FLOAT_DTYPES:
            raise InvalidInput(f"weight.dtype is {weight.dtype}; use float16, bfloat16, float32 or float64")
        if weight.device != x.device:
            raise InvalidInput(f"weight is on {weight.device}, x on {x.device}; move one of them")
    elif numerics.weight_offset:
        raise InvalidInput(f"weight_offset is {numerics.weight_offset}, but there is no weight; pass one, or weight_offset=0.0")
    if backend not in BACKENDS:
        raise InvalidInput(f"backend is {backend!r}; use one of {', '.join(BACKENDS)}")
    _check_result("out", out, "x", x)


def check_add_arguments(x: Any, residual: Any, weight: Any, out: Any, residual_out: Any, backend: Any, numerics: Numerics = PLAIN) -> None:
    """As `check_arguments`, of add_rmsnorm."""
    check_arguments(x, weight, -1, out, backend, numerics)
    if not isinstance(residual, torch.Tensor):
        raise InvalidInput(f"residual is a {type(residual).__name__}; pass a torch.Tensor")
    if residual.layout != torch.strided:
        raise InvalidInput(f"residual has layout {residual.layout}; pass a dense tensor, for example residual.to_dense()")
    if residual.dtype not in FLOAT_DTYPES:
        raise InvalidInput(f"residual.dtype is {residual.dtype}; use float16, bfloat16, float32 or float64")
    if residual.shape != x.shape:
        raise InvalidInput(f"residual has shape {tuple(residual.shape)}, x {tuple(x.shape)}; expand the one to the other")
    if residual.device != x.device:
        raise InvalidInput(f"residual is on {residual.device}, x on {x.device}; move one of them")
    _check_result("residual_out", residual_out, "residual", residual)


def _check_result(name: str, result: Any, source_name: str, source: torch.Tensor) -> None:
    """Raise InvalidInput unless a result is None or a tensor like its source."""
    if result is None:
        return
    if not isinstance(result, torch.Tensor):
        raise InvalidInput(f"{name} is a {type(result).__name__}; pass a torch.Tensor or None")
    if result.shape != source.shape or result.dtype != source.dtype or result.device != source.device:
        seen, wanted = (f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}" for tensor in (result, source))
        raise InvalidInput(f"{name} is {seen}; {source_name} asks for {wanted}")


def check_out_memory(x: torch.Tensor, out: torch.Tensor, x_name: str = "x", name: str = "out") -> None:
    """Raise InvalidInput where writing to out would change what is still to be read or written, as far as strides can tell."""
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise InvalidInput(f"{name} has stride 0 (strides {out.stride()}): several elements share memory; pass {name}.contiguous()")
    is_same = overlap_offset(x, out) == 0 and x.stride() == out.stride()
    if not is_same and _collide(x, out):
        strides = f"strides {out.stride()} and {x.stride()}"
        raise InvalidInput(f"{name} overlaps {x_name} in part, {strides}; pass {x_name} itself or memory of its own")


def check_add_memory(x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor | None, residual_out: torch.Tensor | None) -> None:
    """As `check_out_memory`, of add_rmsnorm: out may be x and residual_out residual, and nothing else may overlap what is written."""
    if out is not None:
        check_out_memory(x, out)
    if residual_out is not None:
        check_out_memory(residual, residual_out, "residual", "residual_out")
    pairs = (("out", out, "residual", residual), ("residual_out", residual_out, "x", x), ("residual_out", residual_out, "out", out))
    for name, result, other_name, other in pairs:
        if result is not None and other is not None and _collide(result, other):
            raise InvalidInput(f"{name} overlaps {other_name}; pass memory of its own")


def _collide(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape have an element in common, as far as strides can tell."""
    offset = overlap_offset(a, b)
    if offset is None:
        return False
    if a.dtype != b.dtype:
        return True
    if a.stride() == b.stride():
        dims = sorted(zip(a.stride(), a.shape, strict=True), reverse=True)
        return offset % a.element_size() != 0 or _reaches(offset // a.element_size(), dims)
    return _is_packed(a) and _is_packed(b)  # otherwise the views may interleave without an element in common


def overlap_offset(x: torch.Tensor, out: torch.Tensor) -> int | None:
    """Bytes from x's start to out's start if both are views of one storage and their spans overlap, else None."""
    if x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
        return None
    offset = out.data_ptr() - x.data_ptr()
    return offset if abs(offset) < span_bytes(x if offset >= 0 else out) else None


def span_bytes(tensor: torch.Tensor) -> int:
    """Bytes from the first element of a tensor that is not empty to the end of its last."""
    return (1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.element_size()


def _reaches(offset: int, dims: list[tuple[int, int]]) -> bool:
    """Whether steps of these (stride, size), fewer than size in each dimension, forwards or backwards, lead offset elements away."""
    if not dims:
        return offset == 0
    (stride, size), *rest = dims
    steps = {offset // stride, -(-offset // stride)} if stride else {0}
    return any(_reaches(offset - step * stride, rest) for step in steps if abs(step) < size)


def _is_packed(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
