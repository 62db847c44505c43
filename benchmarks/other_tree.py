"""The kernels of another checkout, in this process beside the present ones."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.providers import Refusal

PACKAGES = ("kernels", "tuning_db")
"""What a call of `rmsnorm` or `add_rmsnorm` runs. Tuner and benchmarks are the present ones for both."""


class OtherTree:
    """Packages of the same names from another folder. They import lazily, so every call into them has to be made while `active`."""

    def __init__(self, root: Path) -> None:
        self._root = str(root.resolve())
        self._modules: dict[str, ModuleType] = {}

    def function(self, name: str) -> Callable[..., Any]:
        """A public function of its `kernels`, to be called as it is: it activates the tree. Raises Refusal where there is none."""
        with self.active():
            try:
                kernels = importlib.import_module("kernels")
                if not Path(str(kernels.__file__)).is_relative_to(self._root):
                    raise ImportError(f"{self._root} has no package kernels, {kernels.__file__} was found")
                if name not in kernels.__all__:
                    raise Refusal(f"has no {name}")
                own = getattr(kernels, name)
            except (ImportError, AttributeError, SyntaxError) as error:
                raise Refusal(f"can't import kernels.{name}: {error}") from error

        @functools.wraps(own)
        def call(*arguments: Any, **options: Any) -> Any:
            with self.active():
                return own(*arguments, **options)

        return call

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the `with` block, which must not be nested, `import kernels` means the other tree's."""
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
