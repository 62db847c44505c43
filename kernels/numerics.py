"""Numerics modes: what is added to the weight, and where a result is rounded."""

from __future__ import annotations

from typing import NamedTuple

NO_OFFSET = 0.0
FP32 = "fp32"
CASTINGS = (FP32, "llama", "gemma")
"""Where is rounded. `fp32` and `gemma`: all in fp32, the result once. `llama`: x / rms to x's dtype too, before it is multiplied."""


class Numerics(NamedTuple):
    """A numerics mode as the kernels take it. No part of a Problem: it moves no byte more, so that records serve every mode."""

    weight_offset: float = NO_OFFSET
    """Added to the weight, in fp32."""
    round_normalized: bool = False
    """Whether x / rms is rounded to x's dtype before the multiplication by the weight."""


PLAIN = Numerics()
