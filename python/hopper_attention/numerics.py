"""The error criterion: a result is judged beside PyTorch's in the same dtype, both against FP64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hopper_attention import reference

FLOOR = 1e-5
"""Absolute error below which nothing is judged: PyTorch may happen to be exact."""


@dataclass(frozen=True)
class Error:
    """Of one tensor against FP64."""

    maximum: float
    rms: float

    @staticmethod
    def of(result: Tensor, exact: Tensor) -> Error:
        if result.numel() == 0:
            return Error(0.0, 0.0)
        difference = (result.double() - exact.double()).abs()
        return Error(difference.max().item(), difference.square().mean().sqrt().item())

    def within_twice(self, other: Error) -> bool:
        """At most twice the other error plus FLOOR; false for NaN."""
        return self.maximum <= 2 * other.maximum + FLOOR and self.rms <= 2 * other.rms + FLOOR


def pytorch_attention(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool
) -> Tensor:
    """`F.scaled_dot_product_attention` in the inputs' dtype, (batch, seqlen, heads, head_dim).

    Queries without keys give 0, as everywhere here.
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if seqlen_q * seqlen_k == 0:
        return torch.zeros_like(q)
    mask = None
    if causal and seqlen_q != seqlen_k:  # is_causal is aligned to the top left
        every_row = slice(0, seqlen_q)
        mask = reference.causal_mask(every_row, seqlen_q, torch.empty(0, seqlen_k, device=q.device))
    group = q.shape[2] // k.shape[2]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.repeat_interleave(group, dim=2).transpose(1, 2),
        v.repeat_interleave(group, dim=2).transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=softmax_scale,
    ).transpose(1, 2)
    return out if mask is None else out.masked_fill(~mask.any(1)[:, None, None], 0.0)
