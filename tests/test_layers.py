"""The layers: who may import whom, and that importing is free."""

import ast
from pathlib import Path

import pytest

from interpreters import run_python

ROOT = Path(__file__).parents[1]
LAYERS = ("tuning_db", "kernels", "tuner", "benchmarks")
"""Each may import those before it."""

SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, wherever in it. Relative imports stay within the layer."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def source_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=source_name)
def test_no_arrow_points_left(path):
    layer = LAYERS.index(path.relative_to(ROOT).parts[0])
    assert not imported(path) & {*LAYERS[layer + 1 :], "tests"}


@pytest.mark.parametrize("path", [path for path in SOURCES if "tuning_db" in path.parts], ids=source_name)
def test_the_database_needs_neither_torch_nor_triton(path):
    assert not imported(path) & {"torch", "triton"}


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").glob("*.py"))], ids=source_name)
def test_every_file_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_only_reports_draw():
    """matplotlib takes half a second to import: it belongs to what report commands import when they run."""
    drawing = {path for path in SOURCES if "matplotlib" in imported(path)}
    assert drawing
    assert {path.parent for path in drawing} == {ROOT / "tuner" / "report"}
    source = """
    import sys, benchmarks.__main__, benchmarks.check, benchmarks.compare_ref, benchmarks.gpu_time, benchmarks.host, benchmarks.tables
    import tuner.cli, tuner.display, tuner.listings, tuner.sweep
    print("matplotlib" in sys.modules)
    """
    assert run_python(source) == "False\n"


WATCH = """
    import sys
    opened = []

    def watch(event, args):
        if event == "sqlite3.connect" or (event == "open" and str(args[0]).endswith((".sqlite", ".jsonl"))):
            opened.append((event, str(args[0])))

    sys.addaudithook(watch)
"""


def test_importing_kernels_is_free():
    """Neither Triton nor what only tools need, no GPU asked, no database opened, nothing printed."""
    source = (
        WATCH
        + """
    import torch

    def asked(*_):
        raise AssertionError("importing asked for a GPU")

    for name in ("is_available", "device_count", "current_device", "get_device_properties", "get_device_capability", "init"):
        setattr(torch.cuda, name, asked)
    sys.addaudithook(lambda event, arguments: asked() if event == "ctypes.dlopen" and "cuda" in str(arguments[0]) else None)
    before = set(sys.modules)  # torch imports what it likes
    import kernels

    unwanted = {"triton", "sqlite_utils", "click", "rich", "yaml", "matplotlib", "tuner", "benchmarks", "sqlite3"}
    assert not unwanted & (set(sys.modules) - before), unwanted & (set(sys.modules) - before)
    assert not opened, opened
    assert not torch.cuda.is_initialized()
    """
    )
    assert run_python(source) == ""


def test_importing_the_variants_asks_no_gpu():
    """They need Triton; declaring their spaces needs no driver."""
    source = """
    import sys, torch, triton

    def asked(*_):
        raise AssertionError("importing asked for a GPU")

    for name in ("is_available", "device_count", "current_device", "get_device_properties", "get_device_capability", "init"):
        setattr(torch.cuda, name, asked)
    sys.addaudithook(lambda event, arguments: asked() if event == "ctypes.dlopen" and "cuda" in str(arguments[0]) else None)
    from triton.runtime import driver
    type(driver).active = property(asked)
    import kernels.dispatch
    from kernels.variants import VARIANTS, space
    print(sum(len(space(name)) for name in VARIANTS))
    """
    assert int(run_python(source)) > 0


def test_importing_the_database_is_free():
    source = (
        WATCH
        + """
    import tuning_db, tuning_db.lookup, tuning_db.model, tuning_db.store
    unwanted = {"torch", "triton", "numpy", "sqlite_utils", "click", "rich", "yaml"}
    assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
    assert not opened, opened
    """
    )
    assert run_python(source) == ""


def test_a_call_never_imports_sqlite_utils():
    """The first call reads the databases without the 150 ms that sqlite-utils takes to import; nor does it need the tools' packages."""
    source = """
    import os
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import sys, torch
    before = set(sys.modules)
    from kernels import rmsnorm
    rmsnorm(torch.ones(2, 8, device="cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"))
    unwanted = {"sqlite_utils", "click", "rich", "yaml", "tuner", "benchmarks"}
    assert not unwanted & (set(sys.modules) - before), unwanted & (set(sys.modules) - before)
    """
    assert run_python(source) == ""


def test_a_finished_sweep_is_told_without_torch(tmp_path):
    """A GPU's records are all there: that is seen with what the driver says of the GPU, and torch, seconds of import, stays out."""
    finished = run_python(f"""
        import os, sys
        os.environ.pop("TRITON_INTERPRET", None)
        from dataclasses import replace
        from pathlib import Path
        import triton
        from kernels import driver
        from tuner.cli import main
        from tuning_db.jsonl import shipped_records, write_jsonl
        from tuning_db.store import open_for_writing

        devices, records = shipped_records("sm_90")
        wanted = [replace(r, triton_version=triton.__version__) for r in records if (r.problem.rows, r.problem.cols) == (1, 4096)]
        with open_for_writing(Path({str(tmp_path / "tuning.sqlite")!r})) as store:
            store.import_jsonl(write_jsonl(devices, wanted))
        driver.first_nvidia_device = lambda: devices[0]
        main(["sweep", "--rows", "1", "--cols", "4096", "--db", {str(tmp_path / "tuning.sqlite")!r}], standalone_mode=False)
        print("torch" in sys.modules)
    """)
    assert "Nothing to do: 1 of 1 problem" in finished
    assert finished.splitlines()[-1] == "False"
