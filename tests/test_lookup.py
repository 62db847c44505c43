"""The ladder: properties over random databases, and its order by hand."""

import math
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning_db.lookup import REACH, Pick, RecordIndex, choose, problem_distance
from tuning_db.model import Config, Device, Problem, Record, Source, Tier, itemsize

HERE = Device("sm_90", 132, 50 * 2**20, 227 * 2**10, 3352)
NEAR = Device("sm_90", 114, 50 * 2**20, 227 * 2**10, 2039)
FAR = Device("sm_90", 100, 8 * 2**20, 227 * 2**10, 500)
ELSEWHERE = Device("gfx942", 304, 4 * 2**20, 64 * 2**10, 5300, 64)
DEVICES = [HERE, NEAR, FAR, ELSEWHERE]
PROBLEM = Problem("rmsnorm", "bfloat16", "bfloat16", "bfloat16", 64, 4096)
GUESS = Config.of("whole_row", num_warps=4)


def make_record(problem: Problem = PROBLEM, device: Device = HERE, name: str = "a", **changes: object) -> Record:
    """A record whose config is named after it; source_hash `new` is fresh, revision 1 usable."""
    times = {"median_us": 2.0, "low_us": 1.0, "high_us": 3.0, "copy_fraction": 0.5, "heuristic_us": None, "torch_us": None}
    code = {"revision": 1, "source_hash": "new", "triton_version": "", "torch_version": "", "created_at": "", "trial_uid": name}
    record = Record(device.uid, problem, Config.of(name), Source.MEASURED, "graph", **times, **code)
    return replace(record, **changes)


def pick(layers: list, problem: Problem = PROBLEM, guess: Config | None = GUESS, override: Config | None = None) -> Pick:
    index = RecordIndex([(name, DEVICES, records) for name, records in layers])
    return choose(problem, HERE, index, usable=usable, fresh=fresh, heuristic=lambda *_: guess, override=override)


def usable(record: Record) -> bool:
    return record.revision == 1


def fresh(record: Record) -> bool:
    return record.source_hash == "new"


problems = st.builds(
    Problem,
    op=st.sampled_from(["rmsnorm", "add_rmsnorm"]),
    x_dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    w_dtype=st.sampled_from(["bfloat16", "none"]),
    y_dtype=st.just("bfloat16"),
    rows=st.sampled_from([1, 16, 64, 80, 96]),
    cols=st.sampled_from([1024, 4096, 4352]),
    layout=st.sampled_from(["contiguous", "strided_axis"]),
    inner_rows=st.sampled_from([1, 8]),
)
records = st.builds(
    make_record,
    problem=st.one_of(problems, problems.map(lambda p: replace(p, op="rmsnorm", x_dtype="bfloat16", layout="contiguous"))),
    device=st.sampled_from(DEVICES),
    name=st.uuids().map(str),
    source=st.sampled_from([Source.MEASURED, Source.MEASURED, Source.MODELLED]),
    revision=st.sampled_from([1, 1, 2]),
    source_hash=st.sampled_from(["new", "old"]),
)
layer_records = st.lists(records, max_size=25, unique_by=lambda record: (record.device_uid, record.source, record.problem))
databases = st.tuples(layer_records, layer_records).map(lambda pair: [("user", pair[0]), ("shipped", pair[1])])


@given(databases, problems)
def test_a_record_picked_is_usable_and_related(layers: list, problem: Problem) -> None:
    found = pick(layers, problem)
    if found.record is None:
        assert found == Pick(GUESS, Tier.HEURISTIC)
        return
    assert usable(found.record)
    assert found.config == found.record.config
    assert found.record in dict(layers)[found.layer]
    near = found.record.problem
    assert (near.op, near.layout, itemsize(near.x_dtype)) == (problem.op, problem.layout, itemsize(problem.x_dtype))
    assert found.record.device_uid != ELSEWHERE.uid
    assert (found.record.source is Source.MODELLED) == (found.tier is Tier.MODELLED)
    if found.tier is Tier.NEAREST_ROWS:
        assert of_one_width(replace(near, rows=problem.rows)) == of_one_width(problem)


