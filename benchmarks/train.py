"""A training step of a small Llama in bf16, with and without replaced norms: time, memory and loss, in the same rounds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn

from benchmarks.small_llama import EPS, FormulaNorm, MakeNorm, Size, SmallLlama
from kernels import replace_rmsnorm
from tuner.display import message, table

BASE, PATCHED = "torch.nn.RMSNorm", "replace_rmsnorm"
NORMS: dict[str, MakeNorm] = {
    "operations": FormulaNorm,
    BASE: lambda hidden: nn.RMSNorm(hidden, eps=EPS),
    PATCHED: lambda hidden: nn.RMSNorm(hidden, eps=EPS),
}
"""By the name of a model: its norms. Those of PATCHED are replaced."""

WARM_STEPS = 10
"""Steps that are not timed: they compile, allocate, and make the optimizer's state."""
BATCHES = 4
"""Seen in turn, so that there is something to learn."""


@dataclass(frozen=True)
class Training:
    """Of one model: each step's loss, the median time of a step, and the most that a step allocates beyond what stays."""

    losses: list[float]
    step_ms: float
    peak_mib: float


def trainings(steps: int, size: Size, device: torch.device) -> dict[str, Training]:
    """Train a model with each kind of norm, from the same weights on the same random tokens, one step of each in turn."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(size.vocabulary, (size.batch, size.tokens + 1), generator=generator).to(device) for _ in range(BATCHES)]
    models = {name: _model(name, size, device) for name in NORMS}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True) for name, model in models.items()}
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in NORMS}
    times: dict[str, list[float]] = {name: [] for name in NORMS}
    peaks = dict.fromkeys(NORMS, 0)
    for step in range(steps):
        for name, model in models.items():
            loss, ms, allocated = _step(model, optimizers[name], batches[step % BATCHES])
            losses[name].append(loss)
            if step >= WARM_STEPS:
                times[name].append(ms)
                peaks[name] = max(peaks[name], allocated)
    return {name: Training([float(loss) for loss in losses[name]], statistics.median(times[name]), peaks[name] / 2**20) for name in NORMS}


def print_trainings(console: Console, found: Mapping[str, Training]) -> None:
    base = found[BASE]
    at = sorted({1, 10, 25, len(base.losses)} & set(range(1, len(base.losses) + 1)))
    titles = ("ms a step", "×", "peak MiB", *(f"loss {step}" for step in at))
    made = table("a training step, by the norms of the model", "norms", *titles, right=titles)
    for name, one in found.items():
        figures = (f"{one.step_ms:.2f}", f"{base.step_ms / one.step_ms:.2f}", f"{one.peak_mib:.0f}")
        made.add_row(name, *figures, *(f"{one.losses[step - 1]:.4f}" for step in at))
    console.print(made)
    others = [(name, largest_difference(one, base)) for name, one in found.items() if name != BASE]
    told = ", ".join(f"{name} {difference:.4f}" for name, difference in others)
    message(console, f"Largest difference of a loss from that of {BASE} over {len(base.losses)} steps: {told}.")


def largest_difference(one: Training, other: Training) -> float:
    return max(abs(mine - theirs) for mine, theirs in zip(one.losses, other.losses, strict=True))


def _model(name: str, size: Size, device: torch.device) -> SmallLlama:
    torch.manual_seed(0)
    with device:
        model = SmallLlama(size, NORMS[name]).to(torch.bfloat16)
    if name == PATCHED:
        replace_rmsnorm(model)
    return model


def _step(model: SmallLlama, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> tuple[torch.Tensor, float, int]:
    """The loss, ms, and bytes at the peak beyond those before. The GPU is idle before and after: host time that it waits for counts."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    loss = model.loss(ids)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    end.record()
    end.synchronize()
    return loss.detach(), start.elapsed_time(end), torch.cuda.max_memory_allocated() - before
