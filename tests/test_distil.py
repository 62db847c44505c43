"""`python -m tuner distil`: covers of made-up trials, known by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_regret import H100, OTHER, PROBLEM, A, B, C, race_of, stored, trial

from kernels.variants import VARIANTS, space
from tuner.cli import main
from tuner.distil import Chosen, cover, near_best
from tuning_db.model import Config, Status


def test_near_is_within_the_slack_of_the_fastest() -> None:
    trials = race_of(PROBLEM, {A: 10.0, B: 10.2, C: 10.3}, A, {})
    assert near_best(H100, trials, 0.02) == {(H100.uid, PROBLEM): {A, B}}
    assert near_best(H100, trials, 0.0) == {(H100.uid, PROBLEM): {A}}


def test_pytorch_and_what_failed_cover_nothing() -> None:
    torch = replace(trial(PROBLEM, A, 5.0), config=Config.of("torch"), revision=0, uid="torch")
    wrong = trial(PROBLEM, B, 5.0, status=Status.WRONG, uid="wrong")
    assert near_best(H100, [torch, wrong, trial(PROBLEM, A, 10.0)], 0.02) == {(H100.uid, PROBLEM): {A}}


def case(number: int) -> tuple[str, object]:
    return ("device", number)


def test_one_that_does_for_all_is_enough() -> None:
    assert cover({case(1): {A, B}, case(2): {B, C}, case(3): {B}}) == [Chosen(B, 3, 3)]


def test_what_later_choices_make_superfluous_is_left_out() -> None:
    """A covers four of six and is taken first; of the rest B and C cover one each, and together they cover what A does."""
    near = {case(1): {A, B}, case(2): {A, B}, case(3): {A, C}, case(4): {A, C}, case(5): {B}, case(6): {C}}
    assert {one.config for one in cover(near)} == {B, C}
    assert sum(one.newly for one in cover(near)) == 6


def test_every_case_has_one_and_none_can_go() -> None:
    configs = sorted(space("split_row"), key=str)
    near = {case(i): {configs[i % 7], configs[i % 5], configs[i % 3]} for i in range(60)}
    chosen = {one.config for one in cover(near)}
    assert all(chosen & own for own in near.values())
    for config in chosen:
        assert not all((chosen - {config}) & own for own in near.values())


@pytest.mark.parametrize("columns", [80, 160])
def test_the_command(tmp_path: Path, columns: int) -> None:
    path = stored(tmp_path / "a.sqlite", [*race_of(PROBLEM, {A: 10.0, B: 10.1}, A, {}), *race_of(OTHER, {A: 30.0, B: 20.0}, B, {})])
    result = CliRunner().invoke(main, ["distil", "--db", str(path)], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.output
    total = sum(len(space(name)) for name in VARIANTS)
    assert f"1 config of {total} keep 2 measured problems within 2 % of the fastest;" in " ".join(result.output.split())
    assert max(map(len, result.output.splitlines())) <= columns
    plain = json.loads(CliRunner().invoke(main, ["distil", "--db", str(path), "--json", "--slack", "0"]).output)
    assert {tuple(one["params"].items()) for one in plain["configs"]} == {tuple(A.params.items()), tuple(B.params.items())}


def test_nothing_measured_is_an_error(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.sqlite", race_of(PROBLEM, {A: 10.0}, A, {}))
    result = CliRunner().invoke(main, ["distil", "--db", str(path), "--dtype", "fp32"])
    assert (result.exit_code, "--dtype float32: sweep" in result.output) == (1, True)