def of_one_width(problem: Problem) -> Problem:
    """float16 counts as bfloat16."""
    dtypes = {name: getattr(problem, name).replace("bfloat16", "float16") for name in ("x_dtype", "w_dtype", "y_dtype")}
    return replace(problem, **dtypes)


@given(databases, problems)
def test_exact_beats_everything(layers: list, problem: Problem) -> None:
    exact = [r for _, rs in layers for r in rs if (r.device_uid, r.problem, r.source) == (HERE.uid, problem, Source.MEASURED)]
    found = pick(layers, problem)
    assert (found.tier is Tier.EXACT) == any(usable(record) for record in exact)
    mine = make_record(problem, name="mine")
    assert pick([("first", [mine]), *layers], problem) == Pick(mine.config, Tier.EXACT, "first", mine)


@given(databases, problems)
def test_nearest_is_nearest_by_brute_force(layers: list, problem: Problem) -> None:
    """The ladder restated as one sort over all records within reach."""

    def rank(record: Record, layer: int) -> tuple:
        device = next(device for device in DEVICES if device.uid == record.device_uid)
        other = record.problem
        same_rows = replace(other, rows=problem.rows)
        step = 0 if other == problem else 1 if of_one_width(same_rows) == of_one_width(problem) else 2
        apart = (device is not HERE, HERE.distance(device), device.uid)
        return (
            record.source is Source.MODELLED,
            *apart,
            step,
            problem_distance(problem, other),
            step == 1 and same_rows != problem,
            -other.rows,
            other,
            not fresh(record),
            layer,
        )

    def related(a: Problem) -> bool:
        alike = (a.op, a.layout, itemsize(a.x_dtype)) == (problem.op, problem.layout, itemsize(problem.x_dtype))
        return alike and problem_distance(problem, a) <= REACH

    ranked = [
        (rank(record, layer), record)
        for layer, (_, layer_rows) in enumerate(layers)
        for record in layer_rows
        if usable(record) and record.device_uid != ELSEWHERE.uid and related(record.problem)
    ]
    expected = min(ranked, key=lambda pair: pair[0])[1] if ranked else None
    assert pick(layers, problem).record == expected


@given(databases, problems)
@settings(max_examples=50)
def test_without_the_record_picked_no_better_tier_is_found(layers: list, problem: Problem) -> None:
    found = pick(layers, problem)
    while found.record is not None:
        layers = [(name, [record for record in rows if record is not found.record]) for name, rows in layers]
        following = pick(layers, problem)
        assert following.tier >= found.tier
        found = following
    assert found.tier is Tier.HEURISTIC


