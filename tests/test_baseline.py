"""Baselines: what several processes amount to, the file's form, and which file is a board's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import baseline as baselines
from benchmarks.baseline import Baseline, BaselineError, combined, find, joined, path_for, read_baseline, to_text
from benchmarks.check import check_against, record_baseline
from benchmarks.results import CaseResult, Interval, RunResult
from benchmarks.verdict import Verdict
from synthetic import DEVICE, PROBLEMS, PROVENANCE, copy_us, run_result, timing
from tuner.measure import POLICY
from tuning_db.model import Problem

OURS = {"tuned": 1.0}
LARGE = [problem for problem in PROBLEMS if copy_us(problem) > 10.0]


def runs(*factors: float) -> list[RunResult]:
    """One process each, slower by its factor on every problem."""
    return [run_result(slowness=OURS, factors=dict.fromkeys(PROBLEMS, factor)) for factor in factors]


@pytest.fixture
def recorded() -> Baseline:
    return combined("gate", runs(1.0, 1.004, 0.996))


def test_the_spread_is_that_between_processes() -> None:
    made = combined("gate", runs(1.0, 1.01, 1.02, 0.98))
    assert made.processes == 4
    assert [case.problem for case in made.cases] == list(PROBLEMS)
    assert made.cases[0].fraction == pytest.approx((0.97 / 1.005, 0.97 / 1.02, 0.97 / 0.98), rel=1e-4)  # of the middle two the mean


def test_two_processes_are_too_few() -> None:
    with pytest.raises(BaselineError, match="2 processes tell no spread"):
        combined("gate", runs(1.0, 1.0))


def test_a_wrong_result_is_not_recorded() -> None:
    good = runs(1.0, 1.0, 1.0)
    bad = CaseResult(PROBLEMS[0], 1.0, {}, wrong={"tuned": "error is 3 × the tolerance"})
    with pytest.raises(BaselineError, match="error is 3 × the tolerance"):
        combined("gate", [*good[:2], replace(good[2], cases=(bad, *good[2].cases[1:]))])


def test_the_file_has_a_case_a_line_and_comes_back(recorded: Baseline, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text(to_text(recorded))
    back = read_baseline(path)
    assert {case.problem for case in back.cases} == set(PROBLEMS)
    assert to_text(back) == path.read_text()
    assert (back.provenance, back.suites, back.processes) == (PROVENANCE, ("gate",), 3)
    lines = [line for line in path.read_text().splitlines() if line.startswith('{"copy_us"')]
    assert len(lines) == len(PROBLEMS)
    assert [json.loads(line.rstrip(","))["problem"]["cols"] for line in lines] == [case.problem.cols for case in back.cases]


def test_another_suite_joins_a_baseline_and_another_version_begins_anew(recorded: Baseline) -> None:
    few = replace(combined("few", runs(1.1, 1.1, 1.1)), processes=4)
    few = replace(few, cases=few.cases[:2])
    both = joined(recorded, few)
    assert (both.suites, both.processes) == (("gate", "few"), 3)
    assert {case.problem: case for case in both.cases} == {case.problem: case for case in (*recorded.cases, *few.cases)}
    assert joined(both, few).suites == ("gate", "few")
    newer = replace(few, provenance=replace(PROVENANCE, versions={**PROVENANCE.versions, "triton": "99"}))
    assert joined(recorded, newer) == newer


@pytest.mark.parametrize("text", ["", "[]", '{"cases": 1}', '{"cases": [{}]}'])
def test_a_broken_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text(text)
    with pytest.raises(BaselineError, match=r"b\.json is no baseline"):
        read_baseline(path)


def test_the_path_is_made_of_vendor_arch_and_name(tmp_path: Path) -> None:
    assert path_for(DEVICE, tmp_path) == tmp_path / "nvidia" / "sm_90" / "h100-80gb-hbm3.json"
    amd = replace(DEVICE, arch="gfx942", name="AMD Instinct MI300X")
    assert path_for(amd, tmp_path) == tmp_path / "amd" / "gfx942" / "instinct-mi300x.json"
    assert path_for(replace(DEVICE, name=""), tmp_path).name == f"{DEVICE.uid}.json"


def test_a_board_is_known_by_its_fingerprint_not_its_name(recorded: Baseline, tmp_path: Path) -> None:
    path = path_for(DEVICE, tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(to_text(recorded))
    assert path_for(replace(DEVICE, name="NVIDIA H100 (renamed)"), tmp_path) == path
    assert path_for(replace(DEVICE, sm_count=114, name="NVIDIA H100 PCIe"), tmp_path).name == "h100-pcie.json"


def test_find_says_why_there_is_none(recorded: Baseline, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    assert find(DEVICE, POLICY, path) == (None, f"{path} does not exist")
    nobodys = replace(DEVICE, name="NVIDIA H1000", sm_count=7)
    assert find(nobodys, POLICY)[1].startswith("there is none for NVIDIA H1000 (sm_90-7sm-")
    path.write_text(to_text(recorded))
    assert find(DEVICE, POLICY, path)[0] is not None
    assert "was measured by policy" in find(DEVICE, "graph-cold-2", path)[1]
    assert "and this is sm_90-1sm" in find(replace(DEVICE, sm_count=1), POLICY, path)[1]


@pytest.mark.parametrize("path", sorted(baselines.FOLDER.rglob("*.json")), ids=lambda path: path.stem)
def test_what_ships_is_whole_and_where_it_belongs(path: Path) -> None:
    shipped = read_baseline(path)
    assert path_for(shipped.provenance.device) == path
    assert shipped.provenance.policy == POLICY
    assert shipped.processes >= baselines.MIN_PROCESSES
    assert path.read_text(encoding="utf-8") == to_text(shipped)


class Machine:
    """Fresh processes whose kernels take so many times as long, by problem: a dict for each process, the last for all that follow."""

    def __init__(self, *factors: dict[Problem, float]) -> None:
        self.factors, self.asked = factors, []

    def __call__(self, problems: list[Problem]) -> RunResult:
        factors = self.factors[min(len(self.asked), len(self.factors) - 1)]
        self.asked.append(list(problems))
        return run_result(problems, OURS, factors)


said: list[str] = []


def verdicts(recorded: Baseline, machine: Machine) -> dict[Problem, Verdict]:
    return {one.problem: one.verdict for one in check_against(recorded, PROBLEMS, machine, said.append)}


def test_record_asks_as_many_processes() -> None:
    machine = Machine({})
    made = record_baseline("gate", PROBLEMS, 3, machine, said.append)
    assert (made.suites, made.processes, machine.asked) == (("gate",), 3, [list(PROBLEMS)] * 3)


def test_unchanged_code_passes_in_one_process(recorded: Baseline) -> None:
    machine = Machine({})
    assert set(verdicts(recorded, machine).values()) == {Verdict.PASS}
    assert len(machine.asked) == 1


def test_five_percent_slower_is_a_regression_that_a_second_process_confirms(recorded: Baseline) -> None:
    slower = {LARGE[0]: 1.05, LARGE[1]: 1.05}
    machine = Machine(slower)
    found = verdicts(recorded, machine)
    assert {problem for problem, verdict in found.items() if verdict is Verdict.REGRESSION} == set(slower)
    assert machine.asked[1:] == [list(slower)]


def test_a_slow_first_process_alone_passes(recorded: Baseline) -> None:
    assert set(verdicts(recorded, Machine({LARGE[0]: 1.05}, {})).values()) == {Verdict.PASS}


def test_what_the_second_process_leaves_open_is_inconclusive(recorded: Baseline) -> None:
    assert verdicts(recorded, Machine({LARGE[0]: 1.05}, {LARGE[0]: 1.025}))[LARGE[0]] is Verdict.INCONCLUSIVE


def test_faster_is_improved_and_what_was_not_recorded_has_no_baseline(recorded: Baseline) -> None:
    found = verdicts(replace(recorded, cases=recorded.cases[1:]), Machine({LARGE[0]: 0.9}))
    assert found[LARGE[0]] is Verdict.IMPROVED
    assert found[PROBLEMS[0]] is Verdict.NO_BASELINE


def test_a_wrong_result_is_a_regression(recorded: Baseline) -> None:
    wrong = CaseResult(PROBLEMS[0], 1.0, {}, wrong={"tuned": "wrote outside its output"})

    def run(problems: list[Problem]) -> RunResult:
        result = run_result(problems, OURS)
        return replace(result, cases=(wrong, *result.cases[1:]))

    (first, *_) = check_against(recorded, PROBLEMS, run, said.append)
    assert (first.verdict, first.note) == (Verdict.REGRESSION, "its result wrote outside its output")


def test_timing_intervals_are_inside_the_numbers_used_here() -> None:
    """±0.3 % within and ±0.4 % between processes: 5 % is beyond 2 % for sure, 2.5 % is not."""
    assert timing(1.0, 1.0).fraction == Interval(1.0, 0.997, 1.003)
