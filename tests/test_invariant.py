"""The config for any number of rows: derived from made-up trials, and launched strip by strip."""

from dataclasses import replace

import pytest
import torch
from test_regret import H100, LEAN, PROBLEM, trial

from kernels import strips
from kernels.dispatch import pick_config
from kernels.geometry import Geometry, geometry_of
from kernels.heuristic import heuristic_config
from kernels.variants import STRIP_ROWS, candidates, is_legal, space
from oracle import assert_rmsnorm, random_weight, random_x
from tuner.invariant import invariant_records, invariant_trials
from tuning_db.derive import derive_record
from tuning_db.lookup import RecordIndex
from tuning_db.model import ANY_ROWS, BACKWARD, Config, Tier

ROWS = (16, 1024, 16_384)
A, B, C = [config for config in candidates(PROBLEM, H100) if config.variant == "whole_row"][:3]
TILE = Config.of("multi_row", rows_per_program=64, num_warps=8)
NARROW = replace(PROBLEM, cols=128)


def races(times_us, problem=PROBLEM):
    """{config: one time for each of ROWS, or None where it was not timed}."""
    return [
        trial(replace(problem, rows=rows), config, us, f"race {rows}", resources=LEAN)
        for i, rows in enumerate(ROWS)
        for config, own in times_us.items()
        if (us := own[i]) is not None
    ]


def winner(trials):
    (record,) = invariant_records(H100, trials)
    return record


def test_the_least_geometric_mean_wins_not_the_most_wins():
    """A is fastest twice, but 3 times as slow once: means (1·1·30)^(1/3) = 3.1 and (1.5·1.5·10)^(1/3) = 2.8."""
    record = winner(races({A: (1.0, 1.0, 30.0), B: (1.5, 1.5, 10.0)}))
    assert record.config == B
    assert record.problem == replace(PROBLEM, rows=ANY_ROWS)
    assert record.median_us == pytest.approx(22.5 ** (1 / 3))


def test_a_config_that_failed_at_some_rows_is_out():
    assert winner(races({A: (1.0, None, 1.0), B: (2.0, 2.0, 2.0)})).config == B


def test_where_a_tile_takes_more_rows_than_there_are_the_slowest_stands_for_it():
    """64 rows of 16: at 16 rows the tile counts as 4 µs."""
    assert not is_legal(TILE, replace(NARROW, rows=16), H100)
    other = Config.of("multi_row", rows_per_program=8, num_warps=4)
    slow = Config.of("multi_row", rows_per_program=2, num_warps=1)
    times = {other: (2.0, 2.0, 2.0), slow: (4.0, 9.0, 9.0)}
    assert winner(races({**times, TILE: (None, 1.3, 1.3)}, NARROW)).config == TILE  # (4 · 1.3²)^(1/3) = 1.9
    assert winner(races({**times, TILE: (None, 1.5, 1.5)}, NARROW)).config == other  # (4 · 1.5²)^(1/3) = 2.1


def test_what_serves_few_rows_alone_is_out():
    wide = replace(PROBLEM, cols=32_768)
    cluster = next(config for config in candidates(replace(wide, rows=16), H100) if config.variant == "cluster_row")
    split = next(config for config in candidates(wide, H100) if config.variant == "split_row")
    assert winner(races({cluster: (1.0, None, None), split: (2.0, 2.0, 2.0)}, wide)).config == split


def test_one_number_of_rows_other_layouts_and_gradients_give_none():
    assert invariant_trials(H100, [trial(PROBLEM, A, 1.0)]) == []
    assert invariant_trials(H100, races({A: (1.0, 1.0, 1.0)}, replace(PROBLEM, layout="two_stride"))) == []
    backward = next(iter(candidates(replace(PROBLEM, op=BACKWARD), H100)))
    assert invariant_trials(H100, races({backward: (1.0, 1.0, 1.0)}, replace(PROBLEM, op=BACKWARD))) == []