@given(databases, problems, st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter(layers: list, problem: Problem, random: object) -> None:
    shuffled = [(name, random.sample(rows, len(rows))) for name, rows in layers]
    assert pick(shuffled, problem) == pick(layers, problem)


def test_fresh_beats_stale_before_the_layers_order_counts() -> None:
    stale, late, later = make_record(name="stale", source_hash="old"), make_record(name="late"), make_record(name="later")
    assert pick([("user", [stale]), ("shipped", [late])]).record is late
    assert pick([("user", [late]), ("shipped", [later])]).layer == "user"
    assert pick([("user", [stale]), ("shipped", [replace(late, source_hash="old")])]).record is stale
    assert pick([("user", [stale]), ("shipped", [make_record(replace(PROBLEM, rows=96))])]).record is stale  # exact, if stale


def test_float16_and_bfloat16_serve_each_other() -> None:
    """As the same bytes that they are: after the dtypes asked for, before another number of rows."""
    half = replace(PROBLEM, x_dtype="float16", w_dtype="float16", y_dtype="float16")
    at_rows, next_rows = make_record(half, name="same rows"), make_record(replace(PROBLEM, rows=80), name="more rows")
    found = pick([("user", [at_rows, next_rows])])
    assert (found.tier, found.record, found.distance) == (Tier.NEAREST_ROWS, at_rows, 0.0)
    twin = make_record(replace(half, rows=80), name="half")
    assert pick([("user", [twin, next_rows])]).record == next_rows


def test_the_ladder_step_by_step() -> None:
    steps = [
        (Tier.EXACT, make_record(name="exact"), 0.0),
        (Tier.NEAREST_ROWS, make_record(replace(PROBLEM, rows=48), name="rows"), math.log2(64 / 48)),
        (Tier.NEAREST_COLS, make_record(replace(PROBLEM, cols=4352), name="cols"), 4 * math.log2(4352 / 4096)),
        (Tier.NEAREST_COLS, make_record(replace(PROBLEM, w_dtype="float32"), name="dtype"), 0.5),
        (Tier.NEAREST_DEVICE, make_record(device=NEAR, name="near"), HERE.distance(NEAR)),
        (Tier.NEAREST_DEVICE, make_record(device=FAR, name="far"), HERE.distance(FAR)),
        (Tier.MODELLED, make_record(name="model", source=Source.MODELLED), 0.0),
        (Tier.MODELLED, make_record(name="model far", device=FAR, source=Source.MODELLED), HERE.distance(FAR)),
    ]
    others = ({"op": "add"}, {"layout": "two_stride"}, {"x_dtype": "float32"}, {"rows": 96}, {"cols": 4608})
    forbidden = [make_record(replace(PROBLEM, **other)) for other in others]
    for at, (tier, record, distance) in enumerate(steps):
        found = pick([("user", [step[1] for step in steps[at:]] + forbidden)])
        assert (found.tier, found.record, found.distance) == (tier, record, pytest.approx(distance))
    assert pick([("user", forbidden)]) == Pick(GUESS, Tier.HEURISTIC)
    assert pick([("user", forbidden)], guess=None) == Pick(Config.of("torch"), Tier.TORCH)
    assert pick([("user", [make_record()])], override=GUESS) == Pick(GUESS, Tier.OVERRIDE)


def test_equally_near_rows_go_to_the_larger() -> None:
    asked = replace(PROBLEM, rows=60)  # 72 / 60 = 60 / 50
    layers = [("user", [make_record(replace(PROBLEM, rows=rows)) for rows in (50, 72)])]
    assert pick(layers, asked).record.problem.rows == 72
    cols = [("user", [make_record(replace(PROBLEM, rows=rows, cols=4128)) for rows in (72, 50)])]
    assert pick(cols, asked).record.problem.rows == 72


def test_pytorch_wins_is_an_answer() -> None:
    assert pick([("user", [make_record(name="torch")])]) == Pick(Config.of("torch"), Tier.EXACT, "user", make_record(name="torch"))


def test_newer_of_two_records_of_one_problem_in_one_layer() -> None:
    old, new = make_record(name="old", created_at="2024"), make_record(name="new", created_at="2025")
    assert pick([("user", [old, new])]).record == pick([("user", [new, old])]).record == new


def test_choose_looks_at_few_of_many_records() -> None:
    """Counted, not timed: of 6,000 records a near miss asks about a handful."""
    cols = [256 * step for step in range(1, 61)]
    grid = [make_record(replace(PROBLEM, x_dtype=d, rows=2**r, cols=c)) for d in ("bfloat16", "float16") for r in range(50) for c in cols]
    index = RecordIndex([("user", [HERE], grid)])
    asked: list[Record] = []

    def usable_here(record: Record) -> bool:
        asked.append(record)
        return record.problem.cols >= 4096

    def ask(problem: Problem) -> Pick:
        return choose(problem, HERE, index, usable=usable_here, fresh=fresh, heuristic=lambda *_: None)

    assert ask(replace(PROBLEM, cols=4100)).record.problem == PROBLEM
    assert len(asked) == 1
    start = time.perf_counter()
    for rows in range(1, 201):
        ask(replace(PROBLEM, rows=rows))
    assert (time.perf_counter() - start) / 200 < 0.002  # seconds; a scan of the grid takes some 10 ms
