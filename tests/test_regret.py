"""`python -m tuner regret`: losses of made-up trials, computed by hand, and what the command prints."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from kernels.heuristic import heuristic_config
from kernels.variants import VARIANTS, candidates
from tuner.cli import main
from tuner.regret import PICKERS, Regret, groups, regrets, summary, worst
from tuning_db.model import Config, Device, Measurement, Problem, Resources, Role, Status, Sweep, Trial
from tuning_db.store import open_for_reading, open_for_writing

H100 = Device("sm_90", 132, 50 * 2**20, 227 * 2**10, 3352, name="H100")
SWEEP = Sweep("s", H100.uid, "2026", "", "host", '["sweep"]', "finished", "3.6.0", "2.11.0")
PROBLEM = Problem("rmsnorm", "bfloat16", "bfloat16", "bfloat16", 4096, 8192)
OTHER = replace(PROBLEM, rows=5120)
GUESS = heuristic_config(PROBLEM, H100)
A, B, C = [config for config in candidates(PROBLEM, H100) if config.variant == "looped"][:3]
LEAN = Resources(registers=32, spill_bytes=0, shared_bytes=0)
GREEDY = Resources(registers=255, spill_bytes=0, shared_bytes=0)


def trial(problem: Problem, config: Config, us: float, race: str = "race", **changes: object) -> Trial:
    """A trial of an elimination race, its interval of no account."""
    made = Trial(
        uid=f"{problem} {config} {race} {changes.get('final')}",
        sweep_uid="s",
        race_uid=race,
        device_uid=H100.uid,
        problem=problem,
        config=config,
        role=Role.CANDIDATE,
        status=Status.OK,
        final=False,
        created_at="2026-01-02",
        revision=VARIANTS[config.variant].REVISION,
        source_hash="",
        triton_version="3.6.0",
        torch_version="2.11.0",
        measurement=Measurement("graph", us, us, us, 0.9, 9),
    )
    return replace(made, **changes)


def race_of(problem: Problem, times_us: Mapping[Config, float], winner: Config, resources: Mapping[Config, Resources]) -> list[Trial]:
    """An elimination race, and a final one in which only the winner ran, 3 µs faster than ever before."""
    eliminated = [trial(problem, config, us, f"race {problem}", resources=resources.get(config)) for config, us in times_us.items()]
    return [*eliminated, trial(problem, winner, times_us[winner] - 3, f"race {problem}", final=True)]


def stored(path: Path, trials: Sequence[Trial]) -> Path:
    with open_for_writing(path) as store:
        store.add_device(H100)
        store.add_sweep(SWEEP)
        store.add_trials(trials)
    return path


def losses(path: Path) -> dict[Problem, dict[str, float | None]]:
    with open_for_reading(path) as store:
        cells = regrets(store, H100, lambda problem: True)
    return {cell.problem: {picker: cell.loss(picker) for picker in PICKERS} for cell in cells}


TRIALS = (
    # The problem's fastest is A. The heuristic takes 12 µs, B, the winner of the only neighbour, 15, the model's C 11.
    *race_of(PROBLEM, {A: 10.0, GUESS: 12.0, B: 15.0, C: 11.0}, A, {A: GREEDY, C: LEAN}),
    # Over both rows A and B take the square root of 300 µs, and A has fewer warps.
    # There B is fastest. The neighbour's winner, A, takes 50 % longer; what the heuristic wants was not measured, no resources were kept.
    *race_of(OTHER, {A: 30.0, B: 20.0}, B, {}),
)


def test_losses_by_hand(tmp_path: Path) -> None:
    found = losses(stored(tmp_path / "a.sqlite", TRIALS))
    assert found[PROBLEM] == pytest.approx({"heuristic": 0.2, "nearest": 0.5, "model": 0.1, "invariant": 0.0})
    assert found[OTHER] == {"heuristic": None, "nearest": pytest.approx(0.5), "model": None, "invariant": pytest.approx(0.5)}


@pytest.mark.parametrize(
    "faster",
    [
        trial(PROBLEM, B, 1.0, "an older race", created_at="2026-01-01"),
        trial(PROBLEM, B, 1.0, "a model's", measurement=Measurement("model-1", 1.0, 1.0, 1.0, 0.9, 0), created_at="2026-01-03"),
        trial(PROBLEM, B, 1.0, f"race {PROBLEM}", final=True, created_at="2026-01-01"),
        trial(PROBLEM, B, 1.0, "another revision", revision=0, created_at="2026-01-03"),
        trial(PROBLEM, B, 1.0, "wrong", status=Status.WRONG, created_at="2026-01-03"),
    ],
    ids=lambda made: made.race_uid,
)
def test_only_the_newest_elimination_race_counts(tmp_path: Path, faster: Trial) -> None:
    found = losses(stored(tmp_path / "a.sqlite", [*TRIALS, faster]))
    assert found[PROBLEM]["heuristic"] == pytest.approx(0.2)


def cells(*percent: float | None) -> list[Regret]:
    """Problems of 1, 2, … columns on which the heuristic loses so many per cent."""
    made = []
    for cols, loss in enumerate(percent, 1):
        times_us = {} if loss is None else {"heuristic": 10 * (1 + loss / 100)}
        made.append(Regret(replace(PROBLEM, cols=cols), A, 10.0, {"heuristic": B}, times_us))
    return made


def test_summary_by_hand() -> None:
    known = summary(cells(0.0, 21.0, None), "heuristic")
    assert (known.problems, known.timed) == (3, 2)
    assert (known.mean, known.p95) == (pytest.approx(0.1), pytest.approx(0.21))  # sqrt(1 · 1.21) = 1.1
    assert summary(cells(*range(1, 21)), "heuristic").p95 == pytest.approx(0.19)  # 19 of 20 are 95 %
    assert summary(cells(*range(1, 22)), "heuristic").p95 == pytest.approx(0.20)  # 19 of 21 are not
    assert summary(cells(None), "heuristic").mean is None


def test_worst_first() -> None:
    assert [(loss, cell.problem.cols) for loss, cell in worst(cells(1.0, 3.0, None, 2.0), "heuristic", 2)] == [
        (pytest.approx(0.03), 2),
        (pytest.approx(0.02), 4),
    ]


@pytest.mark.parametrize(
    ("rows", "cols", "region"),
    [(1, 1, "1-16 x 1-1024"), (16, 1025, "1-16 x 1025-8192"), (17, 32768, "17-256 x 8193-32768"), (4097, 32769, "4097- x 32769-")],
)
def test_regions(rows: int, cols: int, region: str) -> None:
    assert Regret(replace(PROBLEM, rows=rows, cols=cols), A, 1.0, {}, {}).region == region


def test_groups_hold_every_problem_once() -> None:
    some = cells(*[1.0] * 2000)
    for own in groups(some).values():
        assert sorted(cell.problem for group in own.values() for cell in group) == [cell.problem for cell in some]
    assert list(groups(some)["rows x cols"]) == ["257-4096 x 1-1024", "257-4096 x 1025-8192"]


def invoke(*arguments: str, columns: int = 80) -> str:
    result = CliRunner().invoke(main, ["regret", *arguments], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("columns", [80, 160])
def test_the_command_prints_what_fits(tmp_path: Path, columns: int) -> None:
    output = invoke("--db", str(stored(tmp_path / "a.sqlite", TRIALS)), columns=columns)
    lines = output.splitlines()
    assert max(map(len, lines)) <= columns
    (row,) = (line for line in lines if line.split()[:1] == ["all"])
    assert row.split() == ["all", "2", "20.0", "20.0", "50.0", "50.0", "10.0", "10.0", "22.5", "50.0"]
    assert "heuristic: 1 of 2 problems have no time of its pick." in lines
    assert "Worst picks: nearest" in [line.strip() for line in lines]


def test_the_command_says_where_the_model_is_skipped(tmp_path: Path) -> None:
    output = invoke("--db", str(stored(tmp_path / "a.sqlite", [replace(made, resources=None) for made in TRIALS])), columns=400)
    assert "model: skipped" in output
    assert "Worst picks: model" not in output


def test_json(tmp_path: Path) -> None:
    (device,) = json.loads(invoke("--db", str(stored(tmp_path / "a.sqlite", TRIALS)), "--json"))["devices"]
    assert device["device_uid"] == H100.uid
    assert device["pickers"]["nearest"] == {"problems": 2, "timed": 2, "mean": pytest.approx(0.5), "p95": pytest.approx(0.5)}
    assert device["problems"][1]["picks"]["heuristic"]["loss"] is None
    assert device["problems"][0]["best"] == {"variant": "looped", "params": A.params, "median_us": 10.0}


def test_nothing_measured_is_an_error_that_names_the_cure(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.sqlite", TRIALS)
    result = CliRunner().invoke(main, ["regret", "--db", str(path), "--dtype", "fp32"])
    assert (result.exit_code, "--dtype float32: sweep" in result.output) == (1, True)
