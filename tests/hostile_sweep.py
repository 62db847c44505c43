"""A sweep of this GPU with two variants more: one that breaks the GPU's context and one that never ends; no test itself.

    python tests/hostile_sweep.py DATABASE

prints what `status` lists, then whether this process, which supervises, has a CUDA context at the end. Workers import it as well, and
so have the variants.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import spinning_variant
import trapping_variant
from kernels.variants import VARIANTS
from tuner import display, listings
from tuner.boards import boards_here
from tuner.session import Session
from tuning_db.model import Problem
from tuning_db.store import open_for_writing

HOSTILE: dict[str, Any] = {"spinning_variant": spinning_variant, "trapping_variant": trapping_variant}
if __name__ in ("__main__", "__mp_main__"):  # this script and its workers, not the tests that import it
    VARIANTS.update(HOSTILE)
PROBLEMS = tuple(Problem("rmsnorm", *("bfloat16",) * 3, rows, 512) for rows in (8, 64, 512))


def has_context() -> bool:
    """Whether this process has opened the primary context of GPU 0."""
    driver, flags, active = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint(), ctypes.c_int()
    assert driver.cuInit(0) == 0
    assert driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)) == 0
    return bool(active.value)


def main() -> None:
    session = Session(boards_here([0])[0], PROBLEMS, Path(sys.argv[1]), retune=True, budget_s=None)
    with open_for_writing(session.path) as store:
        session.run(PROBLEMS, store, ["sweep"], print)
        listings.print_status(display.console(), store)
    print(f"context: {has_context()}")


if __name__ == "__main__":
    main()
