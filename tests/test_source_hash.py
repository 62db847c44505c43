"""What makes a variant's records stale: a change of its Triton code, and nothing else."""

import inspect

import pytest

from kernels import variants
from kernels.variants import VARIANTS, common, source_hash

OLD = inspect.getsource(VARIANTS["split_row"])


@pytest.fixture
def hash_of(monkeypatch):
    """The hash that split_row would have if its file had another text."""

    def compute(text: str) -> str:
        shared = inspect.getsource(common)
        monkeypatch.setattr(variants.inspect, "getsource", lambda module: shared if module is common else text)
        source_hash.cache_clear()
        found = source_hash("split_row")
        monkeypatch.undo()
        source_hash.cache_clear()
        return found

    return compute


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    polls = max_polls\n", "    # a comment\n\n    polls = max_polls  # and another\n"),
        ('    """How many are here', '    """Another text for how many are here'),
        ("REVISION = 2\n", "REVISION = 2\n\n\n\n"),
        ("MAX_POLLS = 20_000", "MAX_POLLS = 10_000"),
        ("for max_pieces in (1, 2, 4, 8)", "for max_pieces in (1, 2, 4)"),
    ],
)
def test_what_is_no_change(hash_of, old, new):
    assert old in OLD
    assert hash_of(OLD.replace(old, new)) == hash_of(OLD)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("polls -= 1", "polls -= 2"),
        ("publish(row_slots_ptr + part, mark, partial)", "publish(row_slots_ptr, mark, partial)"),
        ("eps: tl.float32", "eps: tl.float64"),
        ("        polls -= 1\n", "    polls -= 1\n"),
    ],
)
def test_what_is_a_change(hash_of, old, new):
    assert old in OLD
    assert hash_of(OLD.replace(old, new)) != hash_of(OLD)
