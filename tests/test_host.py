"""The order in which host times are taken, without a GPU."""

import torch

from benchmarks import host
from benchmarks.results import ONE_SHAPE, WITH_BACKWARD, WITH_GRAD


def test_each_repeat_has_an_order_of_its_own_and_backwards_last(monkeypatch):
    """Each call as often as it is to be, with gradients recorded where they are to be."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(host, "WARM_CALLS", 2)
    monkeypatch.setattr(host, "CALLS", 3)
    made: list[tuple[str, str, bool]] = []

    def call_of(name, way):
        return lambda: made.append((name, way, torch.is_grad_enabled()))

    keys = [(name, way) for name in ("tuned", "eager", "compile") for way in (WITH_BACKWARD, ONE_SHAPE, WITH_GRAD)]
    times = host._timed({key: call_of(*key) for key in keys})
    blocks = [made[at : at + 5] for at in range(0, len(made), 5)]
    assert all(len(set(block)) == 1 for block in blocks)
    assert all(recording == (way != ONE_SHAPE) for _, way, recording in made)
    repeats = [tuple(block[0][:2] for block in blocks[at : at + len(keys)]) for at in range(0, len(blocks), len(keys))]
    assert len(repeats) == host.REPEATS
    assert all(sorted(repeat) == sorted(keys) for repeat in repeats)
    assert all({way for _, way in repeat[-3:]} == {WITH_BACKWARD} for repeat in repeats)
    assert len(set(repeats)) > host.REPEATS // 2
    assert {(name, way) for name, ways in times.items() for way in ways} == set(keys)
