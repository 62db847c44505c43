"""No config that the ladder can answer spills registers to local memory, on any listed architecture. Compiles, and needs no GPU.

CI takes SAMPLE binaries of each architecture, always the same; `pytest tests/test_spills.py --every-binary` takes all, in half an hour.
As a script: judge the binaries of the architectures named, print JSON.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SAMPLE = 8
WORD = 8
"""Bytes a thread that a neighbour's or the heuristic's config may spill: ptxas parks one word, stored once and loaded once, where that
keeps a program within the registers of full occupancy (32 or 64 a thread; seen with Triton 3.9). A record of the very problem may not."""
ARCHES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx90a", "gfx942", "gfx950")
"""All of tuner/architectures.yaml, written out: nothing here imports Triton."""


def asked() -> Iterator[Any]:
    """The default workload, and what lies between its problems: other lengths, rows, dtypes, layouts, any number of rows."""
    from tuner.workloads import load_workload
    from tuning_db.model import ANY_ROWS, BACKWARD, FORWARD, Problem

    yield from load_workload("llm")
    dtypes = (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "none"), ("float32", "float32"))
    cols = (1, 50, 100, 200, 700, 1000, 1800, 3500, 6000, 11_008, 14_336, 20_480, 28_672, 50_000, 100_000, 200_000, 524_288)
    rows = (1, 24, 192, 1024, 12_288, 98_304, ANY_ROWS)
    for (x, w), c, r in itertools.product(dtypes, cols, rows):
        yield Problem(FORWARD, x, w, x, r, c)
        if r != ANY_ROWS:
            yield Problem(BACKWARD, x, w, x, r, c)
    for (x, w), c in itertools.product(dtypes, (64, 96, 128, 256)):
        yield Problem(FORWARD, x, w, x, 4096, c, "two_stride")
    for (x, w), c, inner in itertools.product(dtypes, (40, 256, 1000, 5000), (1, 24, 256, 4096)):
        yield Problem(FORWARD, x, w, x, 16_384, c, "strided_axis", inner)


def reachable(arch: str) -> dict[Any, tuple[str, int]]:
    """Every binary that the ladder, with the records that ship, picks for a problem on a board of an arch.

    With an example of such a pick, and the bytes that it may spill.
    """
    from kernels.dispatch import pick_config
    from tuner.architectures import architectures
    from tuner.compiling import binary_for
    from tuning_db.jsonl import shipped_records
    from tuning_db.lookup import RecordIndex
    from tuning_db.model import FORWARD, TORCH_VARIANT

    board = architectures()[arch]
    devices, records = shipped_records(arch)
    index = RecordIndex([("shipped", devices, records)])
    problems = dict.fromkeys([*(record.problem for record in records), *asked()])
    found: dict[Any, tuple[str, int]] = {}
    for device, problem in itertools.product(dict.fromkeys([*devices, board.device]), problems):
        for in_place in (False, True) if problem.op == FORWARD else (False,):
            pick = pick_config(problem, device, in_place=in_place, index=index)
            if pick.config.variant != TORCH_VARIANT:
                binary = binary_for(problem, pick.config, board.target)
                is_its_own = pick.record is not None and pick.record.problem == problem
                if is_its_own or binary not in found:
                    found[binary] = (f"{pick.config} by tier {pick.tier.name} for {problem}", 0 if is_its_own else WORD)
    return found


def spilling(arches: list[str], sample: int | None) -> dict[str, Any]:
    """By arch how many binaries were judged, and which spill or need more than there is."""
    from tuner.architectures import architectures
    from tuner.compiling import CompilePool

    answer = {}
    for arch in arches:
        found = reachable(arch)
        most_shared = architectures()[arch].device.shared_bytes
        chosen = sorted(found, key=lambda binary: (zlib.crc32(str(binary).encode()), str(binary)))[:sample]
        with closing(CompilePool(architectures()[arch].device, architectures()[arch].target)) as pool:
            pool.submit(chosen)
            outcomes = {binary: pool.result(binary) for binary in chosen}
        bad = {}
        for binary, outcome in outcomes.items():
            example, allowed = found[binary]
            if outcome.resources is None or outcome.resources.spill_bytes > allowed or outcome.resources.shared_bytes > most_shared:
                bad[example] = outcome.error
        answer[arch] = {"judged": len(chosen), "bad": bad}
    return answer


@pytest.fixture(scope="session")
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `spilling` says of all architectures, in a process outside the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "RMSNORM_TUNING_DB")}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(ROOT)}
    every = request.config.getoption("--every-binary")
    sample = [] if every else ["--sample", str(SAMPLE)]
    finished = subprocess.run(
        [sys.executable, __file__, *sample, *ARCHES],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=7200 if every else 400,
    )
    assert finished.returncode == 0, finished.stderr
    answer: dict[str, Any] = json.loads(finished.stdout)
    return answer


@pytest.mark.parametrize("arch", ARCHES)
def test_nothing_reachable_spills(judged: dict[str, Any], arch: str) -> None:
    assert judged[arch]["judged"] >= SAMPLE
    assert judged[arch]["bad"] == {}


def test_every_listed_architecture_is_judged() -> None:
    listed = (ROOT / "tuner" / "architectures.yaml").read_text(encoding="utf-8")
    assert tuple(line.removesuffix(":") for line in listed.splitlines() if line[:1].isalpha()) == ARCHES


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", type=int)
    parser.add_argument("arches", nargs="+")
    options = parser.parse_args()
    print(json.dumps(spilling(options.arches, options.sample), indent=1))
