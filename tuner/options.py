"""The command line's kinds of options: durations, and lists that may be repeated or separated by commas."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import click

from tuner.workloads import positive_number
from tuning_db.model import DTYPES, OPS

Decorator: TypeAlias = Callable[[Any], Any]
SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class Duration(click.ParamType):
    """`90s`, `10m` or `1h` as seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", str(value))
        if match is None:
            self.fail(f"{value!r} is no duration; write 90s, 10m or 1h", param, ctx)
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def positive(text: str) -> int:
    number = positive_number(text)
    if number is None:
        raise click.BadParameter(f"{text!r} is no positive whole number below 2**48")
    return number


def gpu(text: str) -> int | None:
    """An index, or None for `all`."""
    if text == "all":
        return None
    if not (text.isascii() and text.isdigit()):
        raise click.BadParameter(f"{text!r} is neither the number of a GPU nor `all`")
    return int(text)


def shard(text: str) -> tuple[int, int]:
    """`2/4` as (2, 4)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(f"{text!r} is no part of a whole; write 1/4, 2/4, 3/4 or 4/4")
    return int(match[1]), int(match[2])


def dtype(text: str) -> str:
    name = SHORT_DTYPES.get(text, text)
    if name not in DTYPES:
        raise click.BadParameter(f"{text!r} is none of {', '.join(DTYPES)}")
    return name


def op(text: str) -> str:
    if text not in OPS:
        raise click.BadParameter(f"{text!r} is none of {', '.join(OPS)}")
    return text


def arch(text: str) -> str:
    from tuner.architectures import architectures  # imports triton

    if text not in architectures():
        raise click.BadParameter(f"{text!r} is none of {', '.join(architectures())}; a line of tuner/architectures.yaml adds it")
    return text


def one(check: Callable[[str], Any]) -> Callable[..., Any]:
    """A callback for an option with one value."""
    return lambda _context, _param, value: None if value is None else check(value)


def each(check: Callable[[str], Any]) -> Callable[..., Any]:
    """A callback for an argument with any number of values."""
    return lambda _context, _param, values: tuple(check(value) for value in values)


def several(name: str, check: Callable[[str], Any], text: str) -> Decorator:
    """An option that may be repeated, and whose values may be separated by commas; a tuple of what `check` makes of each."""

    def convert(_context: click.Context, _param: click.Parameter, values: Sequence[str]) -> tuple[Any, ...]:
        return tuple(check(part.strip()) for value in values for part in value.split(",") if part.strip())

    return click.option(name, multiple=True, metavar="X,…", callback=convert, help=text)


path = click.Path(dir_okay=False, path_type=Path)
existing_file = click.Path(exists=True, dir_okay=False, path_type=Path)
db_option = click.option("--db", type=path, help="This database file instead of the usual one.")
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable JSON on stdout.")
rows_option = several("--rows", positive, "Only these numbers of rows.")
cols_option = several("--cols", positive, "Only these row lengths.")
dtype_option = several("--dtype", dtype, f"Only these dtypes of x: {', '.join(DTYPES)}.")
