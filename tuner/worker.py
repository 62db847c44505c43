"""A process that runs one call at a time, says what it is about to do, and can be killed with everything it has started."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from tuner.failure import ContextBroken, Failure, StationGone

Answer = TypeVar("Answer")

TOLD, DONE, RAISED = range(3)
TRAVELLING = (ContextBroken, Failure, StationGone)
"""Exceptions that reach the caller as they are; any other is a programming error and arrives as a RuntimeError with its traceback."""

END_LIMIT_S = 60.0
"""A killed process that is still there after this long can't be got rid of."""

_starting = threading.Lock()
"""multiprocessing reaps the children of all threads whenever one thread starts a child, which is not thread-safe."""
_own_pipe: Connection | None = None


class TimedOut(Exception):
    """The call was killed because it told nothing for too long."""


class Died(Exception):
    """The process ended in mid-call. `killed`: by SIGKILL or SIGTERM, which no code raises by itself."""

    def __init__(self, exit_code: int | None) -> None:
        name = signal.Signals(-exit_code).name if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
        super().__init__(f"the process ended with {name}")
        self.killed = exit_code in (-signal.SIGKILL, -signal.SIGTERM)


class Worker:
    """One process at a time, started by the first call, and anew after each that was lost. Calls come from one thread at a time."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.doing: object = None
        """What the call under way, or the last one, has told by `tell`; None before it told anything."""
        self._environment = dict(environment or {})
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._is_discarded = False
        self._closed = False

    def call(self, function: Callable[..., Answer], *arguments: object, limit_s: float) -> Answer:
        """What the function, which must be importable, returns.

        Raises Died; TimedOut once it tells nothing for `limit_s`; TRAVELLING; StationGone if a process to replace can't be ended.
        """
        self.doing = None
        process, pipe = self._running()
        try:
            pipe.send((function, arguments))
            while pipe.poll(limit_s):
                kind, value = pipe.recv()
                if kind == DONE:
                    return value
                if kind == RAISED:
                    raise value
                self.doing = value
        except (EOFError, ConnectionError):
            wait([process.sentinel], END_LIMIT_S)  # its own way to end is the news: no signal before it has ended
            self.discard()
            self._bury(process, pipe)
            raise Died(process.exitcode) from None
        self.discard()
        raise TimedOut(f"no sign of life for {limit_s:g} s")

    def discard(self) -> None:
        """Kill the process, and what it started; the next call gets another."""
        if self._process is not None:
            kill_group(self._process)
            self._is_discarded = True

    def close(self) -> None:
        """End the process for good; from any thread, a call under way in another one then raises Died."""
        with _starting:
            self._closed = True
            process = self._process
        if process is not None:
            kill_group(process)

    def _running(self) -> tuple[BaseProcess, Connection]:
        if self._process is not None and self._pipe is not None:
            if not self._is_discarded:
                return self._process, self._pipe
            self._bury(self._process, self._pipe)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["kernels.launch"])  # torch and Triton: imported once for all workers
        with _starting:
            if self._closed:
                raise StationGone("the sweep has ended")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._environment), daemon=True)
            self._process.start()
        theirs.close()
        return self._process, self._pipe

    def _bury(self, process: BaseProcess, pipe: Connection) -> None:
        if not wait([process.sentinel], END_LIMIT_S):
            raise StationGone(f"process {process.pid} can't be killed: its GPU may need a reset")
        pipe.close()
        with _starting:
            process.join()
        self._process, self._pipe, self._is_discarded = None, None, False


def kill_group(process: BaseProcess) -> None:
    """Kill a worker's process and all that it started, compilers and assemblers too."""
    assert process.pid is not None
    with suppress(ProcessLookupError):  # it has ended, or has not yet come to lead a group
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def tell(doing: object) -> None:
    """In a worker: what comes next. The limit of the call starts anew. Elsewhere this does nothing."""
    if _own_pipe is not None:
        _own_pipe.send((TOLD, doing))


def _serve(pipe: Connection, environment: Mapping[str, str]) -> None:
    """The process: a group of its own, so that Ctrl-C reaches the parent alone, and whoever kills it kills its compilers."""
    global _own_pipe
    os.setpgid(0, 0)
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _own_pipe = pipe
    with suppress(EOFError, ConnectionError):  # the parent has no more calls, or no more interest
        while True:
            function, arguments = pipe.recv()
            pipe.send(_answer(function, arguments))


def _answer(function: Callable[..., object], arguments: tuple[object, ...]) -> tuple[int, object]:
    try:
        return DONE, function(*arguments)
    except TRAVELLING as error:
        return RAISED, error
    except Exception:
        return RAISED, RuntimeError(f"in a worker:\n{traceback.format_exc()}")


def _end_with_parent() -> None:
    """End this process and its compilers when the parent is killed: a pipe read in a call of C code would never say so."""
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os.killpg(0, signal.SIGKILL)
