"""Shapes, lengths, windows and inputs of tests, on the simulator and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hopper_attention.dispatch import manifest

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    heads_kv: int

    def __str__(self) -> str:
        return f"b{self.batch}-q{self.seqlen_q}-k{self.seqlen_k}-h{self.heads}-{self.heads_kv}"


SHAPES = (
    Shape(2, 97, 131, 4, 1),  # MQA
    Shape(1, 203, 113, 2, 2),  # causal: rows without keys
    Shape(1, 1, 509, 3, 1),  # one query, a prime number of keys
    Shape(1, 113, 203, 2, 1),
    Shape(1, 256, 384, 4, 2),  # GQA, every block full
    Shape(1, 1, 1, 1, 1),
    Shape(2, 64, 64, 1, 1),
    Shape(1, 0, 128, 2, 1),
    Shape(1, 128, 0, 2, 1),
    Shape(1, 389, 1, 2, 1),  # more than one row block, one key
)
FEW_SHAPES = SHAPES[:3]

PACKED = (
    # (seqlen_q, seqlen_k) of every sequence: empty ones in front, between, behind; on either side.
    ((0, 0), (64, 64), (113, 203), (0, 5), (1, 1), (7, 0), (203, 113), (0, 0)),
    tuple((1 + i % 3, 40 - i) for i in range(37)),  # more sequences than lanes
)

WINDOWS = (
    {"window_size": (37, 0)},
    {"window_size": (50, 20)},
    {"window_size": (-1, 7)},
    {"window_size": (13, None)},
    {"causal": True, "attention_chunk": 48},
    {"window_size": (0, 0)},
    {"attention_chunk": 100},
    {"causal": True, "window_size": (100, -1)},
    {"window_size": (3, 1)},
    {"window_size": (200, 150)},
)


def forward_instances(*, varlen: bool) -> list[str]:
    return instances_of("forward", varlen)


def backward_instances(*, varlen: bool) -> list[str]:
    return instances_of("backward", varlen)


def instances_of(family: str, varlen: bool) -> list[str]:
    return [
        name
        for name, i in manifest.instances().items()
        if i.family == family and i.config["varlen"] == varlen
    ]


def arguments_for(instance: str, number: int) -> dict[str, Any]:
    """Arguments of the public function that lead to the instance; windows by number."""
    config = manifest.instances()[instance].config
    arguments: dict[str, Any] = {"softcap": 15.0} if config["softcap"] else {}
    if config["mask"] == "causal":
        arguments["causal"] = True
    if config["mask"] == "local":
        arguments |= WINDOWS[number % len(WINDOWS)]
    return arguments


def random_inputs(
    shape: Shape,
    head_dim: int,
    dtype: torch.dtype,
    device: str = "cpu",
    scale: float = 1.0,
    head_dim_v: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(hash((shape, head_dim)) % 2**31)

    def normal(seqlen: int, heads: int, dim: int) -> Tensor:
        x = torch.randn(shape.batch, seqlen, heads, dim, generator=generator)
        return (scale * x).to(device, dtype)

    return (
        normal(shape.seqlen_q, shape.heads, head_dim),
        normal(shape.seqlen_k, shape.heads_kv, head_dim),
        normal(shape.seqlen_k, shape.heads_kv, head_dim_v or head_dim),
    )


def inputs_for(instance: str, shape: Shape, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    config = manifest.instances()[instance].config
    dtype = TORCH_DTYPES[config["dtype"]]
    return random_inputs(shape, config["head_dim"], dtype, device, head_dim_v=config["head_dim_v"])


def offsets(lengths: Sequence[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def packed_inputs(
    instance: str, lengths: Sequence[tuple[int, int]], heads: int = 2, heads_kv: int = 1
) -> list[Tensor]:
    """(total, heads, dim) of q, k and v."""
    total_q, total_k = (sum(side) for side in zip(*lengths))
    return [x[0] for x in inputs_for(instance, Shape(1, total_q, total_k, heads, heads_kv))]
