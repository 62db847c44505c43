"""How an operator of this project is registered with PyTorch, for the graphs that torch.compile and torch.export make.

Imported by the first call that is traced; eager calls never need it. Of the ways to register an operator the one that costs a graph
least: a call of an empty body from Python, µs on a server's CPU under torch 2.13,

    Library.define and Library.impl    1.8
    … and register_autograd            5.0
    torch.library.custom_op            7.2
    torch.library.triton_op            8.3

So the operators that a finished graph holds have kernels and no more. What is differentiable is a composite, which consists of them, or
of PyTorch's operations: it is taken apart when autograd is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.numerics import FP32, NO_OFFSET

NUMERICS = "float weight_offset, bool round_normalized"
"""The fields of Numerics, in a schema."""

operators = torch.ops.tuned_rmsnorm
_library = torch.library.Library("tuned_rmsnorm", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An operator that stays in graphs; `fake` makes results for tensors that have no memory."""
    name = _defined(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"tuned_rmsnorm::{name}", fake, lib=_library)


def register_composite(schema: str, implementation: Callable[..., Any]) -> None:
    """An operator that leaves in graphs what it calls."""
    _library.impl(_defined(schema), implementation, "CompositeImplicitAutograd")


def _defined(schema: str) -> str:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return schema.partition("(")[0]


def mode_arguments(weight_offset: float, round_normalized: bool) -> dict[str, Any]:
    """The arguments of the public functions that ask for these Numerics."""
    # The defaults themselves, by which a usual call is known.
    return {"weight_offset": weight_offset or NO_OFFSET, "casting": "llama" if round_normalized else FP32}
