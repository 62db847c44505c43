"""What ends a sweep, a station or a worker's call other than by a result; all of it travels between processes."""

from __future__ import annotations


class Failure(Exception):
    """A sweep could not go on; the message says why and what helps."""


class StationGone(Exception):
    """A station can't work any more: its GPU can't be opened, or its host is gone."""


class JobLost(Exception):
    """A job's process died and nothing says that a config was at fault: the job may be run again, here or elsewhere."""


class ContextBroken(Exception):
    """A kernel broke the GPU's context; the process that holds it can do nothing more with that GPU."""
