"""Nouns to flat rows of named columns and back, with a check of every row and value on the way in."""

from __future__ import annotations

import json
import math
import sqlite3
import zlib
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from types import NoneType
from typing import Any, TypeVar

from tuning_db.model import (
    DTYPES,
    LAYOUTS,
    NO_WEIGHT,
    Config,
    Device,
    Measurement,
    Problem,
    Record,
    Resources,
    Role,
    Status,
    Sweep,
    Trial,
    record_from_dict,
)

Noun = TypeVar("Noun")

SCHEMA_VERSION = 2
"""Of the tables that these rows are of. `tuning_db/schema.py` has as many migrations."""

PROBLEM = tuple(spec.name for spec in fields(Problem))
"""The columns that say which Problem a row is about."""

_MEASUREMENT = tuple(spec.name for spec in fields(Measurement))
_RESOURCES = tuple(spec.name for spec in fields(Resources))
_NUMBER = (int, float)
_TYPES: dict[str, Any] = {"int": int, "str": str, "bool": bool, "float": _NUMBER, "float | None": (*_NUMBER, NoneType)}


def row_of(noun: Any) -> dict[str, Any]:
    """A noun as one flat row; a column without a value is left out."""
    row: dict[str, Any] = {}
    for name, value in ((spec.name, getattr(noun, spec.name)) for spec in fields(noun)):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}: a failed trial has a status, not a time")
        if isinstance(value, Config):
            row |= {"variant": value.variant, "params": value.params_json}
        elif isinstance(value, Problem | Measurement | Resources):
            row |= row_of(value)
        elif value is not None:
            row[name] = value.value if isinstance(value, Enum) else value
    return row


def checksum(row: Mapping[str, Any]) -> int:
    """CRC-32 of a row's values by name: of equal rows equal, whether a number is stored as 2 or 2.0 and a missing value as NULL."""
    known = sorted((name, value) for name, value in row.items() if value is not None)
    return zlib.crc32("\n".join([f"{name}={value if isinstance(value, str) else format(value, '.17g')}" for name, value in known]).encode())


def problem_values(problem: Problem) -> tuple[Any, ...]:
    return tuple(getattr(problem, name) for name in PROBLEM)


def _take(plain: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: plain.pop(name) for name in names}


def device_from_row(row: sqlite3.Row) -> Device:
    plain = _undamaged(row)
    uid = plain.pop("uid")
    device = checked(Device(**plain))
    if device.uid != uid:
        raise ValueError(f"device {uid} has the fingerprint of {device.uid}")
    return device


def sweep_from_row(row: sqlite3.Row) -> Sweep:
    sweep = checked(Sweep(**dict(row)))
    argv = json.loads(sweep.argv)
    if not isinstance(argv, list) or not all(isinstance(argument, str) for argument in argv):
        raise TypeError(f"argv is {sweep.argv}, expected a list of text")
    return sweep


def trial_from_row(row: sqlite3.Row) -> Trial:
    plain = _undamaged(row)
    problem, measurement, binary = _take(plain, PROBLEM), _take(plain, _MEASUREMENT), _take(plain, _RESOURCES)
    trial = Trial(
        problem=Problem(**problem),
        config=Config.of(plain.pop("variant"), **json.loads(plain.pop("params"))),
        role=Role(plain.pop("role")),
        status=Status(plain.pop("status")),
        final=bool(plain.pop("final")),
        measurement=None if measurement["policy"] is None else checked(Measurement(**measurement)),
        resources=None if binary["registers"] is None else checked(Resources(**binary)),
        **plain,
    )
    return checked(trial)


def record_from_row(row: sqlite3.Row) -> Record:
    plain = _undamaged(row)
    plain["problem"] = _take(plain, PROBLEM)
    plain["config"] = {"variant": plain.pop("variant"), "params": json.loads(plain.pop("params"))}
    return checked(record_from_dict(plain))


def _undamaged(row: sqlite3.Row) -> dict[str, Any]:
    plain = dict(row)
    if plain.pop("checksum") != checksum(plain):
        raise ValueError("the row is not as it was written")
    return plain


def checked(noun: Noun) -> Noun:
    """The noun, if its fields hold what their annotations say and no negative, infinite or unknown value."""
    for spec in fields(noun):  # type: ignore[arg-type]
        value = getattr(noun, spec.name)
        if isinstance(value, Problem):
            checked(value)
            known = {value.x_dtype, value.y_dtype} <= {*DTYPES} and value.w_dtype in (*DTYPES, NO_WEIGHT) and value.layout in LAYOUTS
            if not known or min(value.rows, value.cols, value.inner_rows) < 1:
                raise ValueError(f"no such problem: {value!r}")
        elif isinstance(value, Config):
            if not isinstance(value.variant, str) or not all(isinstance(param, int | str) for _, param in value.items):
                raise TypeError(f"no such config: {value}")
            str(value).encode()
        elif not isinstance(value, _TYPES.get(str(spec.type), object)) or (isinstance(value, bool) and spec.type != "bool"):
            raise TypeError(f"{spec.name} is {value!r}, expected {spec.type}")
        elif isinstance(value, int | float) and not 0 <= value < 2**63:
            raise ValueError(f"{spec.name} is {value!r}")
        elif isinstance(value, str):
            value.encode()  # half of a surrogate pair, which JSON can spell, is a ValueError
    return noun
