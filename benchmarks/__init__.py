"""How fast `rmsnorm` is beside what else there is. `from benchmarks import benchmark_rmsnorm` or `python -m benchmarks`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.simple import benchmark_rmsnorm

__all__ = ["benchmark_rmsnorm"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for: the process that times its first call must not have imported `kernels` before."""
    if name != "benchmark_rmsnorm":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from benchmarks.simple import benchmark_rmsnorm

    return benchmark_rmsnorm
