"""`rmsnorm` as a node of autograd's graph: the tuned forward, then the tuned backward."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from kernels.backward import BackwardPlans, Gradients, torch_backward
from kernels.calls import Call, Node, NodeOf
from kernels.numerics import Numerics
from tuning_db.model import Config

_is_batched = torch._C._functorch.is_legacy_batchedtensor  # whether a tensor stands for many, as under is_grads_batched
_transform = torch._C._functorch.peek_interpreter_stack  # the innermost torch.func transform, or None


MAX_EPS = 8
"""Values of eps whose nodes are remembered for one kind of call."""


def differentiable(forward: Call, axis: int, config: Config | None, numerics: Numerics) -> tuple[Call, NodeOf]:
    """`forward` for inputs that require grad; its `out` is None: an `out` and gradients exclude each other. And its nodes by eps.

    `config` is the override of the forward: the backward may run in a thread that knows of none.
    """
    backwards = BackwardPlans(axis, config, numerics)
    nodes: dict[float, Node] = {}

    def node_of(eps: float) -> Node:
        node = nodes.get(eps)
        if node is None:
            if len(nodes) >= MAX_EPS:
                nodes.clear()
            node = nodes[eps] = _node(forward, backwards, eps)
        return node

    def call(out: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        del out
        return (nodes.get(eps) or node_of(eps))(x, weight)

    return call, node_of


def _node(forward: Call, backwards: BackwardPlans, eps: float) -> Node:
    """A class of nodes for one kind of call: closures instead of arguments and attributes of one shared class save some 2 % of a call.

    It takes some 9 KB, which the garbage collector frees.
    """

    class _RMSNorm(torch.autograd.Function):
        """Saves x and weight, as they are and nothing else. A backward that is itself to be differentiated runs PyTorch's operations."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
            ctx.to_save = x, weight  # what save_for_backward does
            return forward(None, x, weight, eps)

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> Gradients:
            x, weight = ctx.saved_tensors
            wants_dx, wants_dw = ctx.needs_input_grad
            if needs_operations(dy):
                call = torch_backward(backwards.axis, backwards.numerics)
            else:
                call = backwards.call(dy, x, weight, (wants_dx, wants_dw))
            dx, dw = call(dy, x, weight, eps)
            return dx if wants_dx else None, dw if wants_dw else None

    node: Node = quick_apply(_RMSNorm)
    return node


def quick_apply(function: type[torch.autograd.Function]) -> Any:
    """Its `apply` without the Python around it, which looks for torch.func transforms: no plan is called under one.

    It is that of a class with the same attributes but neither base classes nor a metaclass in Python: PyTorch looks some up by name in
    each call. A forward that allocates and launches nothing takes 4.05 µs so, 4.15 on the class itself, 5.7 by `Function.apply` (a
    server's CPU).
    """
    base = torch._C._FunctionBase
    inherited = [vars(kind) for kind in reversed(function.__mro__) if kind not in (base, object)]
    attributes = {name: value for named in inherited for name, value in named.items() if name != "apply" and not name.startswith("__")}
    return type(function.__name__, (base,), attributes).apply  # type: ignore[attr-defined]


def needs_operations(dy: torch.Tensor) -> bool:
    """Whether the backward is watched by something that must see PyTorch's operations.

    That is create_graph=True, a torch.func transform, forward-mode AD, `is_grads_batched`, and a dy that is no plain tensor.
    """
    transformed = torch.is_grad_enabled() or _transform() is not None or forward_ad._current_level >= 0
    return transformed or _is_batched(dy) or type(dy) is not torch.Tensor
