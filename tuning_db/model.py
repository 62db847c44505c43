"""The nouns of the project as frozen dataclasses with one canonical JSON form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum, IntEnum
from typing import Any, TypeAlias

ParamValue: TypeAlias = int | bool | str

LAYOUTS = ("contiguous", "two_stride", "strided_axis")
DTYPES = ("float16", "bfloat16", "float32")
NO_WEIGHT = "none"

FORWARD = "rmsnorm"
BACKWARD = "rmsnorm_backward"
"""Ops of a Problem. The backward gives dx and, where there is a weight, dw of dy, x and the weight; y_dtype is then that of dy."""

ADD_FORWARD = "add_rmsnorm"
ADD_BACKWARD = "add_rmsnorm_backward"
"""The same of a sum: the residual stream, whose dtype is x_dtype, and what is added to it, whose dtype is that of y.

The forward also gives the sum. The backward also takes the sum's gradient, and gives that of both addends."""

LAYOUTS_OF = {
    FORWARD: LAYOUTS,
    BACKWARD: ("contiguous",),
    ADD_FORWARD: ("contiguous", "two_stride"),
    ADD_BACKWARD: ("contiguous",),
}
"""The layouts that there are kernels for, by op: others are copied to the first one."""

OPS = tuple(LAYOUTS_OF)

TORCH_VARIANT = "torch"
"""Name under which "PyTorch is fastest here" is stored: a Config of this variant has no params."""


