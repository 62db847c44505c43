"""The shipped workloads, and what a broken file is told."""

from dataclasses import replace
from pathlib import Path

import pytest

from tuner.selection import shard_of
from tuner.workloads import SHIPPED, WorkloadError, load_workload, parse_workload
from tuning_db.model import BACKWARD, Problem, bucket_rows

BLOCK = "problems:\n  - x_dtype: bfloat16\n    w_dtype: same\n    rows: [1, 100]\n    cols: 4096\n"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped(name: str) -> None:
    problems = load_workload(name)
    assert problems
    assert len(set(problems)) == len(problems)
    for problem in problems:
        assert problem.rows == bucket_rows(problem.rows)
        assert problem.inner_rows == bucket_rows(problem.inner_rows)
        assert problem.rows % problem.inner_rows == 0
        assert (problem.layout == "strided_axis") == (problem.inner_rows > 1)


def test_llm_covers_what_it_promises() -> None:
    problems = load_workload("llm")
    assert len(problems) >= 200
    assert {problem.x_dtype for problem in problems} == {"bfloat16", "float16", "float32"}
    assert {problem.layout for problem in problems} == {"contiguous", "two_stride", "strided_axis"}
    assert problems[0].x_dtype == "bfloat16"


@pytest.mark.parametrize("parts", [1, 2, 4, 7])
def test_shards_cover_a_workload_evenly_and_keep_rows_together(parts: int) -> None:
    problems = load_workload("llm")
    shards = [shard_of(problems, part, parts) for part in range(1, parts + 1)]
    assert sorted(problem for shard in shards for problem in shard) == sorted(problems)
    groups = [{replace(problem, rows=1, inner_rows=1) for problem in shard} for shard in shards]
    assert sum(map(len, groups)) == len(set().union(*groups))
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1  # there are groups of a single problem to even it out
    assert shards == [shard_of(problems, part, parts) for part in range(1, parts + 1)]
    assert all(shard == [problem for problem in problems if problem in shard] for shard in shards)


def test_llm_tunes_the_backward() -> None:
    backward = [problem for problem in load_workload("llm") if problem.op == BACKWARD]
    assert {(problem.rows, problem.cols) for problem in backward} >= {(512, 4096), (512, 131_072), (131_072, 128), (32_768, 256)}
    assert {problem.w_dtype for problem in backward} == {"bfloat16", "float32"}


def test_combinations_are_bucketed_once_and_in_order() -> None:
    made = parse_workload(BLOCK.replace("100", "100, 96"), "w.yaml")
    assert made == [Problem("rmsnorm", "bfloat16", "bfloat16", "bfloat16", rows, 4096) for rows in (1, 96)]


def test_max_elements_leaves_out_larger_problems() -> None:
    assert [p.rows for p in parse_workload(BLOCK + "    max_elements: 4096\n", "w.yaml")] == [1]


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("problems: [", "w.yaml, line", "not valid YAML"),
        ("", "w.yaml", "must be a mapping"),
        ("- 1\n", "w.yaml, line 1", "must be a mapping"),
        ("problem:\n  - x\n", "w.yaml, line 1", "unknown key `problem`"),
        ("problems: []\n", "w.yaml", "`problems`"),
        ("problems:\n  - 5\n", "w.yaml, line 2", "a block must be a mapping"),
        (BLOCK.replace("    cols: 4096\n", ""), "w.yaml, line 2", "key `cols` is missing"),
        (BLOCK + "    colls: 4\n", "w.yaml, line 6", "unknown key `colls`"),
        (BLOCK.replace("4096", "9" * 5000), "w.yaml, line 5, key `cols`", "no positive whole number below 2**48"),
        (BLOCK.replace("4096", str(2**48)), "w.yaml, line 5, key `cols`", "no positive whole number below 2**48"),
        ("problems: &a [*a]\n", "w.yaml, line 1", "a block must be a mapping"),
        ("[" * 100_000, "w.yaml", "nested too deeply"),
        (BLOCK.replace("4096", "-4"), "w.yaml, line 5, key `cols`", "'-4' is no positive whole number"),
        (BLOCK.replace("100", "'x'"), "w.yaml, line 4, key `rows`", "'x' is no positive whole number"),
        (BLOCK.replace("[1, 100]", "[]"), "w.yaml, line 4, key `rows`", "the list is empty"),
        (BLOCK.replace("[1, 100]", "{a: 1}"), "w.yaml, line 4, key `rows`", "a list or mapping"),
        (BLOCK.replace("bfloat16", "bf16"), "w.yaml, line 2, key `x_dtype`", "'bf16' is none of float16, bfloat16, float32"),
        (BLOCK.replace("same", "int8"), "w.yaml, line 3, key `w_dtype`", "'int8' is none of"),
        (BLOCK + "    op: layernorm\n", "w.yaml, line 6, key `op`", "'layernorm' is none of rmsnorm"),
        (BLOCK + "    layout: strided_axis\n", "w.yaml, line 2", "`inner_rows`"),
        (BLOCK + "    op: rmsnorm_backward\n    layout: two_stride\n", "w.yaml, line 2", "key `layout` must be contiguous"),
        (BLOCK + "    inner_rows: 16\n", "w.yaml, line 2", "`inner_rows`"),
        (BLOCK + "    max_elements: [1, 2]\n", "w.yaml, line 2", "key `max_elements` takes one number"),
        (BLOCK + "    max_elements: 0\n", "w.yaml, line 6, key `max_elements`", "'0' is no positive whole number"),
        (BLOCK + "    cols: !!python/object/apply:os.system [exit]\n", "w.yaml", ""),
    ],
)
def test_errors_say_where_and_what(text: str, where: str, what: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        parse_workload(text, "w.yaml")
    assert where in str(caught.value)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_shipped_workloads(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="quick, llm, full"):
        load_workload(str(tmp_path / "absent.yaml"))


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkloadError, match=r"w\.yaml"):
        load_workload(str(tmp_path / "w.yaml"))
