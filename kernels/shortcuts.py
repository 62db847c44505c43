"""From the tensors of a call to what serves it, by one C call: the check that torch.compile guards compiled code with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import is_grad_enabled

from kernels.calls import AddCall, Call, Node, NodeOf
from kernels.validation import overlap_offset, span_bytes

MAX_SHAPES = 16384
MAX_KINDS = 8
"""Kinds of calls with one shape of x: other dtypes, strides, weights. Those beyond are found by their full key."""

Check: TypeAlias = Callable[..., bool]
"""check(*tensors): whether they are of the kind of those it was made for."""

Known: TypeAlias = tuple[Check, Call, "NodeOf | None", int, int]
"""A check, what serves those who pass, its nodes by eps if gradients are wanted, and the bytes that x and out span.

A plain tuple, as is Latest: one with names takes longer to unpack."""

Latest: TypeAlias = tuple[Check, Call, "Node | None", float, "bool | None", bool]
"""A check, what serves those who pass, and, if gradients are wanted, its node for an eps: calling that takes 0.1 µs less (an H100's host).
Then that eps, whether gradients are recorded, and whether there is no weight."""


def _never(*_: Any) -> Any:
    raise AssertionError("serves no call")


NOTHING: Latest = (_never, _never, None, 0.0, None, False)

LONG_RUN = 8
"""Calls of one kind, one after the other, before the next ones are expected to be of it too."""

Table: TypeAlias = dict[torch.Size, tuple[Known, ...]]
"""By x's shape."""

AddTable: TypeAlias = dict[torch.Size, tuple[tuple[Check, AddCall, int, int], ...]]
"""By x's shape: checks, what serves those who pass, and the bytes that x and residual span."""


class Shortcuts:
    """What serves a call with the default axis and backend, found by x's shape and a check of all its tensors.

    The check compares type, dtype, device, sizes, strides, requires_grad and dispatch keys: views with a lazy minus sign, inference
    tensors, autocast and torch.func transforms are kinds of their own. It ends the process on a nested x, which has no strides: before it
    comes `x.shape`, which raises for such, or `x.is_nested`. It does not see whether gradients are recorded, and takes a fixed number of
    tensors: tables are indexed by [gradients are recorded][there is no weight].
    """

    def __init__(self) -> None:
        self.latest = NOTHING
        """What `find` found in a long run of calls, or nothing. Whoever has a call without `out` tries it before `find`, which takes twice
        as long. A kind that differs ends the run: models whose norms come in turn (q and k among them) do without."""
        self._before: Known | None = None
        self._run = 0
        self._fresh: list[list[Table]] = [[{}, {}], [{}, {}]]
        self._in_place: list[list[Table]] = [[{}, {}], [{}, {}]]
        self._into_out: list[list[Table]] = [[{}, {}], [{}, {}]]

    def find(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> Call | None:
        """What was added for tensors of this kind, without `out`; for any eps."""
        recording, weightless = is_grad_enabled(), weight is None
        for known in self._fresh[recording][weightless].get(x.shape, ()):
            check, call, node_of, _, _ = known
            if check(x) if weight is None else check(x, weight):
                if known is not self._before:
                    self.latest, self._before, self._run = NOTHING, known, 0
                elif self._run < LONG_RUN:
                    self._run += 1
                else:
                    self.latest = check, call, None if node_of is None else node_of(eps), eps, recording, weightless
                    if self._before is not known:  # another thread cleared all this in between
                        self.latest = NOTHING
                return call
        return None

    def find_into(self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None) -> Call | None:
        """What was added for tensors of this kind, or None, as for an `out` that overlaps x without being x."""
        if out is x:
            for check, call, _, _, _ in self._in_place[is_grad_enabled()][weight is None].get(x.shape, ()):
                if check(x) if weight is None else check(x, weight):
                    return call
            return None
        for check, call, _, x_bytes, out_bytes in self._into_out[is_grad_enabled()][weight is None].get(x.shape, ()):
            if check(x, out) if weight is None else check(x, out, weight):
                apart = out.data_ptr() - x.data_ptr()
                return call if apart >= x_bytes or apart <= -out_bytes else None
        return None

    def add(self, call: Call, node_of: NodeOf | None, x: torch.Tensor, weight: torch.Tensor | None, out: torch.Tensor | None) -> None:
        """Remember what serves these tensors, unless nothing can check them or too many of x's shape are known."""
        if x.__class__ is not torch.Tensor:
            return
        tensors, tables, spans = [x], self._fresh if out is None else self._in_place, (0, 0)
        if out is not None and out is not x:
            if overlap_offset(x, out) is not None:
                return
            tensors, tables, spans = [x, out], self._into_out, (span_bytes(x), span_bytes(out))
        if weight is not None:
            tensors.append(weight)
        table = tables[is_grad_enabled()][weight is None]
        known = table.get(x.shape, ())
        if len(known) < MAX_KINDS and (known or len(table) < MAX_SHAPES):
            check = _check_of(tensors)
            if check is not None:  # a new tuple: another thread may be walking the old one
                table[x.shape] = (*known, (check, call, node_of, *spans))

    def clear(self) -> None:
        """Forget everything."""
        self._before, self._run = None, 0
        self.latest = NOTHING  # after _before, which `find` looks at again
        for tables in (self._fresh, self._in_place, self._into_out):
            for table in (table for pair in tables for table in pair):
                table.clear()


class AddShortcuts:
    """The same for add_rmsnorm: without given results, or in place with out=x and residual_out=residual."""

    def __init__(self) -> None:
        self._fresh: list[list[AddTable]] = [[{}, {}], [{}, {}]]
        self._in_place: list[list[AddTable]] = [[{}, {}], [{}, {}]]

    def find(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
    ) -> AddCall | None:
        """What was added for tensors of this kind, or None, as for x and residual that overlap and are to be overwritten."""
        in_place = out is x and residual_out is residual
        if x.__class__ is not torch.Tensor or not (in_place or (out is None and residual_out is None)):
            return None
        tables = self._in_place if in_place else self._fresh
        for check, call, x_bytes, residual_bytes in tables[is_grad_enabled()][weight is None].get(x.shape, ()):
            if check(x, residual) if weight is None else check(x, residual, weight):
                apart = residual.data_ptr() - x.data_ptr() if in_place else x_bytes
                return call if apart >= x_bytes or apart <= -residual_bytes else None
        return None

    def add(
        self,
        call: AddCall,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
    ) -> None:
        """Remember what serves these tensors, unless nothing can check them or too many of x's shape are known."""
        in_place = out is x and residual_out is residual
        if x.__class__ is not torch.Tensor or not (in_place or (out is None and residual_out is None)):
            return
        table = (self._in_place if in_place else self._fresh)[is_grad_enabled()][weight is None]
        known = table.get(x.shape, ())
        if len(known) < MAX_KINDS and (known or len(table) < MAX_SHAPES):
            check = _check_of([x, residual, *([] if weight is None else [weight])])
            if check is not None:
                table[x.shape] = (*known, (check, call, span_bytes(x), span_bytes(residual)))

    def clear(self) -> None:
        """Forget everything."""
        for tables in (self._fresh, self._in_place):
            for table in (table for pair in tables for table in pair):
                table.clear()


def _check_of(tensors: list[torch.Tensor]) -> Check | None:
    """The check that passes these tensors; None where this torch has none."""
    guards = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)
    if guards is None:
        return None
    sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    check: Check = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check if check(*tensors) else None
