"""What submits one launch of a compiled kernel, from integers for pointers: nothing is looked up, bound or specialised."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel

INDUCTOR_TYPES = {"i32": "i", "i64": "l", "fp32": "f"}
"""How `_launch_kernel` is told of the types of scalars, which the kernels have no others of; a pointer is O."""


class PackedSubmission(NamedTuple):
    """`submit(function, *grid, num_warps, shared_bytes, types, arguments, stream)`.

    `arguments` are a tuple of those of the kernel's that are no constexprs, and `last`.
    """

    submit: Callable[..., None]
    num_warps: int
    shared_bytes: int
    types: str
    last: tuple[None, ...]
    """What Triton's compiler appends to a kernel's arguments."""


class LaunchHooks(NamedTuple):
    """Triton's launch hooks (profilers) as they are when a launcher is made, for it to see at each launch whether there are any.

    There are if a list of calls is not empty, or if `runtime.launch_enter_hook` or `launch_exit_hook` is another object by then.
    """

    runtime: Any
    enter: Any
    leave: Any
    """Its chains of hooks; None in versions without, where a hook takes their place."""
    enter_calls: Sequence[Any]
    leave_calls: Sequence[Any]
    """Of the chains, which `add` appends to."""


def launch_hooks() -> LaunchHooks:
    """Those of now."""
    runtime = knobs.runtime
    enter, leave = (hook if hasattr(hook, "calls") else None for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))
    return LaunchHooks(runtime, enter, leave, getattr(enter, "calls", ()), getattr(leave, "calls", ()))


def submission(compiled: CompiledKernel) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """The function that submits a launch, and its arguments between the CUfunction and the kernel's own; no hooks, no metadata for them.

    In Triton 3.6 on CUDA it is the launcher object's own C function, 1 µs less than the Python around it; else that Python.
    """
    launcher = compiled.run
    if (
        triton.__version__.startswith("3.6.")
        and type(launcher).__name__ == "CudaLauncher"
        and type(launcher.launch).__name__ == "builtin_function_or_method"
        and launcher.global_scratch_size == 0
        and launcher.profile_scratch_size == 0
    ):
        scratch = (None, None)
        metadata = (compiled.packed_metadata, None, None, None)
        return launcher.launch, (launcher.launch_cooperative_grid, launcher.launch_pdl, *scratch, *metadata)
    return launcher, (compiled.packed_metadata, None, None, None)


def packed_submission(compiled: CompiledKernel) -> PackedSubmission | None:
    """By the function that Inductor's code launches Triton's kernels with, which takes some 0.3 µs less than Triton's own (an H100's host).

    None where this torch has none, and for what it can't launch: clusters, cooperative grids, programmatic dependent launches, scratch.
    Unlike Triton's it keeps the GIL where the GPU's queue of launches is full. So do all compiled models.
    """
    submit = _launch_kernel()
    if submit is None:
        return None
    num_warps, programs_in_cluster, shared_bytes, *_ = compiled.packed_metadata
    metadata, kinds = compiled.metadata, [kind for kind in compiled.src.signature.values() if kind != "constexpr"]
    scratch = [getattr(metadata, name) for name in ("global_scratch_size", "profile_scratch_size") if hasattr(metadata, name)]
    special = getattr(metadata, "launch_pdl", False) or getattr(metadata, "launch_cooperative_grid", False)
    if programs_in_cluster != 1 or special or any(scratch):
        return None
    types = "".join("O" if kind[0] == "*" else INDUCTOR_TYPES[kind] for kind in kinds)
    return PackedSubmission(submit, num_warps, shared_bytes, types + "O" * len(scratch), (None,) * len(scratch))


@functools.cache
def _launch_kernel() -> Callable[..., None] | None:
    """`launch(function, x, y, z, num_warps, shared_bytes, types, arguments, stream)`, which does nothing for a grid of no programs."""
    launch: Callable[..., None] | None = getattr(getattr(torch._C, "_StaticCudaLauncher", None), "_launch_kernel", None)
    if launch is None or torch.version.hip is not None:
        return None
    try:
        launch(0, 0, 1, 1, 1, 0, "", (), 0)
    except (TypeError, RuntimeError):  # of a torch where it takes other arguments
        return None
    return launch
