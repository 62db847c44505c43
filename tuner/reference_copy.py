"""The frozen reference that every measurement is held against: a plain Triton copy of as many bytes as x has."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048
NUM_WARPS = 4


@triton.jit
def reference_copy_kernel(y_ptr, x_ptr, words: tl.int64, BLOCK: tl.constexpr):
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = word < words
    tl.store(y_ptr + word, tl.load(x_ptr + word, mask=mask), mask=mask)


def reference_copy(y: torch.Tensor, x: torch.Tensor) -> None:
    """Copy x.numel() elements from where x starts to where y starts, in 32-bit words, four 16-byte loads a thread.

    Frozen: a change to kernel, block or warps makes old fractions of copy meaningless and needs a new `tuner.measure.POLICY`.
    """
    words = x.numel() * x.element_size() // 4
    target, source = (t.as_strided((words * 4 // t.element_size(),), (1,)).view(torch.int32) for t in (y, x))
    reference_copy_kernel[(max(1, triton.cdiv(words, BLOCK)),)](target, source, words, BLOCK=BLOCK, num_warps=NUM_WARPS)
