"""`python -m benchmarks.first_call_child WAY ROWS COLS FILE`: the process whose first call is timed. Imports no more than a user would."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

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
    from kernels.variants import whole_row

    y = torch.empty_like(x)
    positional, constexprs = autotune_arguments(y, x, weight)
    whole_row.kernel[whole_row.grid](*positional, **constexprs)
    return y


def autotune_arguments(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[list[Any], dict[str, Any]]:
    """What `whole_row`'s `triton.autotune` is called with: its pruning sees positional arguments alone, so all but the last, which are
    None, and the constexprs."""
    from kernels.geometry import geometry_of
    from kernels.numerics import PLAIN
    from kernels.variants import whole_row

    geometry = geometry_of(x.shape, x.stride(), y.stride(), 1)
    assert geometry is not None
    values = {"y_ptr": y, "x_ptr": x, "w_ptr": weight, "eps": EPS, **geometry.arguments()}
    numerics = {name.upper(): value for name, value in PLAIN._asdict().items()}
    return [values[name] for name in whole_row.kernel.arg_names if name in values], {"PTX": torch.version.hip is None, **numerics}


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
