"""The network: pre-norm blocks of grouped-query attention with RoPE and of SwiGLU, over bytes.

Batches have no batch dimension: all documents of a step lie behind one another, (tokens, dim), and
only attention, which is handed in, needs to know where one ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt.data import Packing

Rotation = tuple[Tensor, Tensor]
"""(cos, sin), each (tokens, 1, head_dim / 2)."""
NORM_EPS = 1e-5


@dataclass(frozen=True)
class GPTConfig:
    layers: int
    dim: int
    heads: int
    heads_kv: int
    hidden: int
    """Width of the SwiGLU layer."""
    context: int
    """The longest sequence it is trained on."""
    tied: bool = True
    """True if the output layer is the embedding, transposed."""
    vocabulary: int = 256
    """Bytes; 0, which text does not contain, separates documents."""
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.head_dim % 8:
            raise ValueError(
                f"dim {self.dim} must be a multiple of 8 for each of {self.heads} heads"
            )
        if self.heads % self.heads_kv:
            raise ValueError(f"{self.heads} heads are not a multiple of {self.heads_kv} KV heads")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


SIZES = {
    "tiny": GPTConfig(layers=4, dim=128, heads=4, heads_kv=2, hidden=384, context=256),
    "small": GPTConfig(layers=6, dim=384, heads=6, heads_kv=2, hidden=1024, context=1024),
    "125m": GPTConfig(layers=12, dim=768, heads=6, heads_kv=2, hidden=3840, context=4096),
    "350m": GPTConfig(layers=24, dim=1024, heads=8, heads_kv=2, hidden=3840, context=8192),
}
"""125m and 350m have head_dim 128.  Bytes need next to no embedding: half is SwiGLU, and more."""


class Attend(Protocol):
    """Causal attention within each sequence of a packing.

    q (tokens, heads, head_dim), k and v (tokens, heads_kv, head_dim), bf16; the result is like q.
    Called by one layer after the other.  Layers do not say which they are: torch.compile would
    compile each of them for itself, and give up after eight.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor: ...


class GPT(nn.Module):
    def __init__(self, config: GPTConfig, recompute: bool = False):
        """`recompute`: keep only the blocks' inputs, and run them again in backward."""
        super().__init__()
        self.config, self.recompute = config, recompute
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.head = nn.Linear(config.dim, config.vocabulary, bias=False)
        self._initialize()
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, packing: Packing, attend: Attend) -> Tensor:
        """Logits (tokens, vocabulary), float32, of the bytes that follow ids (tokens,)."""
        config = self.config
        rotation = rope(packing.positions, config.head_dim, config.rope_base)
        x = self.embedding(ids)
        for block in self.blocks:
            if self.recompute and self.training:
                x = checkpoint(block, x, rotation, packing, attend, use_reentrant=False)
            else:
                x = block(x, rotation, packing, attend)
        return self.head(self.norm(x)).float()

    def _initialize(self) -> None:
        """GPT-2's: what is added to the residual stream shrinks with the number of additions."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                scale = 1 / math.sqrt(2 * self.config.layers) if residual else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rotation: Rotation, packing: Packing, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, packing, attend)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = (config.heads, config.heads_kv, config.heads_kv)
        self.qkv = nn.Linear(config.dim, sum(self.heads) * config.head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, packing: Packing, attend: Attend) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=1)
        out = attend(rotate(q, rotation), rotate(k, rotation), v, packing)
        return self.out(out.flatten(1))


class SwiGLU(nn.Module):
    """(silu(x W_gate) * (x W_up)) W_down; Shazeer, arXiv 2002.05202."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_and_up = nn.Linear(config.dim, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def rope(positions: Tensor, head_dim: int, base: float) -> Rotation:
    """Rotary embeddings, arXiv 2104.09864, of positions (tokens,) in their documents."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions[:, None, None] * base ** (-pairs / head_dim)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x (tokens, heads, head_dim) with its halves as pairs; computed in float32, in x's dtype."""
    cos, sin = rotation
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)
