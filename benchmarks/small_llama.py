"""A small model of Llama's architecture in PyTorch's modules, with the norms that the caller asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-5
MakeNorm = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Size:
    """Of the model and its batches of tokens."""

    vocabulary: int = 32_000
    hidden: int = 2048
    intermediate: int = 5632
    layers: int = 8
    heads: int = 16
    batch: int = 4
    tokens: int = 1024


class FormulaNorm(nn.Module):
    """RMSNorm in PyTorch's operations one by one, rounded where transformers' LlamaRMSNorm rounds."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return self.weight * normalized.to(x.dtype)


class SmallLlama(nn.Module):
    """ids (batch, tokens) to logits (batch, tokens, vocabulary): causal, rotary positions, SwiGLU, a norm before each half of a block."""

    def __init__(self, size: Size, make_norm: MakeNorm) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.hidden)
        self.blocks = nn.ModuleList(Block(size, make_norm) for _ in range(size.layers))
        self.norm = make_norm(size.hidden)
        self.head = nn.Linear(size.hidden, size.vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of each token after the first, in fp32."""
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())


class Block(nn.Module):
    def __init__(self, size: Size, make_norm: MakeNorm) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm, self.mlp_norm = make_norm(size.hidden), make_norm(size.hidden)
        self.qkv = nn.Linear(size.hidden, 3 * size.hidden, bias=False)
        self.out = nn.Linear(size.hidden, size.hidden, bias=False)
        self.gate_up = nn.Linear(size.hidden, 2 * size.intermediate, bias=False)
        self.down = nn.Linear(size.intermediate, size.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of (…, tokens, head size): Su et al., "RoFormer", 2021, in the halves that Llama pairs."""
    tokens, half = x.shape[-2], x.shape[-1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(tokens, device=x.device)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
