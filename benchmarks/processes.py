"""Fresh interpreters: each measures a list of problems and leaves its figures in a file."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.exits import Stop
from tuning_db.model import Problem


def measured_apart(module: Sequence[str], problems: Sequence[Problem]) -> dict[str, Any]:
    """What `python -m *module --suite FILE --json FILE` writes for the problems in a process of its own. Raises Stop."""
    with tempfile.TemporaryDirectory() as folder:
        suite, output = Path(folder, "suite.yaml"), Path(folder, "result.json")
        suite.write_text(suite_text(problems), encoding="utf-8")
        command = [sys.executable, "-m", *module, "--suite", str(suite), "--json", str(output)]
        finished = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if finished.returncode:
            raise Stop(f"a benchmark process ended with exit code {finished.returncode}; what it says is above")
        plain: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return plain


def suite_text(problems: Sequence[Problem]) -> str:
    """A suite file of exactly these problems. JSON is YAML."""
    blocks = []
    for problem in problems:
        block = {"op": problem.op, "x_dtype": problem.x_dtype, "w_dtype": problem.w_dtype, "rows": problem.rows, "cols": problem.cols}
        block["layout"] = problem.layout
        if problem.y_dtype != problem.x_dtype:
            block["y_dtype"] = problem.y_dtype
        if problem.layout == "strided_axis":
            block["inner_rows"] = problem.inner_rows
        blocks.append(block)
    return json.dumps({"problems": blocks}, indent=1)
