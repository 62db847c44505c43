"""A provider's backward as something to launch: autograd's, of a forward that ran before the clock starts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tuner.cases import Tensors
from tuning_db.model import ADD_BACKWARD, Problem


class Backward:
    """Called on tensors that were given to `save`, it computes their gradients by torch.autograd.grad, as often as it is asked to.

    forward(x, weight) -> y, or of a sum forward(x, residual, weight) -> (y, new_residual), differentiable. Of a sum the residual is the
    case's x and what is added to it is zero, so that the sum is the case's x too. The gradients are computed `within` a context.
    """

    def __init__(
        self, problem: Problem, forward: Callable[..., Any], within: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self._forward = forward
        self._within = within
        self._adds = problem.op == ADD_BACKWARD
        self._y_dtype = getattr(torch, problem.y_dtype)
        self._graphs: dict[int, tuple[tuple[torch.Tensor, ...], list[torch.Tensor], list[torch.Tensor]]] = {}
        self._zeros: torch.Tensor | None = None

    def save(self, tensors: Tensors) -> None:
        """Run the forward and keep its graph. A launch under capture must be on the stream that is current here: autograd sees to that."""
        assert tensors.dy is not None
        x, dy = tensors.x.detach().requires_grad_(), tensors.dy
        weight = None if tensors.weight is None else tensors.weight.detach().requires_grad_()
        weights = [] if weight is None else [weight]
        with torch.enable_grad():
            if self._adds:
                assert tensors.dsum is not None
                if self._zeros is None:
                    self._zeros = torch.zeros(x.shape, dtype=self._y_dtype, device=x.device)
                addend = self._zeros.detach().requires_grad_()
                graph = tuple(self._forward(addend, x, weight)), [x, addend, *weights], [dy, tensors.dsum]
            else:
                graph = (self._forward(x, weight),), [x, *weights], [dy]
        self._graphs[dy.data_ptr()] = graph

    def forget(self) -> None:
        """Let go of the graphs, and of the tensors that they hold."""
        self._graphs.clear()
        self._zeros = None

    def __call__(self, tensors: Tensors) -> tuple[torch.Tensor | None, ...]:
        """In the order of `Tensors.results`."""
        assert tensors.dy is not None
        outputs, inputs, directions = self._graphs[tensors.dy.data_ptr()]
        with self._within():
            found = torch.autograd.grad(outputs, inputs, directions, retain_graph=True)
        return found if tensors.weight is not None else (*found, None)
