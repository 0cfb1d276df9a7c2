"""The error criterion: a result is judged beside PyTorch's in the same dtype, both against FP64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hopper_attention import reference
from hopper_attention.problem.values import CAUSAL, FULL, Mask

FLOOR = 1e-5
"""Absolute error below which nothing is judged: PyTorch may happen to be exact."""


@dataclass(frozen=True)
class Error:
    """Errors of one tensor against FP64."""

    maximum: float
    rms: float

    @staticmethod
    def of(result: Tensor, exact: Tensor) -> Error:
        if result.numel() == 0:
            return Error(0.0, 0.0)
        difference = (result.double() - exact.double()).abs()
        return Error(difference.max().item(), difference.square().mean().sqrt().item())

    def within_twice(self, other: Error, floor: float = FLOOR) -> bool:
        """At most twice the other error plus `floor`; false for NaN."""
        return self.maximum <= 2 * other.maximum + floor and self.rms <= 2 * other.rms + floor


def cancellation(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, softmax_scale: float) -> float:
    """A floor for errors of gradients: what float32 leaves of dP - rowsum(dO * O) = 0.

    That is so for a row with one key: PyTorch, which sums both in the same order, may be exact.
    """
    if min(x.numel() for x in (q, k, v, dout)) == 0:
        return 0.0
    longest = [x.float().norm(dim=-1).max().item() for x in (v, dout)]
    largest = max(x.abs().max().item() for x in (q, k))
    return 1e-6 * math.prod(longest) * largest * softmax_scale


def pytorch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    mask: Mask = FULL,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """PyTorch's attention in the inputs' dtype, (batch, seqlen, heads, head_dim).

    `F.scaled_dot_product_attention` where it has the feature, else the same steps written out.
    Queries without keys give 0, as everywhere here.
    """
    (batch, seqlen_q, heads, _), seqlen_k = q.shape, k.shape[1]
    if seqlen_q * seqlen_k == 0:
        return q.new_zeros((batch, seqlen_q, heads, v.shape[-1]))
    group = heads // k.shape[2]
    q, k, v = (
        x.transpose(1, 2)
        for x in (q, k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2))
    )
    top_left_causal = mask == CAUSAL and seqlen_q == seqlen_k
    seen = None
    if mask != FULL and not top_left_causal:
        seen = reference.visible(mask, seqlen_q, seqlen_k, slice(0, seqlen_q), q.device)
    if softcap is None and sink is None:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=top_left_causal, scale=softmax_scale
        )
    else:
        if top_left_causal:
            seen = reference.visible(mask, seqlen_q, seqlen_k, slice(0, seqlen_q), q.device)
        out = _eager(q, k, v, softmax_scale, seen, softcap, sink)
    out = out.transpose(1, 2)
    return out if seen is None else out.masked_fill(~seen.any(1)[:, None, None], 0.0)


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    seen: Tensor | None,
    softcap: float | None,
    sink: Tensor | None,
) -> Tensor:
    """Eager attention as transformers has it, on (batch, heads, seqlen, head_dim)."""
    scores = q @ k.mT * softmax_scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if seen is not None:
        # The caller clears rows without keys; NaN would remain in their gradients.
        scores = scores.masked_fill(~seen & seen.any(-1, keepdim=True), -torch.inf)
    if sink is not None:
        column = sink.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return weights[..., : k.shape[-2]] @ v


def pytorch_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    *,
    softmax_scale: float,
    mask: Mask = FULL,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dsink) as autograd makes them of `pytorch_attention` in the inputs' dtype.

    With `dlse`, of the steps written out: `F.scaled_dot_product_attention` does not return it.
    """
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    if sink is not None:
        inputs.append(sink.detach().requires_grad_())
    scalars = {"softmax_scale": softmax_scale, "softcap": softcap, "mask": mask}
    with torch.enable_grad():
        own_sink = inputs[3] if sink is not None else None
        # V as wide as q: PyTorch's flash kernel, which is given out as ours is, takes no other.
        wide = F.pad(inputs[2], (0, max(q.shape[-1] - v.shape[-1], 0)))
        out = pytorch_attention(*inputs[:2], wide, **scalars, sink=own_sink)  # type: ignore
        total = (out[..., : v.shape[-1]] * dout).sum()
        if dlse is not None:
            lse = _eager_lse(inputs[0], inputs[1], softmax_scale, mask, softcap, own_sink)
            total = total + (lse * dlse).sum()
    if not total.requires_grad:  # nothing was attended to
        found: tuple[Tensor | None, ...] = (None,) * len(inputs)
    else:
        found = torch.autograd.grad(total, inputs, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs)]
    return grads[0], grads[1], grads[2], grads[3] if sink is not None else None


def _eager_lse(
    q: Tensor,
    k: Tensor,
    softmax_scale: float,
    mask: Mask,
    softcap: float | None,
    sink: Tensor | None,
) -> Tensor:
    """(batch, heads, seqlen_q); 0 where there is nothing to attend to."""
    (_, seqlen_q, heads, _), seqlen_k = q.shape, k.shape[1]
    k = k.repeat_interleave(heads // k.shape[2], dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = reference.visible(mask, seqlen_q, seqlen_k, slice(0, seqlen_q), q.device)
    scores = scores.float().masked_fill(~seen, -torch.inf)
    if sink is not None:
        column = sink.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.logsumexp(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty[..., 0], 0.0)
