"""Latency of the first call in a new process, with empty and with warm caches of compiled kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.exits import Stop
from benchmarks.results import Interval
from tuning_db.model import Problem

PROBLEM = Problem("rmsnorm", "bfloat16", "bfloat16", "bfloat16", 1024, 4096)
"""A prefill; `whole_row` serves it, whose `triton.autotune` is one of the ways."""

WAYS = {
    "tuned": "kernels.rmsnorm with the records that there are",
    "compile": "torch.compile of torch.nn.functional.rms_norm",
    "autotune": "triton.autotune of the variant whole_row, over the space that the tuner races",
}
CACHES = ("empty", "warm")

Child = Callable[[str, Mapping[str, str]], float]
"""Seconds that the first call took in a new process with these additional environment variables."""


def first_calls(repeats: int, child: Child, say: Callable[[str], None]) -> dict[str, dict[str, Interval]]:
    """Seconds by way, then by the state of the caches: a new cache directory for each repeat, used twice."""
    seconds: dict[str, dict[str, list[float]]] = {way: {state: [] for state in CACHES} for way in WAYS}
    for repeat in range(repeats):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                environment = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
                for state in CACHES:
                    seconds[way][state].append(child(way, environment))
                    say(f"{repeat + 1} of {repeats}: {way}, {state} caches: {seconds[way][state][-1]:.2f} s")
    return {way: {state: Interval.of(values) for state, values in states.items()} for way, states in seconds.items()}


def run_child(way: str, environment: Mapping[str, str]) -> float:
    """`Child` by a new interpreter. Raises Stop."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "seconds.json")
        command = [sys.executable, "-m", "benchmarks.first_call_child", way, str(PROBLEM.rows), str(PROBLEM.cols), str(output)]
        finished = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, check=False)
        if finished.returncode:
            raise Stop(f"the process of {way} ended with exit code {finished.returncode}; what it says is above")
        seconds: float = json.loads(output.read_text(encoding="utf-8"))
        return seconds
