"""The kernels of another checkout, in this process beside the present ones."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

PACKAGES = ("kernels", "tuning_db")
"""What a call of `rmsnorm` runs. Tuner and benchmarks are the present ones for both."""


class OtherTree:
    """Packages of the same names from another folder. They import lazily, so every call into them has to be made while `active`."""

    def __init__(self, root: Path) -> None:
        self._root = str(root.resolve())
        self._modules: dict[str, ModuleType] = {}
        with self.active():
            self.rmsnorm: Callable[..., torch.Tensor] = importlib.import_module("kernels").rmsnorm
            found = sys.modules["kernels"].__file__
        if not str(found).startswith(self._root):
            raise ImportError(f"{self._root} has no package kernels: {found} was imported", name="kernels")

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the `with` block `import kernels` means the other tree's."""
        own = _taken()
        sys.modules.update(self._modules)
        sys.path.insert(0, self._root)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path.remove(self._root)
            self._modules = _taken()
            sys.modules.update(own)


def _taken() -> dict[str, ModuleType]:
    """The modules of the packages, taken out of `sys.modules`."""
    names = [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
    return {name: sys.modules.pop(name) for name in names}
