"""What a sweep still has to do. Imports no torch: a finished sweep is told so in a second or two."""

from __future__ import annotations

from collections.abc import Sequence

from kernels.provenance import is_todays
from kernels.variants import is_legal
from tuning_db.model import TORCH_VARIANT, Device, Problem, Record, Source


def unfinished(problems: Sequence[Problem], records: Sequence[Record], source: Source, device: Device) -> list[Problem]:
    """The problems without a record of today's kernels and space, in order: what a resumed sweep still has to do."""

    def is_done(record: Record) -> bool:
        legal = record.config.variant == TORCH_VARIANT or is_legal(record.config, record.problem, device)
        return record.source is source and legal and is_todays(record)

    done = {record.problem for record in records if is_done(record)}
    return [problem for problem in problems if problem not in done]
