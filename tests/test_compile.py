"""Every config compiles for every architecture, without a GPU. As a script: compile for the architectures named, print JSON."""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ARCHES = ("sm_90", "sm_100", "gfx942")
NAMES = (
    *("whole_row", "multi_row", "looped", "split_row", "cluster_row", "strided_axis"),
    *("backward_whole_row", "backward_multi_row", "backward_split_row"),
)
"""Of all variants, written out: nothing here imports Triton."""
OF_SUMS = ("whole_row", "multi_row", "looped", "split_row", "backward_whole_row", "backward_multi_row", "backward_split_row")
"""Of those that also serve add_rmsnorm, or its backward."""

COLS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 65_536, 131_072, 32, 16, 4, 2, 1)
"""Tried in this order for each config: small tiles compile fastest, and the narrowest rows only occur in tiles of many."""


def compile_time_arguments(arch: str) -> tuple[Any, Any]:
    """Triton's target for an arch, and a Device of it; only the warp size of that Device matters here."""
    from triton.backends.compiler import GPUTarget

    from tuning_db.model import Device

    warp_size = 64 if arch.startswith("gfx9") else 32
    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, warp_size)
    else:
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), warp_size)
    return target, Device(arch, 100, 50 * 2**20, 160 * 2**10, 2000, warp_size)


def problems(op: str, layouts: Iterable[str]) -> Iterator[Any]:
    from tuning_db.model import Problem

    for layout in layouts:
        for x, w, y in (("bfloat16",) * 3, ("float32", "none", "float32")):
            for cols in COLS:
                for rows in (4096, 16) if layout == "contiguous" else (4096,):
                    yield Problem(op, x, w, y, rows, cols, layout, 512 if layout == "strided_axis" else 1)


def sass(compiled: Any) -> str:
    """The machine code of a CUDA binary as text."""
    return disassembled(compiled, "-sass")


def disassembled(compiled: Any, option: str) -> str:
    from triton import knobs

    path = Path(os.environ["TRITON_CACHE_DIR"]) / f"{os.getpid()}.cubin"
    path.write_bytes(compiled.asm["cubin"])
    finished = subprocess.run([knobs.nvidia.cuobjdump.path, option, str(path)], capture_output=True, text=True, check=True)
    return finished.stdout


