"""The specification's test coverage, topic by topic: basic function, sizes, axes, dtypes, stability, mathematics, errors, examples."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import plans, rmsnorm
from kernels import stats as call_stats
from oracle import DEVICE, expected_rmsnorm

SIZES = [(1, 1), (1, 128), (16, 64), (64, 128), (128, 256), (33, 512), (8, 4096), (1024, 2048)]
ODD_SIZES = [(3, 5), (7, 33), (17, 127), (31, 129), (50, 1000), (13, 4097), (1, 3), (100, 1)]

TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-2, torch.bfloat16: 1e-2}
"""The specification's atol and rtol."""
ODD_TOLERANCE = 1e-5
"""The specification's for columns that are no power of two, in float32."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def assert_as_specified(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, axis: int = -1, bound: float | None = None
) -> None:
    """Within the specification's tolerance of the formula in float64."""
    bound = TOLERANCES[y.dtype] if bound is None else bound
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    torch.testing.assert_close(y.double(), expected_rmsnorm(x, weight, eps, axis), atol=bound, rtol=bound)


def test_basic_functionality():
    """Basic functionality: the formula, with and without weight, x left as it was."""
    x, weight = randn(64, 128), randn(128)
    before = x.clone()
    assert_as_specified(rmsnorm(x), x)
    assert_as_specified(rmsnorm(x, weight), x, weight)
    assert torch.equal(x, before)
    assert call_stats() == {"heuristic": 2}  # a kernel's work, both


def test_a_value_by_hand():
    """Basic functionality: 3, 4, 0, 0 has the root mean square 2.5."""
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0]], device=DEVICE)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], device=DEVICE)
    expected = torch.tensor([[1.2, 3.2, 0.0, 0.0]], device=DEVICE)
    torch.testing.assert_close(rmsnorm(x, weight, eps=0.0), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matrix_sizes(size):
    """Matrix sizes: 1×1 to 1024×2048."""
    x, weight = randn(*size), randn(size[1])
    assert_as_specified(rmsnorm(x, weight), x, weight)


@pytest.mark.parametrize("size", ODD_SIZES, ids=str)
def test_non_power_of_2(size):
    """Non-power-of-2: arbitrary dimensions, with their tolerance."""
    x, weight = randn(*size), randn(size[1])
    assert_as_specified(rmsnorm(x, weight), x, weight, bound=ODD_TOLERANCE)


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
@pytest.mark.parametrize("weighted", [False, True])
def test_different_axes(axis, weighted):
    """Different axes: each, with a weight of that axis's length."""
    x = randn(48, 80)
    weight = randn(x.shape[axis]) if weighted else None
    assert_as_specified(rmsnorm(x, weight, axis=axis), x, weight, axis=axis, bound=ODD_TOLERANCE)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_data_types(dtype):
    """Data types: float32, float16 and bfloat16, the result in x's."""
    x, weight = randn(64, 128, dtype=dtype), randn(128, dtype=dtype)
    assert_as_specified(rmsnorm(x, weight), x, weight)


@pytest.mark.parametrize("w_dtype", TOLERANCES)
@pytest.mark.parametrize("x_dtype", TOLERANCES)
def test_mixed_precision(x_dtype, w_dtype):
    """Data types: weight of another dtype than x (a potential improvement that was asked for)."""
    x, weight = randn(16, 96, dtype=x_dtype), randn(96, dtype=w_dtype)
    assert_as_specified(rmsnorm(x, weight), x, weight, bound=max(TOLERANCES[x_dtype], ODD_TOLERANCE))


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e-3, 1e3, 1e6, 1e18])
def test_extreme_values(scale):
    """Numerical stability: values whose squares float32 still holds."""
    x = randn(16, 128) * scale
    y = rmsnorm(x)
    assert y.isfinite().all()
    assert_as_specified(y, x)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_large_16_bit_values(dtype):
    """Numerical stability: 30000² is no float16, the sum of squares is formed in float32."""
    x = torch.full((4, 256), 30_000.0, device=DEVICE).to(dtype)
    assert_as_specified(rmsnorm(x), x)


def test_zero_rows():
    """Numerical stability: eps keeps a row of zeros from dividing by zero."""
    x = randn(4, 64)
    x[2] = 0
    y = rmsnorm(x)
    assert torch.equal(y[2], torch.zeros_like(y[2]))
    assert_as_specified(y, x)


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-3, 1.0])
def test_epsilon(eps):
    """Numerical stability: eps is added to the mean of squares, inside the root."""
    x = randn(8, 64) * 1e-3
    assert_as_specified(rmsnorm(x, eps=eps), x, eps=eps)


@pytest.mark.parametrize("size", [(64, 128), (13, 1000), (4, 4097)], ids=str)
def test_rms_is_1_without_weight(size):
    """Mathematical properties: RMS(y) = 1 if no weight is given. (With one it is not, whatever the specification's example says.)"""
    y = rmsnorm(randn(*size))
    rms = y.double().square().mean(-1).sqrt()
    # y within 1e-6 of the formula, and eps = 1e-6 beside a mean square near 1 takes half of that off the root.
    torch.testing.assert_close(rms, torch.ones_like(rms), atol=2e-6, rtol=0)
    weighted = rmsnorm(randn(*size), torch.full((size[1],), 3.0, device=DEVICE)).double().square().mean(-1).sqrt()
    torch.testing.assert_close(weighted, torch.full_like(weighted, 3.0), atol=6e-6, rtol=0)


