"""Whether a record or trial was made with today's kernels. Imports no torch."""

from __future__ import annotations

import triton

from kernels.variants import VARIANTS, source_hash
from tuning_db.model import TORCH_VARIANT, Record, Trial


def is_current(record: Record | Trial) -> bool:
    """Whether the variant still exists, with the revision that the record was made with."""
    if record.config.variant == TORCH_VARIANT:
        return True
    variant = VARIANTS.get(record.config.variant)
    return variant is not None and record.revision == variant.REVISION


def is_fresh(record: Record | Trial) -> bool:
    """Whether a current record is of today's kernel source and Triton; a stale one is used, but yields to a fresh one."""
    if record.triton_version != triton.__version__:
        return False
    return record.config.variant == TORCH_VARIANT or source_hash(record.config.variant) == record.source_hash


def is_todays(record: Record | Trial) -> bool:
    """Whether a record or trial is of today's kernels and Triton."""
    return is_current(record) and is_fresh(record)
