"""The small Llama of `python -m benchmarks train`: causal, the same with every kind of norm, and trainable."""

import pytest
import torch

from benchmarks import train
from benchmarks.small_llama import Size, SmallLlama
from oracle import DEVICE

SIZE = Size(vocabulary=50, hidden=64, intermediate=96, layers=2, heads=4, batch=2, tokens=12)


def model(name: str) -> SmallLlama:
    return train._model(name, SIZE, DEVICE).float()


def ids() -> torch.Tensor:
    return torch.randint(SIZE.vocabulary, (SIZE.batch, SIZE.tokens), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def test_a_token_tells_nothing_to_those_before_it():
    llama, one = model(train.BASE), ids()
    other = one.clone()
    other[:, 7] = (other[:, 7] + 1) % SIZE.vocabulary
    differs = (llama(one) != llama(other)).any(-1)
    assert not differs[:, :7].any()
    assert differs[:, 7:].all()


def test_positions_count():
    """Without them a row of one token would give one row of logits."""
    logits = model(train.BASE)(torch.cat((torch.zeros((1, 1)), torch.ones((1, 9))), dim=1).long().to(DEVICE))
    assert (logits[:, 2:] != logits[:, 1:2]).any()


@pytest.mark.parametrize("name", train.NORMS)
def test_norms_change_nothing_but_who_computes_them(name):
    """Losses agree to some hundred fp32 roundings, and gradients reach every parameter."""
    llama = model(name)
    loss = llama.loss(ids())
    loss.backward()
    torch.testing.assert_close(loss, model(train.BASE).loss(ids()), rtol=128 * 2.0**-24, atol=0)
    assert all(parameter.grad.any() for parameter in llama.parameters())


@pytest.mark.gpu
def test_trainings():
    """The losses fall, and coincide: a logit differs by a rounding of bf16 here and there, and a loss is the mean over many."""
    found = train.trainings(40, SIZE, torch.device("cuda", 0))
    assert list(found) == list(train.NORMS)
    for one in found.values():
        assert len(one.losses) == 40
        assert one.losses[-1] < one.losses[0]
        assert one.step_ms > 0
        assert one.peak_mib > 0
    base = found[train.BASE]
    assert train.largest_difference(found[train.PATCHED], base) <= 2.0**-8 * base.losses[0]
