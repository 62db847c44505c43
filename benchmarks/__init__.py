"""How fast `rmsnorm` is beside what else there is. `from benchmarks import benchmark_rmsnorm` or `python -m benchmarks`."""

from benchmarks.simple import benchmark_rmsnorm

__all__ = ["benchmark_rmsnorm"]
