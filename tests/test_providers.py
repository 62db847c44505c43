"""Who is compared: absent, refusing and wrong providers, the tolerance of those that round twice, and rounds under a fake clock."""

from dataclasses import replace

import pytest
import torch

from benchmarks import gpu_time, host
from benchmarks.backward import Backward
from benchmarks.gpu_time import ROUNDS, compare_on, prepared
from benchmarks.paired import compare_versions_on
from benchmarks.peers import PEERS, PROVIDERS
from benchmarks.providers import OURS, PYTORCH, Launch, Provider, Refusal
from kernels.device import current_device
from oracle import DEVICE
from tuner.cases import Case, Tensors
from tuner.measure import Bench
from tuner.race import median_interval
from tuner.verify import UNIT_ROUNDOFF, Verifier, float64_rmsnorm, relative_tolerance
from tuning_db.model import ADD_BACKWARD, ADD_FORWARD, BACKWARD, Device, Problem

FP16 = Problem("rmsnorm", "float16", "float16", "float16", 4, 256)


def case_of(problem: Problem = FP16) -> Case:
    return Case(problem, DEVICE)


def foreign(launch: Launch, roundings: int = 1) -> Provider:
    return Provider("a test", "no-such-distribution", "json", lambda case, device: launch, roundings=roundings, foreign=True)


def rounding_twice(tensors: Tensors) -> torch.Tensor:
    """x · rstd rounded to x's dtype, then times the weight."""
    assert tensors.weight is not None
    normed = float64_rmsnorm(tensors.x, None, 1e-6, -1).to(tensors.x.dtype)
    return (normed.double() * tensors.weight.double()).to(tensors.x.dtype)


def raising(error: Exception) -> Launch:
    def launch(_: Tensors) -> torch.Tensor:
        raise error

    return launch


@pytest.mark.parametrize("name", [*OURS, *PYTORCH])
def test_ours_and_pytorch_are_right_by_the_strict_tolerance(name: str) -> None:
    if name == "compile" and DEVICE.type == "cpu":
        pytest.skip("torch.compile for the CPU needs a C++ compiler")
    case = case_of()
    provider = PROVIDERS[name]
    assert provider.absence() == ""
    assert provider.roundings == 1
    assert prepared(provider, case, current_device(), Verifier(case))[1] == ""


OTHER_OPS = [
    *(replace(FP16, op=op) for op in (BACKWARD, ADD_FORWARD, ADD_BACKWARD)),
    *(Problem(op, "float32", "float16", "float16", 4, 256) for op in (ADD_FORWARD, ADD_BACKWARD)),
]


@pytest.mark.parametrize("problem", OTHER_OPS, ids=str)
@pytest.mark.parametrize("name", [*OURS, "eager"])
def test_ours_and_pytorch_are_right_in_the_other_ops(name: str, problem: Problem) -> None:
    case = case_of(problem)
    assert prepared(PROVIDERS[name], case, current_device(), Verifier(case))[1] == ""


def test_a_backward_runs_again_and_again_on_the_tensors_it_was_given() -> None:
    case = case_of(replace(FP16, op=ADD_BACKWARD))
    (first, second) = case.sets(2, seed=1)
    launch, _ = prepared(PROVIDERS["tuned"], case, current_device(), Verifier(case))
    assert isinstance(launch, Backward)
    launch.save(first)
    launch.save(second)
    once, other, again = launch(first), launch(second), launch(first)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True) if a is not None and b is not None)
    assert once[0] is not None
    assert other[0] is not None
    assert not torch.equal(once[0], other[0])
    launch.forget()
    with pytest.raises(KeyError):
        launch(first)


@pytest.mark.parametrize("problem", OTHER_OPS, ids=str)
def test_a_wrong_result_of_another_op_is_found(problem: Problem) -> None:
    """The last result, one element off by a hundredth of the largest."""
    case = case_of(problem)
    right = PROVIDERS["tuned"].serving(problem.op)

    def prepare(case: Case, device: Device) -> Launch:
        launch = right.prepare(case, device)

        def wrong(tensors: Tensors) -> tuple[torch.Tensor | None, ...]:
            if isinstance(launch, Backward):
                launch.save(tensors)
            results = [None if result is None else result.clone() for result in launch(tensors)]
            last = next(result for result in reversed(results) if result is not None)
            last.view(-1)[7] += last.abs().max() * 0.01
            return tuple(results)

        return wrong

    assert (
        "× the tolerance"
        in prepared(
            replace(foreign(lambda _: None), prepare=prepare).also({problem.op: ("", prepare, 1)}), case, current_device(), Verifier(case)
        )[1]
    )


@pytest.mark.parametrize("name", ["flashinfer", "flaggems"])
def test_who_has_no_such_op_refuses(name: str) -> None:
    case = case_of(replace(FP16, op=BACKWARD))
    with pytest.raises(Refusal, match="has no rmsnorm_backward here"):
        prepared(PROVIDERS[name], case, current_device(), Verifier(case))


@pytest.mark.parametrize("problem", OTHER_OPS, ids=str)
def test_liger_needs_a_weight_in_every_op(problem: Problem) -> None:
    case = case_of(replace(problem, w_dtype="none"))
    with pytest.raises(Refusal, match="needs a weight"):
        prepared(PROVIDERS["liger"], case, current_device(), Verifier(case))


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
def test_two_roundings_are_within_two_units_and_seen_as_too_much_by_one(dtype: str) -> None:
    case = Case(Problem("rmsnorm", dtype, dtype, dtype, 64, 512), DEVICE)
    assert prepared(foreign(rounding_twice, roundings=2), case, current_device(), Verifier(case))[1] == ""
    assert (1 + UNIT_ROUNDOFF[dtype]) ** 2 - 1 <= relative_tolerance(dtype, 2)
    if dtype != "float32":  # there 256 steps of fp32 are more than a unit
        assert "× the tolerance" in prepared(foreign(rounding_twice), case, current_device(), Verifier(case))[1]


