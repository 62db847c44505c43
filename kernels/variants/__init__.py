"""The kernel variants by name. Needs Triton; importing it asks no GPU anything.

A variant is a module with
  kernel           the Triton kernel under `triton.heuristics` (what follows from a call) under `triton.autotune` (what is tuned)
  REVISION         raised by hand when a change makes old records worthless: records of another revision are ignored
  LAYOUTS          the layouts it serves (`tuning_db.model.Problem`)
  IN_PLACE         whether the result may overwrite the input
  is_valid         (params, problem, device) -> whether a config of the space makes sense there
  grid             (named arguments) -> the launch grid
  workspace_words  optional: (named arguments) -> 64-bit words of zeroed workspace
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from kernels.variants import common, looped, multi_row, split_row, strided_axis, whole_row
from kernels.variants.common import config_params
from tuning_db.model import Config, Device, ParamValue, Problem


class Variant(Protocol):
    kernel: Any
    REVISION: int
    LAYOUTS: tuple[str, ...]
    IN_PLACE: bool
    is_valid: Callable[[Mapping[str, ParamValue], Problem, Device], bool]
    grid: Callable[[Mapping[str, Any]], tuple[int, int, int]]


VARIANTS: dict[str, Variant] = {
    module.__name__.rpartition(".")[2]: cast(Variant, module) for module in (whole_row, multi_row, looped, split_row, strided_axis)
}


@functools.cache
def space(variant: str) -> frozenset[Config]:
    """Every config that the variant's `triton.autotune` declares."""
    return frozenset(Config.of(variant, **config_params(config)) for config in VARIANTS[variant].kernel.configs)


def is_legal(config: Config, problem: Problem, device: Device) -> bool:
    """Whether a config, wherever it came from, is one of its variant's space and valid for the problem on the device."""
    variant = VARIANTS.get(config.variant)
    return variant is not None and config in space(config.variant) and variant.is_valid(config.params, problem, device)


def candidates(problem: Problem, device: Device) -> list[Config]:
    """Every legal config of every variant for a problem, in a fixed order."""
    return sorted((config for name in VARIANTS for config in space(name) if is_legal(config, problem, device)), key=str)


@functools.cache
def source_hash(variant: str) -> str:
    """Hash of the variant's Triton functions and the shared ones; comments, docstrings, line numbers and the space don't count."""
    functions = [*_jit_functions(common), *_jit_functions(VARIANTS[variant])]
    return hashlib.sha256("\n".join(functions).encode()).hexdigest()[:16]


def _jit_functions(module: Any) -> list[str]:
    tree = ast.parse(inspect.getsource(module))
    texts = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(mark) for mark in node.decorator_list):
            node.decorator_list = []
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            texts.append(ast.dump(node))
    return texts