@pytest.mark.parametrize("alpha", [4.0, 0.5, -1.0, -8.0, 3.7])
def test_scaling_the_input(alpha):
    """Mathematical properties: RMSNorm(αx) = sign(α)·RMSNorm(x), up to eps."""
    x, weight = randn(16, 128), randn(128)
    y, scaled = rmsnorm(x, weight, eps=0.0), rmsnorm(x * alpha, weight, eps=0.0)
    torch.testing.assert_close(scaled, math.copysign(1.0, alpha) * y, atol=1e-6, rtol=1e-6)


def test_the_weight_scales():
    """Mathematical properties: the result is the unweighted one times the weight."""
    x, weight = randn(16, 128), randn(128)
    torch.testing.assert_close(rmsnorm(x, weight), rmsnorm(x) * weight, atol=1e-6, rtol=1e-6)


def test_against_pytorch():
    """Performance, which is compared with PyTorch's: so are the values."""
    x, weight = randn(64, 256), randn(256)
    torch.testing.assert_close(rmsnorm(x, weight), F.rms_norm(x, (256,), weight, 1e-6), atol=1e-6, rtol=1e-5)


def test_comparison_with_layer_norm():
    """Comparison with LayerNorm: different, because the mean stays; equal where there is none to subtract."""
    x, weight = randn(32, 64) + 0.5, randn(64)
    assert not torch.allclose(rmsnorm(x, weight), F.layer_norm(x, (64,), weight, None), atol=1e-3)
    centred = x - x.double().mean(-1, keepdim=True).float()
    torch.testing.assert_close(rmsnorm(centred), F.layer_norm(centred, (64,), eps=1e-6), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (lambda: {"x": randn(4, 8), "axis": 2}, "axis is 2"),
        (lambda: {"x": randn(4, 8), "axis": -3}, "axis is -3"),
        (lambda: {"x": randn(4, 8), "weight": randn(4)}, r"\(4,\)"),
        (lambda: {"x": randn(4, 8), "weight": randn(8, 1)}, r"\(8, 1\)"),
        (lambda: {"x": randn(0, 8)}, r"\(0, 8\)"),
        (lambda: {"x": randn(4, 0)}, r"\(4, 0\)"),
    ],
)
def test_error_handling(arguments, text):
    """Error handling: AssertionError for an invalid axis, a weight mismatch, an empty tensor."""
    with pytest.raises(AssertionError, match=text):
        rmsnorm(**arguments())


def test_error_handling_of_a_cpu_tensor(monkeypatch):
    """Error handling: AssertionError for a tensor that is not on a GPU (the interpreter, which takes it, put aside)."""
    monkeypatch.setattr(plans, "interpreting", lambda: False)
    with pytest.raises(AssertionError, match="x is on cpu"):
        rmsnorm(torch.randn(4, 8))


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("weighted", [False, True])
def test_three_dimensions(axis, weighted):
    """Support matrix, 3D+: each axis, with weight (the specification's fallback has none)."""
    x = randn(4, 6, 32)
    weight = randn(x.shape[axis]) if weighted else None
    assert_as_specified(rmsnorm(x, weight, axis=axis), x, weight, axis=axis, bound=ODD_TOLERANCE)


@pytest.mark.parametrize("weighted", [False, True])
def test_one_dimension(weighted):
    """Support matrix, 1D."""
    x = randn(100)
    weight = randn(100) if weighted else None
    assert_as_specified(rmsnorm(x, weight), x, weight, bound=ODD_TOLERANCE)


def test_two_dimensions_run_triton():
    """Support matrix, 2D (M,N), axis 1: a Triton kernel; so do axis 0 and 3D here."""
    x = randn(16, 32)
    for arguments in ({}, {"axis": 1}, {"axis": -1}, {"axis": 0}):
        rmsnorm(x, backend="triton", **arguments)
    rmsnorm(x.view(2, 8, 32), backend="triton")
    assert set(call_stats()) == {"heuristic"}


def test_basic_usage_example():
    """Usage examples, Basic Usage."""
    x = torch.randn(64, 128, device=DEVICE)
    normalized = rmsnorm(x)
    weight = torch.randn(128, device=DEVICE)
    normalized_weighted = rmsnorm(x, weight)
    assert normalized.shape == normalized_weighted.shape == (64, 128)


def test_comparison_example():
    """Usage examples, Comparison with LayerNorm; its last assertion on the result without weight, where it holds."""
    x = torch.randn(32, 64, device=DEVICE)
    weight = torch.randn(64, device=DEVICE)
    result_rms = rmsnorm(x, weight)
    result_ln = F.layer_norm(x, (64,), weight, None)
    assert not torch.allclose(result_rms, result_ln, atol=1e-3)
    rms_value = torch.sqrt(torch.mean(rmsnorm(x).double() ** 2, dim=-1))
    assert torch.allclose(rms_value, torch.ones_like(rms_value), atol=2e-6)  # eps takes 0.5e-6 / mean(x²)
    assert not torch.allclose(torch.sqrt(torch.mean(result_rms**2, dim=-1)), torch.ones(32, device=DEVICE), atol=1e-6)


@pytest.mark.gpu
def test_benchmark_example():
    """Performance and Usage examples, Benchmarking: the keys of the result, times and bandwidths that fit each other."""
    from benchmarks import benchmark_rmsnorm

    results = benchmark_rmsnorm(M=2048, N=2048, warmup=10, repeat=100)
    assert {"triton_time", "torch_time", "speedup", "triton_bandwidth", "torch_bandwidth"} <= set(results)
    assert results["speedup"] == pytest.approx(results["torch_time"] / results["triton_time"])
    for name in ("triton", "torch"):
        assert results[f"{name}_time"] > 0
    # Both bandwidths are the same bytes over their own time.
    assert results["triton_bandwidth"] / results["torch_bandwidth"] == pytest.approx(results["speedup"])