def test_a_third_rounding_is_too_much_for_two() -> None:
    case = Case(Problem("rmsnorm", "bfloat16", "bfloat16", "bfloat16", 64, 512), DEVICE)

    def launch(tensors: Tensors) -> torch.Tensor:
        return (rounding_twice(tensors).float() * (1 + 2.0**-7)).to(tensors.x.dtype)

    assert "× the tolerance" in prepared(foreign(launch, roundings=2), case, current_device(), Verifier(case))[1]


@pytest.mark.parametrize("error", [RuntimeError("n exceeds 65536\nsecond line"), AssertionError(), ValueError("no"), TypeError("no")])
def test_an_error_of_foreign_code_is_a_refusal(error: Exception) -> None:
    case = case_of()
    with pytest.raises(Refusal, match=str(error).partition("\n")[0] or type(error).__name__) as caught:
        prepared(foreign(raising(error)), case, current_device(), Verifier(case))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), torch.AcceleratorError("an illegal memory access"), KeyError("x")])
def test_a_broken_gpu_or_a_bug_is_none(error: Exception) -> None:
    case = case_of()
    with pytest.raises(type(error)):
        prepared(foreign(raising(error)), case, current_device(), Verifier(case))
    with pytest.raises(RuntimeError):
        prepared(replace(foreign(raising(RuntimeError("ours"))), foreign=False), case, current_device(), Verifier(case))


@pytest.mark.parametrize("name", PEERS)
def test_peers_refuse_what_they_do_not_serve_before_they_are_imported(name: str) -> None:
    strided = Case(Problem("rmsnorm", "bfloat16", "bfloat16", "bfloat16", 64, 64, "strided_axis", 16), DEVICE)
    with pytest.raises(Refusal, match="last axis"):
        PEERS[name].prepare(strided, current_device())
    if name != "quack":
        with pytest.raises(Refusal, match="weight"):
            PEERS[name].prepare(Case(replace(FP16, w_dtype="none"), DEVICE), current_device())


def test_who_is_absent_is_said_so() -> None:
    nobody = Provider("nothing", "no-such-distribution", "no_such_module", lambda case, device: raising(KeyError()))
    assert nobody.absence() == "no-such-distribution is not installed"
    assert nobody.version() == "without a version"
    assert PROVIDERS["eager"].version() in (torch.__version__, torch.__version__.partition("+")[0])  # PyPI's wheels leave +cu130 out


FAKE_US = {"reference": 8.0, "tuned": 10.0, "eager": 20.0, "now": 10.5, "then": 10.0}


class FakeBench:
    """A clock on which each name has its own time."""

    rounds = Bench.rounds

    def __init__(self, case: Case, device: object, seed: int) -> None:
        self.entered: list[str] = []

    def enter(self, name: str, launch: Launch, before: Launch | None = None) -> None:
        self.entered.append(name)

    def round(self, order: list[str]) -> dict[str, float]:
        assert set(order) <= set(self.entered)
        return {name: FAKE_US[name] for name in ("reference", *order)}


@pytest.fixture
def _fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_time, "Bench", FakeBench)


@pytest.mark.usefixtures("_fake_clock")
def test_only_who_is_right_is_timed() -> None:
    providers = {
        "tuned": OURS["tuned"],
        "eager": PYTORCH["eager"],
        "liger": foreign(raising(RuntimeError("too wide"))),
        "quack": foreign(lambda tensors: tensors.x.clone()),
    }
    result = compare_on(case_of(), current_device(), providers)
    assert set(result.timings) == {"tuned", "eager"}
    assert result.refused == {"liger": "too wide"}
    assert set(result.wrong) == {"quack"}
    assert result.timings["tuned"].fraction == (0.8, 0.8, 0.8)
    assert result.timings["tuned"].rounds == ROUNDS
    assert (result.copy_us, result.problem) == (8.0, FP16)
    assert result.configs["tuned"].split()[0] in ("whole_row", "multi_row", "looped", "split_row")


@pytest.mark.usefixtures("_fake_clock")
def test_two_versions_are_paired() -> None:
    found = compare_versions_on(case_of(), current_device(), OURS["tuned"], PYTORCH["eager"])
    assert found.change is not None
    assert found.change.ratio == pytest.approx((1.05,) * 3)
    assert found.change.extra_us == pytest.approx((0.5,) * 3)
    wrong = foreign(lambda tensors: tensors.x.clone())
    assert set(compare_versions_on(case_of(), current_device(), wrong, wrong).wrong) == {"now", "then"}
    refusing = foreign(raising(TypeError("no such argument")))
    neither = compare_versions_on(case_of(), current_device(), wrong, refusing)
    assert (set(neither.wrong), neither.refused, neither.change) == ({"now"}, "no such argument", None)


def test_the_interval_is_that_of_the_third_and_the_ninth() -> None:
    assert median_interval([float(at) for at in range(ROUNDS)]) == (5.0, 2.0, 8.0)


def test_shapes_in_turn_come_round_and_stay_the_same() -> None:
    rows = host.random_rows()
    assert len(set(rows)) == host.SHAPES_IN_TURN
    assert rows == host.random_rows()
    seen: list[int] = []
    call = host.in_turn(lambda tensors: seen.append(tensors.x) or tensors.x, [Tensors(at, None, at) for at in (1, 2, 3)])  # type: ignore[arg-type]
    for _ in range(5):
        call()
    assert seen == [1, 2, 3, 1, 2]
