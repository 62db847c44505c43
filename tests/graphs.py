"""What the graphs of torch.compile and torch.export call, and what they can't hold."""

import pytest
import torch
import torch.nn.functional as F


def targets(graphs) -> list[str]:
    """The names of what they call, but for taking elements out of lists and letting go of gradients."""
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    return [name for name in called if "getitem" not in name and "detach" not in name]


def skip_where_pytorch_cannot(transform: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Skip where torch.compile fails on PyTorch's own norm under this transform: 2.11 does under jvp on a GPU."""
    if transform != "jvp":
        return

    def under_jvp(x: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(lambda x: F.rms_norm(x, weight.shape, weight, 1e-6), (x,), (x,))[1]

    try:
        torch.compile(under_jvp, fullgraph=True, backend="aot_eager")(x)
    except torch._dynamo.exc.TorchRuntimeError as error:
        pytest.skip(f"this PyTorch can't compile F.rms_norm under jvp: {str(error).splitlines()[0]}")