def spilled_bytes(compiled: Any) -> int:
    """What a thread keeps in local memory for want of registers (scratch on AMD); the kernels have no other use for it."""
    if "cubin" in compiled.asm:
        usage = disassembled(compiled, "-res-usage")
        return sum(int(number) for number in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    return sum(int(number) for number in re.findall(r"\.private_segment_fixed_size: +(\d+)", compiled.asm["amdgcn"]))


def compile_arch(arch: str) -> dict[str, Any]:
    """What test functions below assert, as plain data."""
    from kernels.backward_launch import column_sum_binary
    from kernels.geometry import geometry_of_problem
    from kernels.heuristic import heuristic_config
    from kernels.launch import binary_of, compile_binary, has_pdl, kernel_arguments
    from kernels.numerics import PLAIN, Numerics
    from kernels.variants import VARIANTS, column_sum, is_legal, space
    from tuner.architectures import architectures
    from tuning_db.jsonl import shipped_records
    from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, BACKWARD, FORWARD, LAYOUTS_OF, Problem, Source

    target, device = compile_time_arguments(arch)

    @functools.cache
    def compiled(binary: Any) -> Any:
        return compile_binary(binary, target)

    def binary_for(config: Any, problem: Any, geometry: Any = None, aligned: bool = True, numerics: Any = PLAIN) -> Any:
        geometry = geometry or geometry_of_problem(problem)
        arguments = kernel_arguments(config, geometry, ptx=target.backend == "cuda", pdl=has_pdl(arch), numerics=numerics)
        return binary_of(config, (problem.x_dtype, problem.w_dtype, problem.y_dtype), arguments, aligned=aligned, adds=problem.adds)

    configs: dict[str, str] = {}
    spilling: dict[str, int] = {}
    for name, variant in VARIANTS.items():
        for config in sorted(space(name), key=str):
            listed = problems(variant.OPS[0], variant.LAYOUTS[:1])
            problem = next((problem for problem in listed if is_legal(config, problem, device)), None)
            configs[str(config)] = "valid for no problem" if problem is None else outcome(compiled, binary_for(config, problem))
        # What else changes the machine code: other layouts and ops, a weight or none, addresses that are no multiple of 16 bytes, numerics.
        for problem in (problem for op in variant.OPS for problem in problems(op, LAYOUTS_OF[op])):
            if problem.cols in (1, 128, 65_536):
                config = next((config for config in sorted(space(name), key=str) if is_legal(config, problem, device)), None)
                if config is not None:
                    binary = binary_for(config, problem, aligned=False, numerics=Numerics(1.0, True))
                    configs[f"{config}, {problem}, misaligned, another mode"] = outcome(compiled, binary)
    for record in shipped_records(arch)[1]:
        if record.config.variant in VARIANTS and record.source is Source.MEASURED:  # of the modelled test_spills takes a sample
            amount = spilled_bytes(compiled(binary_for(record.config, record.problem)))
            if amount:
                spilling[f"{record.config}, {record.problem}"] = amount
    # Where nobody has measured, what runs is what the heuristic picks.
    widths = (1, 64, 256, 1024, 4096, 5120, 8192, 16_384, 131_072)
    dtypes = (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "none"), ("float32", "float32"))
    sum_dtypes = (*(("bfloat16",) * 3, ("float32",) * 3), ("float32", "bfloat16", "bfloat16"))
    picked = [
        Problem(op, x, w, x, *at) for op in (FORWARD, BACKWARD) for x, w in dtypes for at in itertools.product((4, 512, 32_768), widths)
    ]
    picked += [Problem(op, x, w, y, 4096, cols) for op in (ADD_FORWARD, ADD_BACKWARD) for x, w, y in sum_dtypes for cols in widths[1:]]
    for problem in picked:
        config = heuristic_config(problem, architectures()[arch].device)
        if config is None:  # PyTorch serves what has no room in the shared memory of a small one
            assert problem.op == ADD_BACKWARD
            assert arch.startswith("gfx")
            continue
        amount = spilled_bytes(compiled(binary_for(config, problem)))
        if amount:
            spilling[f"{config}, {problem}"] = amount
    for cols in (1, 256, 131_072):
        sums = compiled(column_sum_binary(column_sum.arguments_for(128, cols, pdl=has_pdl(arch)), "bfloat16"))
        if spilled_bytes(sums):
            spilling[f"column_sum, {cols} columns"] = spilled_bytes(sums)
    answer = {"configs": configs, "spilling": spilling}
    if target.backend == "cuda":
        answer["vectors"] = {
            op_of(name, index): narrow_accesses(name, variant.OPS[index], device, binary_for, compiled)
            for name, variant in VARIANTS.items()
            for index in range(len(variant.OPS))
        }
    return answer


def op_of(name: str, index: int) -> str:
    """How a variant and its first or second op are called here."""
    return f"{name} of a sum" if index else name


def outcome(compiled: Any, binary: Any) -> str:
    """Empty if it compiles, else the compiler's words."""
    try:
        compiled(binary)
    except Exception as error:  # any failure of compiler or assembler is the answer, for the one config that caused it
        return f"{type(error).__name__}: {error}"[:2000]
    return ""


