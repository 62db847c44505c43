"""Which problems a command is about: a workload's that pass the options' filters, or those that the options make up."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from tuning_db.model import FORWARD, Problem, bucket_rows


@dataclass(frozen=True)
class Filter:
    """What the options name; an empty one names everything. rows count by their bucket."""

    op: Collection[str] = ()
    dtype: Collection[str] = ()
    rows: Collection[int] = ()
    cols: Collection[int] = ()

    def passes(self, problem: Problem) -> bool:
        buckets = [bucket_rows(rows) for rows in self.rows]
        wanted = ((problem.op, self.op), (problem.x_dtype, self.dtype), (problem.rows, buckets), (problem.cols, self.cols))
        return all(value in values for value, values in wanted if values)

    def combinations(self) -> list[Problem]:
        """All combinations of rows and cols, the forward of bfloat16 unless ops or dtypes are named, with a weight of the same dtype."""
        named = itertools.product(self.op or (FORWARD,), self.dtype or ("bfloat16",), self.cols, self.rows)
        return list(dict.fromkeys(Problem(op, dtype, dtype, dtype, bucket_rows(rows), cols) for op, dtype, cols, rows in named))

    def __str__(self) -> str:
        return ", ".join(f"--{name} {','.join(map(str, values))}" for name, values in vars(self).items() if values)


def shard_of(problems: Sequence[Problem], part: int, parts: int) -> list[Problem]:
    """Part 1, 2, … of `parts`, in the problems' order: every problem is in one, and all hosts agree on which.

    Problems that differ in rows alone run mostly the same binaries and stay together. The largest such groups are dealt first, each to
    the part with the fewest problems.
    """
    groups: dict[Problem, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(replace(problem, rows=1, inner_rows=1), []).append(problem)
    counts, mine = [0] * parts, set[Problem]()
    for _, group in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        emptiest = counts.index(min(counts))
        counts[emptiest] += len(group)
        mine.update(group if emptiest == part - 1 else ())
    return [problem for problem in problems if problem in mine]
