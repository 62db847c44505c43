"""Candidates to binaries on all CPU cores, and what each binary takes: registers, spills, shared memory. Needs no GPU."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
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
        self.workers = workers or os.cpu_count() or 1
        self._executor = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_end_with_parent)
        self._device, self._target = device, target
        self._futures: dict[Binary, Future[Compiled]] = {}
        self._load_bytes: dict[Binary, Future[int]] = {}

    def submit(self, binaries: Iterable[Binary]) -> None:
        for binary in binaries:
            if binary not in self._futures:
                self._futures[binary] = self._executor.submit(compile_and_inspect, binary, self._target, self._device)

    def result(self, binary: Binary) -> Compiled:
        """Wait for one Binary, which is submitted if it was not."""
        self.submit([binary])
        return self._futures[binary].result()

    def submit_load_bytes(self, binary: Binary) -> None:
        """Disassemble one Binary; that takes longer than compiling it, so it is done for a few."""
        if binary not in self._load_bytes:
            self._load_bytes[binary] = self._executor.submit(compile_and_disassemble, binary, self._target)

    def load_bytes(self, binary: Binary) -> int:
        """Wait for `load_bytes_of` one Binary, which is submitted if it was not."""
        self.submit_load_bytes(binary)
        return self._load_bytes[binary].result()

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


def compile_and_disassemble(binary: Binary, target: GPUTarget) -> int:
    """`load_bytes_of` one Binary, which Triton's cache has if it was compiled before."""
    return load_bytes_of(compile_binary(binary, target))


def resources_of(kernel: CompiledKernel) -> Resources:
    """Registers and spills read from the binary: the cubin's resource dump, or the metadata of AMD's code object."""
    if "cubin" in kernel.asm:
        dump = _cuobjdump("-res-usage", kernel.asm["cubin"])
        registers, stack = (int(_found(rf"{name}:(\d+)", dump)) for name in ("REG", "STACK"))
        return Resources(registers, stack, kernel.metadata.shared)
    text = kernel.asm["amdgcn"]
    registers, spilled = (int(_found(rf"\.{name}:\s+(\d+)", text)) for name in ("vgpr_count", "vgpr_spill_count"))
    return Resources(registers, spilled * 4, kernel.metadata.shared)


def load_bytes_of(kernel: CompiledKernel) -> int:
    """Bytes that a thread loads at once from global memory: the widest load of the machine code, which is that of x; 0 without any."""
    if "cubin" in kernel.asm:
        loads = re.findall(r"\b(?:LDG|LDGSTS)\.E(\S*)", _cuobjdump("-sass", kernel.asm["cubin"]))
        widths = [re.search(r"\.(U?S?8|U?S?16|64|128)\b", suffixes) for suffixes in loads]
        return max((int(width[1].lstrip("US")) // 8 if width else 4 for width in widths), default=0)
    loads = re.findall(r"\b(?:global|buffer)_load_([a-z]+\d*(?:x\d)?)", kernel.asm["amdgcn"])
    return max((_amd_bytes(load) for load in loads), default=0)


def _end_with_parent() -> None:
    """Let this worker end when the process that owns the pool does, and only then.

    The queue it waits at would never say that the owner was killed. Ctrl-C reaches the workers as well, and is the owner's business.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_and_exit() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()


def _amd_bytes(load: str) -> int:
    """Of `ubyte`, `ushort`, `dword`, `dwordx4`, `b128`, … as AMD's assembler names what a load brings."""
    kind, _, count = load.partition("x")
    if kind[0] == "b" and kind[1:].isdigit():
        return int(kind[1:]) // 8
    unit = 4 if kind == "dword" else 1 if "byte" in kind else 2
    return unit * int(count or 1)


def _cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's report has no {pattern}: {text[:200]}")
    return match.group(1)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines()[::-1] if line.strip()), type(error).__name__)[:300]
