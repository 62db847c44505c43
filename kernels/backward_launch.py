"""The launch of a backward: the variant's kernel, then the sum of dw's partial rows; for runtime and tuner alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from triton import knobs
from triton.compiler import CompiledKernel

from kernels.device import INTERPRETER, describe, interpreting
from kernels.geometry import Geometry
from kernels.launch import Binary, binary_of, kernel_arguments, load_binary, submission
from kernels.numerics import PLAIN, Numerics
from kernels.variants import COLUMN_SUM, VARIANTS, column_sum, jit_function
from kernels.workspace import workspace
from tuning_db.model import NO_WEIGHT, Config

BackwardLauncher: TypeAlias = Callable[
    ["torch.Tensor | None", "torch.Tensor | None", torch.Tensor, torch.Tensor, "torch.Tensor | None", float], None
]
"""launch(dx, dw, dy, x, weight, eps) on the current stream of x's device, for tensors like those it was built for; dx and dw packed."""

Pointers: TypeAlias = tuple["torch.Tensor | None", ...]
KernelLauncher: TypeAlias = Callable[..., None]
"""launch(pointers, *leading): one kernel, with the scalars that come right after its pointers; the others it knows."""


def build_backward_launcher(
    config: Config,
    geometry: Geometry,
    dtypes: tuple[str, str, str],
    device_index: int,
    *,
    wants_dx: bool = True,
    wants_dw: bool = True,
    sm_count: int | None = None,
    numerics: Numerics = PLAIN,
) -> BackwardLauncher:
    """Prepare the launch of a legal config. dtypes are those of x, w (or `none`) and dy, whose strides are the geometry's y strides.

    What is not wanted is neither computed nor stored, and its argument is None. sm_count is the GPU's if not given.
    """
    variant: Any = VARIANTS[config.variant]
    wants_dw = wants_dw and dtypes[1] != NO_WEIGHT
    if sm_count is None:
        sm_count = INTERPRETER.sm_count if interpreting() else describe(device_index).sm_count
    arguments = kernel_arguments(config, geometry, ptx=not interpreting() and torch.version.hip is None, numerics=numerics)
    sized = {**arguments, "sm_count": sm_count}
    words = variant.workspace_words(sized) if hasattr(variant, "workspace_words") else 0
    unwanted = {name for name, wanted in (("dx_ptr", wants_dx), ("partials_ptr", wants_dw)) if not wanted}
    binary = binary_of(config, dtypes, arguments, aligned=True)
    binary = replace(binary, pointers=tuple((name, NO_WEIGHT if name in unwanted else dtype) for name, dtype in binary.pointers))
    gradients = _kernel_launcher(binary, variant.grid(sized), arguments, device_index, words)
    if not wants_dw:
        return lambda dx, dw, dy, x, weight, eps: gradients((dx, None, dy, x, weight), eps)

    partial_rows = variant.partial_rows(sized)
    summing = column_sum.arguments_for(partial_rows, geometry.cols)
    column_sums = _kernel_launcher(column_sum_binary(summing, dtypes[1]), column_sum.grid(summing), summing, device_index, 0)
    shape = (partial_rows, geometry.cols)

    def launch(
        dx: torch.Tensor | None, dw: torch.Tensor | None, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float
    ) -> None:
        partials = torch.empty(shape, dtype=torch.float32, device=x.device)
        gradients((dx, partials, dy, x, weight), eps)
        column_sums((dw, partials))

    return launch


def column_sum_binary(arguments: dict[str, Any], w_dtype: str) -> Binary:
    """The Binary of `column_sum` with these arguments."""
    return Binary(
        variant=COLUMN_SUM,
        pointers=(("dw_ptr", w_dtype), ("partials_ptr", "float32")),
        constexprs=tuple((name, value) for name, value in arguments.items() if name.isupper()),
        options=(("num_warps", column_sum.NUM_WARPS),),
        aligned=True,
    )


def _kernel_launcher(
    binary: Binary, grid: tuple[int, int, int], arguments: dict[str, Any], device_index: int, words: int
) -> KernelLauncher:
    """Submits one kernel with integers for pointers; through Triton's own way where a launch hook is in use or another device current."""
    function = jit_function(binary.variant)
    if interpreting():
        return _interpreted_launcher(binary, grid, arguments, words)
    leading = {"eps", "workspace_ptr", *(name for name, _ in binary.pointers)}
    tail = tuple(arguments[name] for name in function.arg_names if name not in leading)
    compiled = load_binary(binary, device_index)
    submit, middle = submission(compiled)
    raw_stream, device_now = torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice
    use = ("backward", *grid)

    @functools.cache
    def misaligned() -> CompiledKernel:
        return load_binary(replace(binary, aligned=False), device_index)

    def ordinary(pointers: Pointers, is_aligned: bool, leading: tuple[float, ...]) -> None:
        run = (compiled if is_aligned else misaligned())[grid]
        with torch.cuda.device(device_index):
            stream = raw_stream(device_index)
            scratch = (workspace(device_index, stream, use, words),) if words else ()
            run(*pointers, *scratch, *leading, *tail, stream=stream)

    def launch(pointers: Pointers, *leading: float) -> None:
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in pointers]
        is_aligned = not any(address & 15 for address in addresses)
        if not is_aligned or device_now() != device_index or _launch_hooks_in_use():
            ordinary(pointers, is_aligned, leading)
            return
        stream = raw_stream(device_index)
        scratch = (workspace(device_index, stream, use, words).data_ptr(),) if words else ()
        submit(*grid, stream, compiled.function, *middle, *addresses, *scratch, *leading, *tail)

    return launch


def _launch_hooks_in_use() -> bool:
    """Whether a profiler listens to launches. Triton keeps a chain of hooks, or None, or in older versions a function."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def _interpreted_launcher(binary: Binary, grid: tuple[int, int, int], arguments: dict[str, Any], words: int) -> KernelLauncher:
    kernel = jit_function(binary.variant)[grid]
    names = [name for name, _ in binary.pointers if name != "workspace_ptr"]

    def launch(pointers: Pointers, *leading: float) -> None:
        extra: dict[str, Any] = {"workspace_ptr": torch.zeros(words, dtype=torch.int64)} if words else {}
        extra |= dict(zip(("eps",), leading, strict=False))
        kernel(**dict(zip(names, pointers, strict=True)), **extra, **arguments)

    return launch