def narrow_accesses(name: str, op: str, device: Any, binary_for: Any, compiled: Any) -> dict[str, Any] | None:
    """For 4096 columns of bf16 (65536 where programs share a row): global loads and stores of the machine code by width, and whether
    other rows and strides give the same Binary. None where the architecture has no such variant."""
    from kernels.geometry import geometry_of_problem
    from kernels.variants import is_legal, space
    from tuning_db.model import Problem

    strided = name == "strided_axis"
    cols = 65_536 if name.endswith(("split_row", "cluster_row")) else 256 if name.endswith("multi_row") else 4096
    rows = 64 if name == "cluster_row" else 4096
    problem = Problem(op, "bfloat16", "bfloat16", "bfloat16", rows, cols, *(("strided_axis", 512) if strided else ()))
    config = max((config for config in space(name) if is_legal(config, problem, device)), key=vector_rank, default=None)
    if config is None:
        return None
    nest = geometry_of_problem(problem)
    binary = binary_for(config, problem)
    others = [dataclasses.replace(nest, rows=nest.rows * 3)]
    if not strided:
        others.append(dataclasses.replace(nest, rows=1, x_row_stride=cols + 48, y_row_stride=cols * 2))
    text = sass(compiled(binary))
    widths = [re.search(r"\.(64|128)\b", line) for line in re.findall(r"\b(?:LDG|LDGSTS|STG)\.E\S*", text)]
    return {
        "config": str(config),
        "widths": sorted({int(width[1]) if width else 32 for width in widths}),
        "same_binary": all(binary_for(config, problem, other) == binary for other in others),
    }


def vector_rank(config: Any) -> tuple[float, str]:
    """Prefers tiles of 32 elements a thread: wide enough for whole vectors, small enough not to spill."""
    params = config.params
    elements = {
        "whole_row": lambda: 4096,
        "multi_row": lambda: params["rows_per_program"] * 256,
        "looped": lambda: params["block_cols"],
        "split_row": lambda: params["block_cols"],
        "cluster_row": lambda: 65_536 // params["cluster"],
        "strided_axis": lambda: params["block_cols"] * params["block_inner"] if params["block_inner"] >= 64 else 0,
    }[config.variant.removeprefix("backward_")]()
    return -abs(elements / params["num_warps"] / 32 - 16), str(config)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `compile_arch` says of each arch: two processes at a time, outside the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "RMSNORM_TUNING_DB")}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(ROOT)}

    def run(arch: str) -> dict[str, Any]:
        finished = subprocess.run(
            [sys.executable, __file__, arch], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=500
        )
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHES, pool.map(run, ARCHES), strict=True))


@pytest.mark.parametrize("arch", ARCHES)
def test_every_config_compiles(compiled, arch):
    """Each config of each space, at the first problem it is valid for. A config may be meant for another warp size."""
    failed = {config: text for config, text in compiled[arch]["configs"].items() if text not in ("", "valid for no problem")}
    assert not failed
    assert sum(not text for text in compiled[arch]["configs"].values()) > 50


def test_every_config_has_a_problem(compiled):
    """A config that is valid for no problem on any architecture is dead weight in its space."""
    dead = [{config for config, text in answer["configs"].items() if text == "valid for no problem"} for answer in compiled.values()]
    assert not set.intersection(*dead)


@pytest.mark.parametrize("arch", ARCHES)
def test_what_ships_spills_nothing(compiled, arch):
    """What was measured, and what the heuristic picks: a kernel change, or another compiler, can make it wrong."""
    assert compiled[arch]["spilling"] == {}


@pytest.mark.parametrize("variant", [*NAMES, *(op_of(name, 1) for name in OF_SUMS)])
@pytest.mark.parametrize("arch", [arch for arch in ARCHES if arch.startswith("sm_")])
def test_loads_are_whole_vectors(compiled, arch, variant):
    """128-bit loads and stores of x, y and the weight, though neither rows nor strides are specialised."""
    found = compiled[arch]["vectors"][variant]
    if found is None:
        pytest.skip(f"{variant} is none of {arch}'s")
    assert 128 in found["widths"], found
    if "whole_row" in variant:
        assert found["widths"] == [128], found


@pytest.mark.parametrize("variant", [*NAMES, *(op_of(name, 1) for name in OF_SUMS)])
def test_a_new_batch_size_compiles_nothing(compiled, variant):
    """Other rows, other row strides that are as aligned: the same Binary."""
    assert compiled["sm_90"]["vectors"][variant]["same_binary"]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(json.dumps(compile_arch(sys.argv[1])))
