"""A variant that reads far outside of its input, on purpose: a GPU ends the whole context for that. Only for tests of isolation."""

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
@triton.heuristics({"FAR": lambda args: 2**40})
@triton.jit(do_not_specialize=[*ROW_INTEGERS])
def trapping_kernel(
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
    FAR: tl.constexpr,
):
    tl.store(y_ptr, tl.load(x_ptr + rows * FAR))


kernel = trapping_kernel


def grid(args: Mapping[str, Any]) -> tuple[int, int, int]:
    return (1, 1, 1)
