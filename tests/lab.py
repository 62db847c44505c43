"""Stands for GPU, compiler, verifier and clock of a sweep or a verification: `faked` puts it in their place."""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tuner import recheck
from tuner import sweep as pipeline
from tuner.cases import LAUNCHER_OF
from tuner.compiling import Compiled
from tuner.measure import Bench
from tuning_db.model import OPS, Config, Device, Resources, Status

SLOW_US, TORCH_US, COPY_US = 20.0, 80.0, 9.0


class Lab:
    """Stands for GPU and compiler: each config's time, verdict of the verifier and of the compiler. Notes what was asked of it."""

    def __init__(self) -> None:
        self.times: dict[Config, float] = {}
        self.faults: dict[Config, str] = {}
        self.compiled: dict[str, Compiled] = {}
        self.built: set[Config] = set()
        self.built_ops: set[str] = set()
        self.timed: set[Config] = set()
        self.crash: Config | None = None
        self.on_round: Callable[[], None] = lambda: None

    def time_us(self, config: Config) -> float:
        return TORCH_US if config == pipeline.TORCH else self.times.get(config, SLOW_US)


def faked(monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A Lab that answers instead of GPU and compiler until the test ends."""
    lab = Lab()

    class FakePool:
        progress = (0, 0)

        def __init__(self, *_: object) -> None:
            pass

        def __enter__(self) -> "FakePool":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def submit(self, binaries: Iterator[object]) -> None:
            list(binaries)

        def result(self, binary: Any) -> Compiled:
            return lab.compiled.get(binary.variant, Compiled(Status.OK, Resources(32, 0, 0)))

    class FakeVerifier:
        def __init__(self, case: object) -> None:
            pass

        def fault(self, launcher: Any) -> str:
            if launcher.config == lab.crash:
                raise torch.AcceleratorError("CUDA error: an illegal memory access\nCompile with …")
            return lab.faults.get(launcher.config, "")

    class FakeBench:
        launches = 8
        sets = ()
        rounds = Bench.rounds

        def __init__(self, case: object, device: Device, seed: int) -> None:
            pass

        def enter(self, name: Config, launch: object, launches: int | None = None) -> None:
            lab.timed.add(name)

        def enter_launcher(self, name: Config, launcher: Any) -> None:
            assert launcher.config == name
            lab.timed.add(name)

        def round(self, order: list[Config]) -> dict[object, float]:
            assert set(order) <= lab.timed
            lab.on_round()
            return {**{name: lab.time_us(name) for name in order}, "reference": COPY_US}

    def build_for(op: str) -> Any:
        def build(config: Config, *_: object) -> SimpleNamespace:
            lab.built.add(config)
            lab.built_ops.add(op)
            return SimpleNamespace(config=config)

        return build

    monkeypatch.setattr(pipeline, "CompilePool", FakePool)
    monkeypatch.setattr(recheck, "CompilePool", FakePool)
    monkeypatch.setattr(pipeline, "Verifier", FakeVerifier)
    monkeypatch.setattr(pipeline, "Bench", FakeBench)
    for op in OPS:
        monkeypatch.setitem(LAUNCHER_OF, op, build_for(op))
    monkeypatch.setattr(pipeline.torch.cuda, "device", lambda index: contextlib.nullcontext())
    return lab
