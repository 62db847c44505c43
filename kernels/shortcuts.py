"""From the tensors of a call to what serves it, by one C call: the check that torch.compile guards compiled code with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from kernels.plans import Call
from kernels.validation import overlap_offset, span_bytes

MAX_SHAPES = 16384
MAX_KINDS = 8
"""Kinds of calls with one shape of x: other dtypes, strides, weights. Those beyond are found by their full key."""

APART = "apart"
"""Stands in the key for an `out` that shares no memory with x; True for none given, False for x itself."""

Entry: TypeAlias = tuple[Callable[..., bool], Call, int, int]
"""A check of all tensors of a call, what serves those that pass, and the bytes that x and out span."""


class Shortcuts:
    """What serves a call with the default axis and backend, found by x's shape and a check of all its tensors.

    The check compares type, dtype, device, sizes, strides, requires_grad and dispatch keys: views with a lazy minus sign, inference
    tensors, autocast and torch.func transforms are kinds of their own. Whether gradients are recorded it does not see; the key does.
    """

    def __init__(self) -> None:
        self._entries: dict[Any, tuple[Entry, ...]] = {}

    def find(self, x: torch.Tensor, weight: torch.Tensor | None, out: torch.Tensor | None) -> Call | None:
        """What was added for tensors of this kind, or None, as for an `out` that overlaps x without being x."""
        if x.__class__ is not torch.Tensor:
            return None
        tensors: tuple[torch.Tensor, ...]
        if out is None or out is x:
            tensors = (x,) if weight is None else (x, weight)
            for check, call, _, _ in self._entries.get((x.shape, weight is None, out is None, torch.is_grad_enabled()), ()):
                if check(*tensors):
                    return call
            return None
        tensors = (x, out) if weight is None else (x, weight, out)
        apart = out.data_ptr() - x.data_ptr()
        for check, call, x_bytes, out_bytes in self._entries.get((x.shape, weight is None, APART, torch.is_grad_enabled()), ()):
            if check(*tensors):
                return call if apart >= x_bytes or apart <= -out_bytes else None
        return None

    def add(self, call: Call, x: torch.Tensor, weight: torch.Tensor | None, out: torch.Tensor | None) -> None:
        """Remember what serves these tensors, unless nothing can check them or too many of x's shape are known."""
        if x.__class__ is not torch.Tensor:
            return
        tensors: tuple[torch.Tensor | None, ...] = (x, weight)
        place: bool | str = out is None
        spans = (0, 0)
        if out is not None and out is not x:
            if overlap_offset(x, out) is not None:
                return
            tensors, place, spans = (x, weight, out), APART, (span_bytes(x), span_bytes(out))
        key = (x.shape, weight is None, place, torch.is_grad_enabled())
        entries = self._entries.get(key, ())
        if len(entries) == MAX_KINDS or (not entries and len(self._entries) == MAX_SHAPES):
            return
        check = _check_of(*(tensor for tensor in tensors if tensor is not None))
        if check is not None:
            self._entries[key] = (*entries, (check, call, *spans))  # a new tuple: another thread may be walking the old one

    def clear(self) -> None:
        self._entries.clear()


def _check_of(*tensors: torch.Tensor) -> Callable[..., bool] | None:
    """The check that passes these tensors; None where this torch has none."""
    guards = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)
    if guards is None:
        return None
    sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    check: Callable[..., bool] = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check if check(*tensors) else None
