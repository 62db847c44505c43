"""A variant whose program never ends, on purpose: it waits for its input to change. Only for tests of isolation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from kernels.variants.common import ROW_INTEGERS, prune_configs
from tuning_db.model import FORWARD, Device, Problem

OPS = (FORWARD,)
REVISION = 1
LAYOUTS = ("contiguous",)
IN_PLACE = True


def is_valid(params: Mapping[str, Any], problem: Problem, device: Device) -> bool:
    return problem.layout in LAYOUTS


@triton.autotune(configs=[triton.Config({}, num_warps=1)], key=["cols"], prune_configs_by=prune_configs(is_valid))
@triton.heuristics({"LOW": lambda args: -1e30})
@triton.jit(do_not_specialize=[*ROW_INTEGERS])
def spinning_kernel(
    y_ptr,
    x_ptr,
    w_ptr,
    eps: tl.float32,
    rows: tl.int64,
    cols: tl.int32,
    row_divisor: tl.int64,
    x_skip: tl.int64,
    x_row_stride: tl.int64,
    y_skip: tl.int64,
    y_row_stride: tl.int64,
    LOW: tl.constexpr,
):
    x = tl.load(x_ptr, volatile=True).to(tl.float32)
    while x > LOW:
        x = tl.load(x_ptr, volatile=True).to(tl.float32)
    tl.store(y_ptr, x.to(y_ptr.dtype.element_ty))


kernel = spinning_kernel


def grid(args: Mapping[str, Any]) -> tuple[int, int, int]:
    return (1, 1, 1)
