"""`replace_rmsnorm`: the norms of a loaded model become `kernels.RMSNorm`, in place and with a way back."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch

from kernels.module import RMSNorm
from kernels.numerics import FP32, NO_OFFSET
from kernels.validation import FLOAT_DTYPES, InvalidInput


class Kind(NamedTuple):
    """What a class of norms computes, and the name by which it calls its eps."""

    eps: str
    weight_offset: float
    casting: str


LLAMA = Kind("variance_epsilon", NO_OFFSET, "llama")
GEMMA = Kind("eps", 1.0, "gemma")

TRANSFORMERS = {
    **dict.fromkeys(("Llama", "Mistral", "Ministral", "Mixtral"), LLAMA),
    **dict.fromkeys(("Qwen2", "Qwen2Moe", "Qwen2VL", "Qwen2_5_VL", "Qwen3", "Qwen3Moe", "Qwen3VLText"), LLAMA),
    **dict.fromkeys(("Gemma", "Gemma2", "Gemma3", "Qwen3Next", "Qwen3_5", "Qwen3_5Moe"), GEMMA),
}
"""By the name of transformers' class before `RMSNorm`. Their formulas were read in transformers 5.24."""


class Undo(NamedTuple):
    module: torch.nn.Module
    kind: type[torch.nn.Module]
    added: tuple[str, ...]
    overwritten: dict[str, Any]


class Replacement:
    """What `replace_rmsnorm` did.

    replaced: by the module's name in the model, its former class.
    left: by the module's name, why it was left: of every other torch.nn.RMSNorm and module with `Norm` in the name of its class.
    str() sums both up.
    """

    def __init__(self) -> None:
        self.replaced: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self._undo: list[Undo] = []

    def restore(self) -> None:
        """Give the replaced modules their former classes back. Their parameters stay as they are now."""
        while self._undo:
            module, kind, added, overwritten = self._undo.pop()
            for name in added:
                del module.__dict__[name]
            module.__dict__.update(overwritten)
            module.__class__ = kind

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} norms replaced, {len(self.left)} left"]
        lines += [f"  replaced {count} × {kind}" for kind, count in Counter(self.replaced.values()).items()]
        lines += [f"  left {count} × {reason}" for reason, count in Counter(self.left.values()).items()]
        return "\n".join(lines)


def replace_rmsnorm(model: torch.nn.Module) -> Replacement:
    """Let the norms of a loaded model run as `kernels.RMSNorm`: torch's, and those of transformers' Llama, Mistral, Qwen and Gemma.

    The modules themselves stay, with their parameters, hooks and training flag, and change their class: optimizers, state dicts, tied
    weights and whoever else refers to them notice nothing. Each keeps its eps, weight offset and rounding (`casting`). What differs:
    the result has x's dtype, where those of Llama's kind promote it to that of a wider weight.

    Call it before the model is wrapped or sharded (fully_shard gives the norms classes of its own, which are left alone).

    Returns:
        A Replacement: what was replaced, what was left and why; its `restore()` undoes all of it.

    Raises:
        InvalidInput: model is no torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise InvalidInput(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    replacement = Replacement()
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.RMSNorm) and "Norm" not in type(module).__name__:
            continue
        kind = _kind_of(module)
        reason = _why_not(module, kind)
        if kind is None or reason:
            replacement.left[name] = f"{type(module).__name__}: {reason}"
        else:
            replacement.replaced[name] = type(module).__name__
            replacement._undo.append(_become(module, kind))
    return replacement


def _kind_of(module: torch.nn.Module) -> Kind | None:
    """None for a class that is not known. A subclass may compute something else, so it is not known."""
    if type(module) is torch.nn.RMSNorm:
        return Kind("eps", NO_OFFSET, FP32)
    family, norm, rest = type(module).__name__.partition("RMSNorm")
    if not norm or rest or not type(module).__module__.startswith("transformers.models."):
        return None
    return TRANSFORMERS.get(family)


def _why_not(module: torch.nn.Module, kind: Kind | None) -> str:
    """Why a module stays as it is; empty if nothing speaks against a replacement."""
    if kind is None:
        return "it is replaced already" if type(module) is RMSNorm else "its class is none that is known"
    if "forward" in vars(module):
        return "its forward was replaced, as offloading hooks do"
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    weight = state.pop("weight", None)
    if state:
        return f"it has more state than a weight: {', '.join(state)}"
    if type(module) is torch.nn.RMSNorm:
        return "" if weight is None or weight.dtype in FLOAT_DTYPES else f"its weight is {weight.dtype}"
    if weight is None or weight.dim() != 1 or weight.dtype not in FLOAT_DTYPES:
        return "its weight is no vector of floats"
    if not isinstance(getattr(module, kind.eps, None), float):
        return f"it has no {kind.eps}"
    return ""


def _become(module: torch.nn.Module, kind: Kind) -> Undo:
    attributes: dict[str, Any] = {"eps": getattr(module, kind.eps)}
    if type(module) is not torch.nn.RMSNorm:
        weight: Any = module.weight
        attributes |= {"normalized_shape": tuple(weight.shape), "elementwise_affine": True}
        attributes |= {"weight_offset": kind.weight_offset, "casting": kind.casting}
    overwritten = {name: vars(module)[name] for name in attributes if name in vars(module)}
    undo = Undo(module, type(module), tuple(attributes), overwritten)
    module.__dict__.update(attributes)
    module.__class__ = RMSNorm
    return undo
