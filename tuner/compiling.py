"""Candidates to binaries on all CPU cores, and what each binary takes: registers, spills, shared memory. Needs no GPU."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from kernels.geometry import geometry_of_problem
from kernels.launch import Binary, binary_of, compile_binary, has_pdl, kernel_arguments
from tuner.failure import Failure
from tuner.worker import Died, TimedOut, Worker
from tuning_db.model import Config, Device, Problem, Resources, Status

Answer = TypeVar("Answer")

LIMIT_S = 120.0
"""Longest time for one binary, on cores that others may need as well. A compiler that hangs costs one process until then."""


@dataclass(frozen=True)
class Compiled:
    """How compiling one Binary ended: OK, COMPILE_ERROR, TIMED_OUT, or OUT_OF_RESOURCES where it spills or needs more than there is."""

    status: Status
    resources: Resources | None = None
    error: str = ""


class CompilePool:
    """Compiles each Binary once, in worker processes that never touch a GPU; results land in Triton's disk cache. Thread-safe."""

    def __init__(self, device: Device, target: GPUTarget, workers: int | None = None, limit_s: float = LIMIT_S) -> None:
        self._workers = [Worker() for _ in range(workers or usable_cores())]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(len(self._workers))
        self._device, self._target, self._limit_s = device, target, limit_s
        self._futures: dict[Binary, Future[Compiled]] = {}
        self._load_bytes: dict[Binary, Future[int | None]] = {}
        self._lock = threading.Lock()

    def submit(self, binaries: Iterable[Binary]) -> None:
        with self._lock:
            for binary in binaries:
                if binary not in self._futures:
                    self._futures[binary] = self._threads.submit(self._compile, binary)

    def result(self, binary: Binary) -> Compiled:
        """Wait for one Binary, which is submitted if it was not. Raises Failure if its process is killed from outside, twice."""
        self.submit([binary])
        return self._futures[binary].result()

    def load_bytes(self, binary: Binary) -> int | None:
        """Wait for `load_bytes_of` one Binary. That takes longer than to compile it, so it is for a few. None where it can't be had."""
        with self._lock:
            if binary not in self._load_bytes:
                self._load_bytes[binary] = self._threads.submit(self._disassemble, binary)
            future = self._load_bytes[binary]
        return future.result()

    @property
    def workers(self) -> int:
        return len(self._workers)

    @property
    def progress(self) -> tuple[int, int]:
        """How many binaries are compiled, and how many there are to be."""
        with self._lock:
            return sum(future.done() for future in self._futures.values()), len(self._futures)

    def close(self) -> None:
        """End at once: what is not compiled yet never will be."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def _compile(self, binary: Binary) -> Compiled:
        try:
            return self._call(compile_and_inspect, binary, self._target, self._device)
        except TimedOut as error:
            return Compiled(Status.TIMED_OUT, error=f"compiling: {error}")
        except Died as error:
            return Compiled(Status.COMPILE_ERROR, error=str(error))

    def _disassemble(self, binary: Binary) -> int | None:
        try:
            return self._call(compile_and_disassemble, binary, self._target)
        except (TimedOut, Died):  # it tells about a binary that is compiled and judged: nothing hangs on it
            return None

    def _call(self, function: Callable[..., Answer], *arguments: object) -> Answer:
        """In a process that is idle. Raises TimedOut, Died; Failure if the process is killed from outside, twice."""
        worker = self._idle.get()
        try:
            for _ in range(2):
                try:
                    return worker.call(function, *arguments, limit_s=self._limit_s)
                except Died as error:
                    if not error.killed:
                        raise
            raise Failure("a compile process was killed twice, likely for want of memory: run where there is more of it")
        finally:
            self._idle.put(worker)


def usable_cores() -> int:
    """How many cores this process may use: a batch system may allow it fewer than the host has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def binary_for(problem: Problem, config: Config, target: GPUTarget) -> Binary:
    """The Binary that runs `config` on `problem` on a target, with aligned pointers as an allocator gives them."""
    ptx = target.backend == "cuda"
    pdl = ptx and has_pdl(f"sm_{target.arch}")
    arguments = kernel_arguments(config, geometry_of_problem(problem), ptx=ptx, pdl=pdl)
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
