"""The launch of one kernel with any number of pointers: what backwards and sums are launched by."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from triton.compiler import CompiledKernel

from kernels.device import interpreting
from kernels.launch import OPTIONAL_POINTERS, Binary, load_binary
from kernels.submission import launch_hooks, submission
from kernels.variants import jit_function
from kernels.workspace import workspace

Pointers: TypeAlias = tuple["torch.Tensor | None", ...]
PointerLauncher: TypeAlias = Callable[..., None]
"""launch(pointers, *leading): one kernel on the current stream, with its pointers in the order of its arguments (but for the workspace)
and the scalars that come right after the first of them; the others it knows."""


def pointer_launcher(
    binary: Binary, grid: tuple[int, int, int], arguments: dict[str, Any], device_index: int, *, words: int = 0, use: Hashable = None
) -> PointerLauncher:
    """Submits one kernel with integers for pointers; through Triton's own way where a launch hook is in use or another device current.

    `arguments` are the kernel's other arguments by name; `words` and `use` are those of its workspace, if it needs one.
    """
    function = jit_function(binary.variant)
    if interpreting():
        return _interpreted_launcher(binary, grid, arguments, words)
    leading_names = {"eps", "workspace_ptr", *(name for name, _ in binary.pointers)}
    tail = tuple(arguments[name] for name in function.arg_names if name not in leading_names)
    first = sum(name not in (*OPTIONAL_POINTERS, "workspace_ptr") for name, _ in binary.pointers)  # the others are the last arguments
    compiled = load_binary(binary, device_index)
    submit, middle = submission(compiled)
    raw_stream, device_now = torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice
    runtime, enter, leave, enter_calls, leave_calls = launch_hooks()

    @functools.cache
    def misaligned() -> CompiledKernel:
        return load_binary(replace(binary, aligned=False), device_index)

    def ordinary(pointers: Pointers, is_aligned: bool, leading: tuple[float, ...]) -> None:
        run = (compiled if is_aligned else misaligned())[grid]
        with torch.cuda.device(device_index):
            stream = raw_stream(device_index)
            scratch = (workspace(device_index, stream, use, words),) if words else ()
            run(*pointers[:first], *scratch, *leading, *tail, *pointers[first:], stream=stream)

    def launch(pointers: Pointers, *leading: float) -> None:
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in pointers]
        bits = 0
        for address in addresses:
            bits |= address
        hooked = enter_calls or leave_calls or runtime.launch_enter_hook is not enter or runtime.launch_exit_hook is not leave
        if bits & 15 or device_now() != device_index or hooked:
            ordinary(pointers, not bits & 15, leading)
            return
        stream = raw_stream(device_index)
        scratch = (workspace(device_index, stream, use, words).data_ptr(),) if words else ()
        submit(*grid, stream, compiled.function, *middle, *addresses[:first], *scratch, *leading, *tail, *addresses[first:])

    return launch


def _interpreted_launcher(binary: Binary, grid: tuple[int, int, int], arguments: dict[str, Any], words: int) -> PointerLauncher:
    kernel = jit_function(binary.variant)[grid]
    names = [name for name, _ in binary.pointers if name != "workspace_ptr"]

    def launch(pointers: Pointers, *leading: float) -> None:
        extra: dict[str, Any] = {"workspace_ptr": torch.zeros(words, dtype=torch.int64)} if words else {}
        extra |= dict(zip(("eps",), leading, strict=False))
        kernel(**dict(zip(names, pointers, strict=True)), **extra, **arguments)

    return launch
