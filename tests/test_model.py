"""The nouns: bucketing, canonical text, identities and the dict form."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning_db.model import BACKWARD, Config, Device, Problem, Record, Source, bucket_rows, canonical_json, record_from_dict, to_dict

H100 = Device("sm_90", 132, 50 * 2**20, 227 * 2**10, 3352, name="NVIDIA H100 80GB HBM3")
RECORD = Record(
    device_uid=H100.uid,
    problem=Problem("rmsnorm", "bfloat16", "float32", "bfloat16", 4096, 8192),
    config=Config.of("multi_row", rows_per_program=4, num_warps=8, persistent=True),
    source=Source.MEASURED,
    policy="graph-1",
    median_us=51.25,
    low_us=51.0,
    high_us=51.5,
    copy_fraction=0.975,
    heuristic_us=52.0,
    torch_us=None,
    revision=1,
    source_hash="0a1b",
    triton_version="3.6.0",
    torch_version="2.13.0",
    created_at="2025-01-01T00:00:00Z",
    trial_uid="t1",
)


@given(st.integers(1, 2**24))
def test_bucket_is_a_power_of_two_or_three_halves_of_one_and_its_own_bucket(rows: int) -> None:
    bucket = bucket_rows(rows)
    odd = bucket
    while odd % 2 == 0:
        odd //= 2
    assert odd in (1, 3)
    assert bucket_rows(bucket) == bucket


@given(st.integers(1, 2**24))
def test_bucket_is_within_half_the_widest_step(rows: int) -> None:
    """The widest step is 3/2, so no number lies further than sqrt(3/2) off: rows²·2 ≤ bucket²·3 and the reverse, exactly."""
    bucket = bucket_rows(rows)
    assert rows * rows * 2 <= bucket * bucket * 3
    assert bucket * bucket * 2 <= rows * rows * 3


@given(st.integers(1, 2**20), st.integers(1, 2**20))
def test_buckets_keep_the_order_of_rows(a: int, b: int) -> None:
    assert bucket_rows(min(a, b)) <= bucket_rows(max(a, b))


def test_buckets_by_hand() -> None:
    assert [bucket_rows(rows) for rows in (1, 2, 3, 4, 5, 7, 9, 10, 14, 100, 4096, 5000)] == [
        1,
        2,
        3,
        4,
        6,
        8,
        8,
        12,
        16,
        96,
        4096,
        4096,
    ]


@pytest.mark.parametrize("rows", [0, -1])
def test_no_rows_are_an_error(rows: int) -> None:
    with pytest.raises(ValueError, match=f"got {rows}"):
        bucket_rows(rows)


def test_config_is_the_same_whatever_the_order_of_its_params() -> None:
    a = Config.of("multi_row", rows_per_program=4, num_warps=8)
    b = Config.of("multi_row", num_warps=8, rows_per_program=4)
    assert a == b
    assert hash(a) == hash(b)
    assert a.params_json == b.params_json == '{"num_warps":8,"rows_per_program":4}'
    assert str(a) == "multi_row num_warps=8 rows_per_program=4"
    assert a != Config.of("multi_row", num_warps=8, rows_per_program=2)


def test_canonical_json_has_no_infinity() -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"median_us": float("inf")})


@pytest.mark.parametrize("record", [RECORD, replace(RECORD, source=Source.MODELLED, torch_us=60.5, config=Config.of("torch"))])
def test_record_survives_json(record: Record) -> None:
    assert record_from_dict(json.loads(canonical_json(to_dict(record)))) == record


@pytest.mark.parametrize("damage", [{"source": "guessed"}, {"config": {"params": {}}}, {"problem": {"op": "rmsnorm"}}, {"extra": 1}])
def test_a_wrong_dict_is_refused(damage: dict) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        record_from_dict(to_dict(RECORD) | damage)


def test_device_identity_ignores_the_name_alone() -> None:
    renamed = replace(H100, name="H100 SXM5")
    assert (renamed.uid, renamed) == (H100.uid, H100)
    for change in (
        {"arch": "sm_80"},
        {"sm_count": 114},
        {"l2_bytes": 40 * 2**20},
        {"shared_bytes": 2**16},
        {"bandwidth_gbs": 2039},
    ):
        assert replace(H100, **change).uid != H100.uid


def test_device_distance_is_symmetric_and_counts_octaves() -> None:
    half = replace(H100, sm_count=66, bandwidth_gbs=1676)
    assert H100.distance(H100) == 0
    assert H100.distance(half) == half.distance(H100) == 2.0


def test_bytes_moved_counts_x_w_and_y_once() -> None:
    problem = Problem("rmsnorm", "bfloat16", "float32", "float32", 3, 5)
    assert problem.bytes_moved == 3 * 5 * 2 + 5 * 4 + 3 * 5 * 4
    assert replace(problem, w_dtype="none").bytes_moved == 3 * 5 * 2 + 3 * 5 * 4


def test_bytes_moved_of_a_backward() -> None:
    """dy (fp32), x and w in, dx (as x) and dw out."""
    problem = Problem(BACKWARD, "bfloat16", "float32", "float32", 3, 5)
    assert problem.bytes_moved == 3 * 5 * (4 + 2 + 2) + 2 * 5 * 4
    assert replace(problem, w_dtype="none").bytes_moved == 3 * 5 * (4 + 2 + 2)
