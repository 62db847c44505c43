"""The first tier of the ladder: a config that the caller names for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from tuning_db.model import Config

_override: ContextVar[Config | None] = ContextVar("tuned_rmsnorm_override", default=None)
active_override = _override.get


@contextlib.contextmanager
def override(config: Config) -> Iterator[None]:
    """Within the `with` block, this thread's calls run `config` where it is legal; so do the backwards of those calls, wherever they run.

    Of compiled code it reaches the forward alone. For experiments and tests.

    with override(Config.of("whole_row", num_warps=8, weight_first=True)):
        y = rmsnorm(x, weight)
    """
    token = _override.set(config)
    try:
        yield
    finally:
        _override.reset(token)
