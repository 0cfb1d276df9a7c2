"""Inputs of the measurements: random ones of several kinds, and a model's activations."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hopper_attention.errors import UserError
from hopper_attention.problem.values import CAUSAL, FULL, Mask

HAY = 8
"""The needle's keys, in sequence lengths of the other distributions."""
NEEDLE_QUERIES = 128
HEAVY_CHANNELS = 32
"""One channel in so many is heavy."""
HEAVY = 8.0


class Distribution(str, enum.Enum):
    NORMAL = "normal"
    OUTLIERS = "outliers"
    CHANNELS = "channels"
    NEEDLE = "needle"
    ACTIVATIONS = "activations"


RANDOM = tuple(d for d in Distribution if d is not Distribution.ACTIVATIONS)


@dataclass(frozen=True)
class Size:
    """The size of a problem; `queries` are the last of seqlen, all by default."""

    seqlen: int = 2048
    heads: int = 2
    head_dim: int = 128
    queries: int | None = None

    @property
    def seqlen_q(self) -> int:
        return self.seqlen if self.queries is None else min(self.queries, self.seqlen)


@dataclass(frozen=True)
class Inputs:
    """float32, in flash-attn's layout (batch, seqlen, heads, head_dim)."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask = FULL

    @property
    def softmax_scale(self) -> float:
        return 1 / math.sqrt(self.q.shape[-1])

    @property
    def shape(self) -> str:
        batch, seqlen_q, heads, head_dim = self.q.shape
        seqlen_k, heads_kv = self.k.shape[1:3]
        sequences = "" if batch == 1 else f"{batch} x "
        group = f"{heads} heads" if heads == heads_kv else f"{heads} heads on {heads_kv}"
        kind = "" if self.mask == FULL else f", {self.mask.kind}"
        return f"{sequences}{seqlen_q} queries, {seqlen_k} keys, {group} of {head_dim}{kind}"


def draw(distribution: Distribution, size: Size, seed: int) -> Inputs:
    """Always the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = DRAWS[distribution](size, generator)
    return Inputs(distribution.value, q, k, v)


Drawn = tuple[Tensor, Tensor, Tensor]


def _normal(size: Size, generator: torch.Generator) -> Drawn:
    """N(0, 1)."""
    lengths = (size.seqlen_q, size.seqlen, size.seqlen)
    q, k, v = (torch.randn((1, n, size.heads, size.head_dim), generator=generator) for n in lengths)
    return q, k, v


def _outliers(size: Size, generator: torch.Generator) -> Drawn:
    """N(0, 1) + N(0, 100) Bernoulli(0.001), each element: FlashAttention-3, section 4.3."""

    def with_outliers(x: Tensor) -> Tensor:
        added = 10 * torch.randn(x.shape, generator=generator)
        return x + added * (torch.rand(x.shape, generator=generator) < 0.001)

    q, k, v = (with_outliers(x) for x in _normal(size, generator))
    return q, k, v


def _channels(size: Size, generator: torch.Generator) -> Drawn:
    """Channels of their own means and widths, as in keys of language models.

    A few channels of Q and K are wider; in K the wide ones also have a mean that is the same for
    all keys (KIVI, arXiv 2402.02750, figure 2; SageAttention, arXiv 2410.02367, figure 4).  Each
    head has its own.  Queries are as wide as leaves scores of the usual size.
    """
    q, k, v = _normal(size, generator)
    shape = (1, 1, size.heads, size.head_dim)
    heavy = torch.rand(shape, generator=generator).argsort(dim=-1)
    heavy = heavy < max(1, size.head_dim // HEAVY_CHANNELS)
    mean = HEAVY * torch.randn(shape, generator=generator).sign()
    k = torch.where(heavy, mean + 2 * k, k)
    q = torch.where(heavy, 2 * q, q)
    bias = 0.5 * torch.randn(shape, generator=generator)
    return q, k, v + bias


def _needle(size: Size, generator: torch.Generator) -> Drawn:
    """A long context in which each query finds one key, with about half of its attention.

    The needle's score exceeds that of n others, N(0, 1), by ln n + 1/2: the logarithm of the sum of
    their exponentials.  Its value is 4 in one channel, so what is retrieved stands out.
    """
    keys = HAY * size.seqlen
    queries = min(NEEDLE_QUERIES, size.seqlen_q)
    q, k, v = _normal(Size(keys, size.heads, size.head_dim, queries), generator)
    for head in range(size.heads):
        places = torch.randperm(keys, generator=generator)[:queries]
        query = q[0, :, head]
        score = math.log(keys) + 0.5
        toward = query / query.square().sum(dim=-1, keepdim=True)
        k[0, places, head] += toward * score * math.sqrt(size.head_dim)
        v[0, places, head, torch.arange(queries) % size.head_dim] += 4
    return q, k, v


DRAWS: dict[Distribution, Callable[[Size, torch.Generator], Drawn]] = {
    Distribution.NORMAL: _normal,
    Distribution.OUTLIERS: _outliers,
    Distribution.CHANNELS: _channels,
    Distribution.NEEDLE: _needle,
}


def activations(folder: Path, layer: int, sequences: int = 4) -> Inputs:
    """Q, K (rotated by their positions) and V of a layer of a model that train_gpt.py trained.

    On text that it was not trained on, in sequences of its full context, causal.  Raises UserError
    where the examples cannot be imported or the layer does not exist.
    """
    try:
        from gpt import attention, checkpoint, data
    except ModuleNotFoundError:
        raise UserError("--activations needs the examples: run with PYTHONPATH=examples") from None
    model = checkpoint.load_model(checkpoint.latest(folder), torch.device("cpu"))
    layers, context = model.config.layers, model.config.context
    if not 0 <= layer < layers:
        raise UserError(f"the model of {folder} has layers 0 to {layers - 1}, not {layer}")
    held_out = data.split(data.read_documents(()), seed=0)[1]
    stream = data.TokenStream(
        data.Corpus.of("held-out text", held_out),
        tokens=sequences * context, context=context, seed=0, full_context=True,
    )  # fmt: skip
    seen: list[Drawn] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, packing: Any) -> Tensor:
        seen.append((q, k, v))
        return attention.plain(q, k, v, packing)

    batch = stream.batch(0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(batch.ids, batch.packing, attend)
    q, k, v = (x.float().unflatten(0, (-1, context)) for x in seen[layer])
    return Inputs(Distribution.ACTIVATIONS.value, q, k, v, CAUSAL)
