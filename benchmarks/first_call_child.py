"""`python -m benchmarks.first_call_child WAY ROWS COLS FILE`: the process whose first call is timed. Imports no more than a user would."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

EPS = 1e-6


def tuned(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from kernels import rmsnorm

    return rmsnorm(x, weight, EPS)


def compiled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    function = torch.compile(torch.nn.functional.rms_norm, dynamic=False)
    result: torch.Tensor = function(x, weight.shape, weight, EPS)
    return result


def autotuned(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from kernels.geometry import geometry_of
    from kernels.variants import whole_row

    y = torch.empty_like(x)
    geometry = geometry_of(x.shape, x.stride(), y.stride(), 1)
    values = {"y_ptr": y, "x_ptr": x, "w_ptr": weight, "eps": EPS, **vars(geometry)}
    kernel = whole_row.kernel
    positional = [values[name] for name in kernel.arg_names if not name.isupper()]  # pruning sees positional arguments alone
    kernel[whole_row.grid](*positional, PTX=torch.version.hip is None)
    return y


WAYS = {"tuned": tuned, "compile": compiled, "autotune": autotuned}


def main(way: str, rows: int, cols: int, output: Path) -> None:
    """Write the seconds from a GPU that is ready to the first result on it."""
    x = torch.randn(rows, cols, device="cuda").to(torch.bfloat16)
    weight = torch.ones(cols, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        torch.cuda.synchronize()
        start = time.perf_counter()
        WAYS[way](x, weight)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    output.write_text(json.dumps(seconds), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
