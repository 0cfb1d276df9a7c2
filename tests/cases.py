"""Problems that forward is tested on, on the simulator and on a GPU, and how results are judged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hopper_attention import manifest, reference
from hopper_attention.numerics import Error, pytorch_attention

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
    Shape(1, 1, 1, 1, 1),
    Shape(2, 64, 64, 1, 1),
    Shape(1, 113, 203, 2, 1),
    Shape(1, 203, 113, 2, 2),  # causal: rows without keys
    Shape(1, 256, 384, 4, 2),  # GQA, every block full
    Shape(2, 97, 131, 4, 1),  # MQA
    Shape(1, 0, 128, 2, 1),
    Shape(1, 128, 0, 2, 1),
    Shape(1, 1, 509, 3, 1),  # one query, a prime number of keys
    Shape(1, 389, 1, 2, 1),  # more than one row block, one key
)


def forward_instances() -> list[str]:
    return [name for name, i in manifest.instances().items() if i.family == "forward"]


def random_inputs(
    shape: Shape, head_dim: int, dtype: torch.dtype, device: str = "cpu", scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(hash((shape, head_dim)) % 2**31)

    def normal(seqlen: int, heads: int) -> torch.Tensor:
        x = torch.randn(shape.batch, seqlen, heads, head_dim, generator=generator)
        return (scale * x).to(device, dtype)

    return (
        normal(shape.seqlen_q, shape.heads),
        normal(shape.seqlen_k, shape.heads_kv),
        normal(shape.seqlen_k, shape.heads_kv),
    )


def check_forward(q, k, v, out, lse, *, causal: bool, softmax_scale: float | None = None) -> None:
    """At most twice PyTorch's error in the same dtype, for out and for lse."""
    scale = softmax_scale or 1.0 / math.sqrt(q.shape[-1])
    problem = {"softmax_scale": scale, "causal": causal}
    exact, exact_lse = reference.attention(q, k, v, **problem, compute_dtype=torch.float64)
    assert out.shape == q.shape and out.dtype == q.dtype
    ours, torchs = Error.of(out, exact), Error.of(pytorch_attention(q, k, v, **problem), exact)
    assert ours.within_twice(torchs), f"error {ours}, PyTorch's {torchs}"

    assert lse.shape == exact_lse.shape and lse.dtype == torch.float32
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert torch.all(out.transpose(1, 2)[empty] == 0)
    _, torch_lse = reference.attention(q, k, v, **problem, compute_dtype=torch.float32)
    largest = exact_lse[~empty].abs().max().item() if (~empty).any() else 0.0
    allowed = 2 * Error.of(torch_lse[~empty], exact_lse[~empty]).maximum + 2e-6 * max(1.0, largest)
    worst = Error.of(lse[~empty], exact_lse[~empty]).maximum
    assert worst <= allowed, f"lse error {worst}, allowed {allowed}"