def test_the_same_trials_give_the_same_and_what_was_derived_counts_for_nothing():
    trials = races({A: (1.0, 1.0, 30.0), B: (1.5, 1.5, 10.0), C: (9.0, 9.0, 9.0)})
    derived = invariant_trials(H100, trials)
    assert invariant_trials(H100, [*reversed(trials), *derived]) == derived
    assert derive_record(derived) == winner(trials)
    assert len({one.uid for one in derived}) == 3


def test_the_record_is_what_the_ladder_answers_for_any_rows_and_for_no_other():
    records = invariant_records(H100, races({A: (1.0, 1.0, 30.0), B: (1.5, 1.5, 10.0)}))
    index = RecordIndex([("", [H100], records)])
    pick = pick_config(replace(PROBLEM, rows=ANY_ROWS), H100, index=index)
    assert (pick.tier, pick.config) == (Tier.EXACT, B)
    near = pick_config(replace(PROBLEM, rows=ANY_ROWS, cols=PROBLEM.cols * 17 // 16), H100, index=index)
    assert (near.tier, near.config) == (Tier.NEAREST_COLS, B)
    usual = pick_config(PROBLEM, H100, index=index)
    assert (usual.tier, usual.config) == (Tier.HEURISTIC, heuristic_config(PROBLEM, H100))


def nest(rows, cols, inner_rows=0):
    if not inner_rows:
        return Geometry("contiguous", rows, cols, 0, 0, cols, 1, 0, cols, 1)
    return Geometry("two_stride", rows, cols, inner_rows, 3 * inner_rows * cols, cols, 1, inner_rows * cols, cols, 1)


@pytest.mark.parametrize(
    ("rows", "inner_rows", "expected"),
    [
        (100_000, 0, [(0, 32_768), (32_768, 32_768), (65_536, 32_768), (98_304, 1696)]),
        (90_000, 30_000, [(0, 30_000), (30_000, 30_000), (60_000, 30_000)]),
        (70_000, 10_000, [(0, 30_000), (30_000, 30_000), (60_000, 10_000)]),
        (80_000, 40_000, [(0, 32_768), (32_768, 7232), (40_000, 32_768), (72_768, 7232)]),
    ],
)
def test_strips(rows, inner_rows, expected):
    assert list(strips.strips(nest(rows, 64, inner_rows))) == expected
    assert STRIP_ROWS == 32_768


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is launched here runs in the interpreter")
@pytest.mark.parametrize("inner_rows", [None, 2, 7], ids=["one stride", "several groups a strip", "several strips a group"])
def test_strip_by_strip_every_row_is_normalised_once(monkeypatch, inner_rows):
    """14 rows, at most 4 or 5 of them at once, with the bits of a launch that takes them all."""
    monkeypatch.setattr(strips, "STRIP_ROWS", 5)
    monkeypatch.setattr(strips, "is_legal", lambda config, problem, device: False)
    qkv = random_x((14, 96) if inner_rows is None else (14 // inner_rows, 3, inner_rows, 96), torch.float32)
    x = qkv if inner_rows is None else qkv[:, 0]
    weight = random_weight(96, torch.float32)
    config = min(space("whole_row"), key=str)
    dtypes = ("float32", "float32", "float32")
    y = torch.full_like(x, torch.nan)
    geometry = geometry_of(x.shape, x.stride(), y.stride(), x.dim() - 1)
    launched = []
    built = strips.build_launcher

    def build(config, geometry, *rest, **modes):
        launched.append(geometry.rows)
        return built(config, geometry, *rest, **modes)

    monkeypatch.setattr(strips, "build_launcher", build)
    launch = strips.build_invariant_launcher(config, geometry, dtypes, -1)
    assert launch(y, x, weight, 1e-6) is y
    assert_rmsnorm(y, x, weight)
    assert torch.equal(y, built(config, geometry, dtypes, -1)(None, x, weight, 1e-6))
    assert max(launched) <= 5
