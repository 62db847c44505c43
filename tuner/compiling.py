"""Candidates to binaries on all CPU cores, and what each binary takes: registers, spills, shared memory. Needs no GPU."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from kernels.geometry import geometry_of_problem
from kernels.launch import Binary, binary_of, compile_binary, kernel_arguments
from tuning_db.model import Config, Device, Problem, Resources, Status


@dataclass(frozen=True)
class Compiled:
    """How compiling one Binary ended. status is OK, COMPILE_ERROR, or OUT_OF_RESOURCES where it spills or needs more than there is."""

    status: Status
    resources: Resources | None = None
    error: str = ""


class CompilePool:
    """Compiles each Binary once, in worker processes that never touch a GPU; results land in Triton's disk cache."""

    def __init__(self, device: Device, target: GPUTarget, workers: int | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["kernels.launch"])
        self._executor = ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context, initializer=_exit_with_parent)
        self._device, self._target = device, target
        self._futures: dict[Binary, Future[Compiled]] = {}

    def submit(self, binaries: Iterable[Binary]) -> None:
        for binary in binaries:
            if binary not in self._futures:
                self._futures[binary] = self._executor.submit(compile_and_inspect, binary, self._target, self._device)

    def result(self, binary: Binary) -> Compiled:
        """Wait for one Binary, which is submitted if it was not."""
        self.submit([binary])
        return self._futures[binary].result()

    @property
    def progress(self) -> tuple[int, int]:
        """How many binaries are compiled, and how many there are to be."""
        return sum(future.done() for future in self._futures.values()), len(self._futures)

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._executor.shutdown(wait=kind is None, cancel_futures=True)


def binary_for(problem: Problem, config: Config, target: GPUTarget) -> Binary:
    """The Binary that runs `config` on `problem` on a target, with aligned pointers as an allocator gives them."""
    arguments = kernel_arguments(config, geometry_of_problem(problem), ptx=target.backend == "cuda")
    return binary_of(config, (problem.x_dtype, problem.w_dtype, problem.y_dtype), arguments, aligned=True, adds=problem.adds)


def compile_and_inspect(binary: Binary, target: GPUTarget, device: Device) -> Compiled:
    """Compile one Binary and judge what it takes by what the device has."""
    try:
        kernel = compile_binary(binary, target)
    except triton.compiler.errors.CompilationError as error:
        return Compiled(Status.COMPILE_ERROR, error=_first_line(error))
    except RuntimeError as error:  # a pass of the compiler or the assembler failed; Triton has no class for it
        return Compiled(Status.COMPILE_ERROR, error=_first_line(error))
    resources = resources_of(kernel)
    if resources.spill_bytes:
        return Compiled(Status.OUT_OF_RESOURCES, resources, f"spills {resources.spill_bytes} bytes a thread")
    if resources.shared_bytes > device.shared_bytes:
        excess = f"needs {resources.shared_bytes} bytes of shared memory, there are {device.shared_bytes}"
        return Compiled(Status.OUT_OF_RESOURCES, resources, excess)
    return Compiled(Status.OK, resources)


def resources_of(kernel: CompiledKernel) -> Resources:
    """Registers and spills read from the binary: the cubin's resource dump, or the metadata of AMD's code object."""
    if "cubin" in kernel.asm:
        dump = _cuobjdump(kernel.asm["cubin"])
        registers, stack = (int(_found(rf"{name}:(\d+)", dump)) for name in ("REG", "STACK"))
        return Resources(registers, stack, kernel.metadata.shared)
    text = kernel.asm["amdgcn"]
    registers, spilled = (int(_found(rf"\.{name}:\s+(\d+)", text)) for name in ("vgpr_count", "vgpr_spill_count"))
    return Resources(registers, spilled * 4, kernel.metadata.shared)


def _exit_with_parent() -> None:
    """Let this worker end when the process that owns the pool is killed: the queue it waits at would never say so."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_and_exit() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()


def _cuobjdump(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's report has no {pattern}: {text[:200]}")
    return match.group(1)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines()[::-1] if line.strip()), type(error).__name__)[:300]