def canonical_json(value: Any) -> str:
    """One text for equal values: keys sorted, no spaces, no NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def bucket_rows(rows: int) -> int:
    """The nearest of 1, 2, 3, 4, 6, 8, 12, 16, 24, … (two steps an octave, by ratio) to a positive number of rows."""
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    octave = 1 << (rows.bit_length() - 1)
    candidates = [octave, octave + octave // 2, octave * 2]
    return min(candidates, key=lambda bucket: (abs(math.log2(bucket / rows)), -bucket))


@dataclass(frozen=True, order=True)
class Problem:
    """What the op is asked for, as far as it decides which config is fastest. Never eps, never values.

    rows and inner_rows are bucketed (`bucket_rows`); cols is the exact length of the normalised axis.
    layout is `contiguous` (the elements of a row are adjacent, one stride leads from row to row), `two_stride` (adjacent, and the
    rows lie at two strides, as in a q or k slice of a packed qkv) or `strided_axis` (the elements of a row lie a stride apart).
    inner_rows counts the rows whose elements interleave in memory: 1 unless the layout is `strided_axis`.
    """

    op: str
    x_dtype: str
    w_dtype: str
    y_dtype: str
    rows: int
    cols: int
    layout: str = "contiguous"
    inner_rows: int = 1

    @property
    def bytes_moved(self) -> int:
        """Fewest bytes through device memory: what is read, read once; what is given, written once."""
        weight = 0 if self.w_dtype == NO_WEIGHT else self.cols * itemsize(self.w_dtype)
        return self.rows * self.cols * self.element_bytes + weight * (2 if self.is_backward else 1)

    @property
    def element_bytes(self) -> int:
        """Of all tensors of rows that the op reads or gives: x, y; x, dy, dx; residual, addend, sum, y; sum, its gradient, dy, gradients.

        The two addends have one gradient in common unless they differ in dtype.
        """
        x, y = itemsize(self.x_dtype), itemsize(self.y_dtype)
        if self.op == ADD_BACKWARD:
            return 3 * x + y + (y if self.y_dtype != self.x_dtype else 0)
        return {FORWARD: x + y, BACKWARD: 2 * x + y, ADD_FORWARD: 2 * x + 2 * y}[self.op]

    @property
    def is_backward(self) -> bool:
        return self.op in (BACKWARD, ADD_BACKWARD)

    @property
    def adds(self) -> bool:
        """Whether what is normalised is a sum."""
        return self.op in (ADD_FORWARD, ADD_BACKWARD)

    def __str__(self) -> str:
        result = "" if self.y_dtype == self.x_dtype else f" y={self.y_dtype}"
        layout = "" if self.layout == "contiguous" else f" {self.layout}"
        inner = "" if self.inner_rows == 1 else f" inner={self.inner_rows}"
        return f"{self.op} {self.rows}x{self.cols} {self.x_dtype} w={self.w_dtype}{result}{layout}{inner}"


def itemsize(dtype: str) -> int:
    """Bytes of one element of a dtype named as torch names it."""
    return {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[dtype]


@dataclass(frozen=True)
class Config:
    """A variant and its params, hashable and self-describing: `Config.of("multi_row", rows_per_program=4, num_warps=8)`."""

    variant: str
    items: tuple[tuple[str, ParamValue], ...] = ()

    @classmethod
    def of(cls, variant: str, /, **params: ParamValue) -> Config:
        return cls(variant, tuple(sorted(params.items())))

    @property
    def params(self) -> dict[str, ParamValue]:
        return dict(self.items)

    @property
    def params_json(self) -> str:
        return canonical_json(self.params)

    def __str__(self) -> str:
        params = " ".join(f"{name}={value}" for name, value in self.items)
        return f"{self.variant} {params}".strip()


@dataclass(frozen=True)
class Device:
    """A board by its numeric fingerprint. The marketing name is kept for people and never compared.

    arch is `sm_90`, `gfx942`, …; bandwidth_gbs is the published peak (memory clock × bus width) in 10^9 bytes/s;
    shared_bytes is the most shared memory one program may ask for.
    """

    arch: str
    sm_count: int
    l2_bytes: int
    shared_bytes: int
    bandwidth_gbs: int
    warp_size: int = 32
    name: str = field(default="", compare=False)

    @property
    def uid(self) -> str:
        """Readable identity made of the fingerprint alone, for example `sm_90-132sm-50MB-227KB-3352GBs`."""
        return f"{self.arch}-{self.sm_count}sm-{self.l2_bytes // 2**20}MB-{self.shared_bytes // 2**10}KB-{self.bandwidth_gbs}GBs"

    def distance(self, other: Device) -> float:
        """How differently two boards behave for a memory-bound kernel: sum of |log2| ratios of bandwidth, SMs and L2."""
        pairs = (
            (self.bandwidth_gbs, other.bandwidth_gbs),
            (self.sm_count, other.sm_count),
            (self.l2_bytes, other.l2_bytes),
        )
        return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)


class Status(str, Enum):
    """How a Trial ended."""

    OK = "ok"
    WRONG = "wrong"
    COMPILE_ERROR = "compile_error"
    OUT_OF_RESOURCES = "out_of_resources"
    CRASHED = "crashed"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True)
class Measurement:
    """Median and its interval in µs under a named policy; copy_fraction is reference-copy time / this time (1.0 = copy speed)."""

    policy: str
    median_us: float
    low_us: float
    high_us: float
    copy_fraction: float
    rounds: int


@dataclass(frozen=True)
class Resources:
    """What a compiled binary takes: registers per thread, spilled bytes per thread, shared memory per program."""

    registers: int
    spill_bytes: int
    shared_bytes: int


class Role(str, Enum):
    """Why a Config was in a final race: found by the sweep, held the record before, or is what would run without one."""

    CANDIDATE = "candidate"
    INCUMBENT = "incumbent"
    HEURISTIC = "heuristic"
    TORCH = "torch"


@dataclass(frozen=True)
class Trial:
    """One attempt at a Config on a Problem. Stored for ever, also when it failed; never edited.

    race_uid joins the trials that were measured against each other; `final` marks the confirming race on fresh buffers, the only one
    that a Record is derived from. A Trial without measurement and with status ok was eliminated or compiled only.
    """

    uid: str
    sweep_uid: str
    race_uid: str
    device_uid: str
    problem: Problem
    config: Config
    role: Role
    status: Status
    final: bool
    created_at: str
    revision: int
    source_hash: str
    triton_version: str
    torch_version: str
    error: str = ""
    measurement: Measurement | None = None
    resources: Resources | None = None


@dataclass(frozen=True)
class Sweep:
    """All trials of one command on one Device. state is `running`, `finished` or `interrupted`; argv is canonical JSON."""

    uid: str
    device_uid: str
    started_at: str
    finished_at: str
    host: str
    argv: str
    state: str
    triton_version: str
    torch_version: str


class Source(str, Enum):
    """What a Record rests on."""

    MEASURED = "measured"
    MODELLED = "modelled"


@dataclass(frozen=True)
class Record:
    """The winner for a Problem on a Device, with its evidence. Times in µs; heuristic_us and torch_us from the same race or None."""

    device_uid: str
    problem: Problem
    config: Config
    source: Source
    policy: str
    median_us: float
    low_us: float
    high_us: float
    copy_fraction: float
    heuristic_us: float | None
    torch_us: float | None
    revision: int
    source_hash: str
    triton_version: str
    torch_version: str
    created_at: str
    trial_uid: str


class Tier(IntEnum):
    """The steps of the lookup ladder, best evidence first."""

    OVERRIDE = 1
    EXACT = 2
    NEAREST_ROWS = 3
    NEAREST_COLS = 4
    NEAREST_DEVICE = 5
    MODELLED = 6
    HEURISTIC = 7
    TORCH = 8


def to_dict(noun: Problem | Device | Record | Measurement | Resources) -> dict[str, Any]:
    """A noun as nested plain data; a Config becomes `{"variant": …, "params": {…}}`."""
    plain = asdict(noun)
    for spec in fields(noun):
        value = getattr(noun, spec.name)
        if isinstance(value, Config):
            plain[spec.name] = {"variant": value.variant, "params": value.params}
        elif isinstance(value, Enum):
            plain[spec.name] = value.value
    return plain


def record_from_dict(plain: Mapping[str, Any]) -> Record:
    """The inverse of `to_dict` for a Record. Raises KeyError, TypeError or ValueError on anything else."""
    data = dict(plain)
    data["problem"] = Problem(**data["problem"])
    data["config"] = Config.of(data["config"]["variant"], **data["config"]["params"])
    data["source"] = Source(data["source"])
    return Record(**data)
