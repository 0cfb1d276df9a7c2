"""Attention stated plainly in PyTorch: what CPU tensors get; in float64 the tests' reference."""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_BLOCK = 1024
"""Queries scored at once: bounds memory at QUERY_BLOCK * seqlen_k scores a head."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of q (batch, seqlen_q, heads, d) and k, v (batch, seqlen_k, heads_kv, d).

    Everything is computed in `compute_dtype`; out has q's dtype, or float64 if that is computed in;
    lse (batch, heads, seqlen_q) is `compute_dtype`.  Queries without keys: out 0, lse -inf.
    """
    batch, seqlen_q, heads, _ = q.shape
    out_dtype = torch.float64 if compute_dtype == torch.float64 else q.dtype
    out = q.new_empty(q.shape, dtype=out_dtype)
    lse = q.new_empty((batch, heads, seqlen_q), dtype=compute_dtype)
    if out.numel() == 0:
        return out, lse
    group = heads // k.shape[2]
    for b in range(batch):
        for h in range(heads):
            keys = k[b, :, h // group].to(compute_dtype)
            values = v[b, :, h // group].to(compute_dtype)
            for start in range(0, seqlen_q, QUERY_BLOCK):
                rows = slice(start, min(start + QUERY_BLOCK, seqlen_q))
                scores = q[b, rows, h].to(compute_dtype) @ keys.T * softmax_scale
                if causal:
                    scores.masked_fill_(~causal_mask(rows, seqlen_q, scores), -torch.inf)
                row_lse = torch.logsumexp(scores, dim=-1)
                # A query without keys: exp(-inf - 0) = 0, not exp(-inf - -inf) = NaN.
                shift = torch.where(row_lse == -torch.inf, 0.0, row_lse)
                out[b, rows, h] = (torch.exp(scores - shift[:, None]) @ values).to(out_dtype)
                lse[b, h, rows] = row_lse
    return out, lse


def causal_mask(rows: slice, seqlen_q: int, scores: Tensor) -> Tensor:
    """True where a query of `rows` sees a key: bottom-right aligned."""
    seqlen_k = scores.shape[-1]
    query = torch.arange(rows.start, rows.stop, device=scores.device)[:, None]
    key = torch.arange(seqlen_k, device=scores.device)
    return key <= query + (seqlen_k - seqlen_q)
