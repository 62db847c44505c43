"""Workloads: named lists of Problems in YAML, read safely and checked with file, line and key."""

from __future__ import annotations

import itertools
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, DTYPES, FORWARD, LAYOUTS, LAYOUTS_OF, NO_WEIGHT, OPS, Problem, bucket_rows

SHIPPED = ("quick", "llm", "full", "compare")
KEYS = ("op", "x_dtype", "w_dtype", "y_dtype", "rows", "cols", "layout", "inner_rows")


class WorkloadError(ValueError):
    """A workload file can't be used; the message names file, line and key."""


def load_workload(name_or_path: str) -> list[Problem]:
    """The Problems of a shipped workload (`quick`, `llm`, `full`) or of a YAML file, each once, in the file's order.

    A file is a mapping with the key `problems`: a list of blocks. A block maps each of x_dtype, w_dtype (`same`: x's), rows, cols and
    optionally op, y_dtype (of the add ops, as w_dtype), layout, inner_rows to a value or a list of values, and stands for all
    combinations. `max_elements` skips larger ones.
    """
    if name_or_path in SHIPPED:
        origin = f"{name_or_path}.yaml"
        text = (resources.files("tuner") / "workloads" / origin).read_text(encoding="utf-8")
    else:
        path = Path(name_or_path)
        origin = str(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            names = ", ".join(SHIPPED)
            raise WorkloadError(f"workload {name_or_path!r} is neither one of {names} nor a readable file ({error})") from error
    return parse_workload(text, origin)


def positive_number(text: str) -> int | None:
    """A positive whole number below 2^48, more than any GPU has bytes; None if that is not what the text says."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= 15 else 0
    return number if 0 < number < 2**48 else None


def parse_workload(text: str, origin: str) -> list[Problem]:
    """The Problems of a workload's text. Raises WorkloadError."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise WorkloadError(f"{origin}: it is nested too deeply; a workload is a list of flat blocks") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise WorkloadError(f"{origin}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
    top = _mapping(root, origin, "the file", ("description", "problems"))
    blocks = top.get("problems")
    if not isinstance(blocks, yaml.SequenceNode) or not blocks.value:
        raise WorkloadError(f"{origin}: key `problems` is missing or no list of blocks")
    problems: dict[Problem, None] = {}
    for block in blocks.value:
        problems.update(dict.fromkeys(_block_problems(block, origin)))
    if not problems:
        raise WorkloadError(f"{origin}: no combination is left: rows must be multiples of inner_rows, and max_elements must allow some")
    return list(problems)


def _block_problems(block: yaml.Node, origin: str) -> list[Problem]:
    nodes = _mapping(block, origin, "a block", (*KEYS, "max_elements"))
    where = f"{origin}, line {block.start_mark.line + 1}"
    for key in ("x_dtype", "w_dtype", "rows", "cols"):
        if key not in nodes:
            raise WorkloadError(f"{where}: key `{key}` is missing")
    ops = _values(nodes.get("op"), origin, "op", OPS, [FORWARD])
    x_dtypes = _values(nodes["x_dtype"], origin, "x_dtype", DTYPES)
    w_dtypes = _values(nodes["w_dtype"], origin, "w_dtype", (*DTYPES, NO_WEIGHT, "same"))
    y_dtypes = _values(nodes.get("y_dtype"), origin, "y_dtype", (*DTYPES, "same"), ["same"])
    rows, cols = (_values(nodes[key], origin, key, None) for key in ("rows", "cols"))
    layouts = _values(nodes.get("layout"), origin, "layout", LAYOUTS, ["contiguous"])
    inner = _values(nodes.get("inner_rows"), origin, "inner_rows", None, [1])
    limits = _values(nodes.get("max_elements"), origin, "max_elements", None, [2**31])
    if len(limits) > 1:
        raise WorkloadError(f"{where}: key `max_elements` takes one number")
    if (inner != [1]) != (layouts == ["strided_axis"]):
        raise WorkloadError(f"{where}: key `inner_rows` goes with layout `strided_axis`, and that needs it")
    for op in ops:
        if not set(layouts) <= set(LAYOUTS_OF[op]):
            served = " or ".join(LAYOUTS_OF[op])
            raise WorkloadError(f"{where}: key `layout` must be {served} for op {op}, whose other layouts are copied first")
        if y_dtypes != ["same"] and op not in (ADD_FORWARD, ADD_BACKWARD):
            raise WorkloadError(f"{where}: key `y_dtype` goes with op {ADD_FORWARD} or {ADD_BACKWARD}; of {op} y has x's dtype")
    return [
        Problem(op, x, x if w == "same" else w, x if y == "same" else y, bucket_rows(r), c, layout, bucket_rows(i))
        for op, layout, i, x, w, y, c, r in itertools.product(ops, layouts, inner, x_dtypes, w_dtypes, y_dtypes, cols, rows)
        if r * c <= limits[0] and r % i == 0
    ]


def _mapping(node: Any, origin: str, what: str, known: tuple[str, ...]) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        line = f", line {node.start_mark.line + 1}" if node is not None else ""
        raise WorkloadError(f"{origin}{line}: {what} must be a mapping with the keys {', '.join(known)}")
    found = {}
    for key, value in node.value:
        if key.value not in known:
            raise WorkloadError(f"{origin}, line {key.start_mark.line + 1}: unknown key `{key.value}`; use {', '.join(known)}")
        if key.value in found:
            raise WorkloadError(f"{origin}, line {key.start_mark.line + 1}: key `{key.value}` stands twice; keep one")
        found[key.value] = value
    return found


def _values(node: Any, origin: str, key: str, allowed: tuple[str, ...] | None, default: list[Any] | None = None) -> list[Any]:
    """The values of one key: names out of `allowed`, or positive whole numbers where that is None."""
    if node is None:
        assert default is not None
        return default
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    values = []
    for item in items:
        where = f"{origin}, line {item.start_mark.line + 1}, key `{key}`"
        text = item.value if isinstance(item, yaml.ScalarNode) else "a list or mapping"
        if allowed is not None:
            if text not in allowed:
                raise WorkloadError(f"{where}: {text!r} is none of {', '.join(allowed)}")
            values.append(text)
        else:
            number = positive_number(text)
            if number is None:
                raise WorkloadError(f"{where}: {text!r} is no positive whole number below 2**48")
            values.append(number)
    if not values:
        raise WorkloadError(f"{origin}, line {node.start_mark.line + 1}, key `{key}`: the list is empty")
    return values
