"""The exit codes of `python -m benchmarks`, and the error that ends a command with one line."""

from __future__ import annotations

from enum import IntEnum

import click


class Exit(IntEnum):
    """What a command's exit code says."""

    OK = 0
    REGRESSION = 1
    USAGE = 2
    INCONCLUSIVE = 3
    NO_BASELINE = 4
    NO_GPU = 5


EPILOG = (
    "Exit codes: 0 all went well, 1 a regression, 2 wrong usage or a benchmark that could not run, 3 inconclusive, "
    "4 a baseline is missing that --require-baseline asks for, 5 there is no GPU."
)


class Stop(click.ClickException):
    """Ends the command with one line on stderr."""

    exit_code = int(Exit.USAGE)


class NoGpu(Stop):
    """There is nothing to benchmark on."""

    exit_code = int(Exit.NO_GPU)
