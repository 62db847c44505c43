"""Python code in a process of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_python(source: str, *, where: Path = ROOT, interprets: bool = True, timeout_s: float = 120) -> str:
    """stdout of a fresh interpreter, by default in the repository's root; its errors are the failure.

    interprets=False: Triton compiles, even where the tests have it interpret.
    """
    environment = {name: value for name, value in os.environ.items() if interprets or name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], cwd=where, env=environment, capture_output=True, text=True, check=False,
        timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
