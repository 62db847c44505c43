"""The kernel variants by name. Needs Triton; importing it asks no GPU anything.

A variant is a module with
  kernel           the Triton kernel under `triton.heuristics` (what follows from a call) under `triton.autotune` (what is tuned)
  OPS              the ops it serves (`tuning_db.model.OPS`), either forward or backward
  REVISION         raised by hand when a change makes old records worthless: records of another revision are ignored
  LAYOUTS          the layouts it serves (`tuning_db.model.Problem`)
  IN_PLACE         whether the result may overwrite the input
  is_valid         (params, problem, device) -> whether a config of the space makes sense there
  grid             (named arguments) -> the launch grid; a backward variant's also takes `sm_count`, the GPU's
  workspace_words  optional: (named arguments) -> 64-bit words of zeroed workspace
  partial_rows     backward only: (as grid) -> how many partial rows of dw a launch stores
A backward kernel takes PDL, and where that is so and partial rows are stored, calls `gdc_launch_dependents` at its start.
Kernels take the fields of `kernels.numerics.Numerics` as constexprs, in upper case; those of a backward WEIGHT_OFFSET alone.
A kernel with a constexpr CLUSTER is launched in hardware clusters of so many programs.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import io
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol, cast

from kernels.variants import (
    backward_common,
    backward_multi_row,
    backward_split_row,
    backward_whole_row,
    cluster_row,
    column_sum,
    common,
    exchange,
    looped,
    multi_row,
    split_row,
    strided_axis,
    whole_row,
)
from kernels.variants.common import config_params
from tuning_db.model import ANY_ROWS, BACKWARD, Config, Device, ParamValue, Problem


class Variant(Protocol):
    kernel: Any
    OPS: tuple[str, ...]
    REVISION: int
    LAYOUTS: tuple[str, ...]
    IN_PLACE: bool
    is_valid: Callable[[Mapping[str, ParamValue], Problem, Device], bool]
    grid: Callable[[Mapping[str, Any]], tuple[int, int, int]]


COLUMN_SUM = "column_sum"

STRIP_ROWS = 32768
"""A config for any number of rows is one for so many: where it can take no more, `kernels/strips.py` launches it several times."""

VARIANTS: dict[str, Variant] = {
    module.__name__.rpartition(".")[2]: cast(Variant, module)
    for module in (
        *(whole_row, multi_row, looped, split_row, cluster_row, strided_axis),
        *(backward_whole_row, backward_multi_row, backward_split_row),
    )
}


def jit_function(name: str) -> Any:
    """The Triton function of a variant, or `column_sum`, which every backward with weight launches after its variant."""
    return column_sum.kernel if name == COLUMN_SUM else VARIANTS[name].kernel.fn.fn


@functools.cache
def space(variant: str) -> frozenset[Config]:
    """Every config that the variant's `triton.autotune` declares."""
    return frozenset(Config.of(variant, **config_params(config)) for config in VARIANTS[variant].kernel.configs)


def is_legal(config: Config, problem: Problem, device: Device) -> bool:
    """Whether a config, wherever it came from, is one of its variant's space and valid for the problem on the device."""
    variant = VARIANTS.get(config.variant)
    if variant is None or problem.op not in variant.OPS or config not in space(config.variant):
        return False
    if problem.rows == ANY_ROWS:
        problem = replace(problem, rows=STRIP_ROWS)
    return variant.is_valid(config.params, problem, device)


def candidates(problem: Problem, device: Device) -> list[Config]:
    """Every legal config of every variant for a problem, in a fixed order."""
    return sorted((config for name in VARIANTS for config in space(name) if is_legal(config, problem, device)), key=str)


@functools.cache
def source_hash(variant: str) -> str:
    """Hash of the Triton functions that the variant's launches run; comments, docstrings, line numbers and the space don't count."""
    shared = [common]
    if BACKWARD in VARIANTS[variant].OPS:
        shared += [backward_common, column_sum]
    if hasattr(VARIANTS[variant], "workspace_words"):
        shared.append(exchange)
    functions = [text for module in (*shared, VARIANTS[variant]) for text in _jit_functions(module)]
    return hashlib.sha256("\n".join(functions).encode()).hexdigest()[:16]


def _jit_functions(module: Any) -> list[str]:
    """The tokens of each Triton function. Not its syntax tree: how Python writes one down differs from version to version."""
    source = inspect.getsource(module)
    lines = source.splitlines(keepends=True)
    texts = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(mark) for mark in node.decorator_list):
            text = "".join(lines[node.lineno - 1 : node.end_lineno])
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            skipped = range(first.lineno - node.lineno + 1, (first.end_lineno or 0) - node.lineno + 2) if documented else range(0)
            texts.append(" ".join(_tokens(text, skipped)))
    return texts


def _tokens(text: str, skipped: range) -> Iterator[str]:
    """What decides the meaning of `text` but for the lines of its docstring: every token, with marks for indentation."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.start[0] in skipped or token.type in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            continue
        yield {tokenize.INDENT: "{", tokenize.DEDENT: "}", tokenize.NEWLINE: ";"}.get(token.type, token.string)
