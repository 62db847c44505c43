"""batch_invariant on a GPU: a row's bits are the same however many rows come with it, and wherever it is among them."""

import pytest
import torch

from kernels import override, rmsnorm
from kernels.variants import STRIP_ROWS, space
from oracle import DTYPES, assert_rmsnorm, random_weight, random_x

pytestmark = pytest.mark.gpu

ROWS = (1, 2, 17, 255, 256, 257, 4096)
WIDTHS = (64, 128, 1000, 1024, 2880, 4096, 8192, 16_384, 40_000, 131_072)
"""Each a multiple of 8 elements, so that every row starts at a multiple of 16 bytes."""


@pytest.mark.parametrize("cols", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_at_any_rows_and_position(cols, dtype):
    x, weight = random_x((max(ROWS), cols), dtype), random_weight(cols, dtype)
    among_all = rmsnorm(x, weight, batch_invariant=True)
    assert_rmsnorm(among_all[:64], x[:64], weight)
    for rows in ROWS:
        for first in {0, (max(ROWS) - rows) // 2, max(ROWS) - rows}:
            some = slice(first, first + rows)
            assert torch.equal(rmsnorm(x[some], weight, batch_invariant=True), among_all[some]), (rows, first)
            assert torch.equal(rmsnorm(x[some].clone(), weight, batch_invariant=True), among_all[some]), (rows, first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [128, 4096, 40_000])
def test_bits_over_the_input_in_a_qkv_and_along_another_axis(cols, dtype):
    x, weight = random_x((12, cols), dtype), random_weight(cols, dtype)
    want = rmsnorm(x, weight, batch_invariant=True)
    over = x.clone()
    assert torch.equal(rmsnorm(over, weight, batch_invariant=True, out=over), want)
    qkv = torch.zeros(3, 3, 4, cols, dtype=dtype, device=x.device)
    qkv[:, 0] = x.view(3, 4, cols)
    assert torch.equal(rmsnorm(qkv[:, 0], weight, batch_invariant=True).view(12, cols), want)
    across = x.view(3, 4, cols).movedim(-1, 1).contiguous()
    assert torch.equal(rmsnorm(across, weight, axis=1, batch_invariant=True).movedim(1, -1).reshape(12, cols), want)


def test_bits_beyond_the_rows_of_one_launch():
    """Programs share a row of 40000 columns, and their grid ends at 65535 rows."""
    rows, cols = STRIP_ROWS * 5 // 4, 40_000
    x, weight = random_x((rows, cols), torch.bfloat16), random_weight(cols, torch.bfloat16)
    config = next(config for config in sorted(space("split_row"), key=str) if config.params["max_pieces"] == 4)
    with override(config):
        every = rmsnorm(x, weight, batch_invariant=True)
        for some in (slice(rows - 3, rows), slice(STRIP_ROWS - 2, STRIP_ROWS + 2)):
            assert torch.equal(rmsnorm(x[some], weight, batch_invariant=True), every[some])
    assert_rmsnorm(every[-64:], x[-64:], weight)
