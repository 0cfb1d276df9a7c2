"""Attention stated plainly in PyTorch: what CPU tensors get; in float64 the tests' reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hopper_attention.arguments import FULL, WHOLE, Lengths, Mask

QUERY_BLOCK = 1024
"""Queries scored at once: bounds memory at QUERY_BLOCK * seqlen_k scores a head."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    mask: Mask = FULL,
    softcap: float | None = None,
    sink: Tensor | None = None,
    queries: Lengths = WHOLE,
    keys: Lengths = WHOLE,
    compute_dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of q (batch, seqlen_q, heads, d), k (batch, seqlen_k, heads_kv, d), v (.., dv).

    With `queries` and `keys`, either may be packed, (total, heads, d).  Everything is computed in
    `compute_dtype`; out has `out_dtype`, by default q's, or float64 if that is computed in; lse
    (batch, heads, seqlen_q) or (heads, total_q) is `compute_dtype`.  Queries without keys: out 0,
    lse -inf or the sink.
    """
    if out_dtype is None:
        out_dtype = torch.float64 if compute_dtype == torch.float64 else q.dtype
    *rows, heads, _ = q.shape
    out = q.new_zeros((*rows, heads, v.shape[-1]), dtype=out_dtype)
    lse_shape = (heads, rows[0]) if len(rows) == 1 else (rows[0], heads, rows[1])
    lse = q.new_full(lse_shape, -torch.inf, dtype=compute_dtype)
    group = heads // k.shape[-2]
    for b in range(_sequences(q, queries)):
        at_q, at_k = _rows(q, queries, b), _rows(k, keys, b)
        for h in range(heads):
            key, value = k[at_k][:, h // group], v[at_k][:, h // group]
            head_out, head_lse = _one_head(
                q[at_q][:, h].to(compute_dtype),
                key.to(compute_dtype),
                value.to(compute_dtype),
                softmax_scale,
                mask,
                softcap,
                None if sink is None else sink[h].to(compute_dtype),
            )
            out[at_q][:, h] = head_out.to(out_dtype)
            head_rows = (h, at_q) if len(rows) == 1 else (b, h, at_q[1])
            lse[head_rows] = head_lse
    return out, lse


def gradients(
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
    queries: Lengths = WHOLE,
    keys: Lengths = WHOLE,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dsink) of sum(out * dout) + sum(lse * dlse), for `attention` as above.

    In the inputs' dtype, or float64 if that is computed in.  Rows without keys or sink have none.
    """
    dq, dk, dv = (torch.zeros(x.shape, dtype=compute_dtype, device=x.device) for x in (q, k, v))
    heads, group = q.shape[-2], q.shape[-2] // k.shape[-2]
    dsink = None if sink is None else torch.zeros(heads, dtype=compute_dtype, device=q.device)
    for b in range(_sequences(q, queries)):
        at_q, at_k = _rows(q, queries, b), _rows(k, keys, b)
        for h in range(heads):
            rows = (h, at_q) if q.dim() == 3 else (b, h, at_q[1])
            parts = _one_head_gradients(
                q[at_q][:, h].to(compute_dtype),
                k[at_k][:, h // group].to(compute_dtype),
                v[at_k][:, h // group].to(compute_dtype),
                dout[at_q][:, h].to(compute_dtype),
                None if dlse is None else dlse[rows].to(compute_dtype),
                softmax_scale,
                mask,
                softcap,
                None if sink is None else sink[h].to(compute_dtype),
            )
            dq[at_q][:, h] = parts[0]
            dk[at_k][:, h // group] += parts[1]
            dv[at_k][:, h // group] += parts[2]
            if dsink is not None:
                dsink[h] += parts[3]
    if compute_dtype == torch.float64:
        return dq, dk, dv, dsink
    if dsink is not None and sink is not None:
        dsink = dsink.to(sink.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsink


def _one_head_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    softmax_scale: float,
    mask: Mask,
    softcap: float | None,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dsink) of one head; dsink 0 without a sink."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dsink = q.new_zeros(())
    for start in range(0, len(q), QUERY_BLOCK):
        rows = slice(start, min(start + QUERY_BLOCK, len(q)))
        scores, slope = q[rows] @ k.T * softmax_scale, None
        if softcap is not None:
            tanh = torch.tanh(scores / softcap)
            scores, slope = softcap * tanh, 1 - tanh.square()
        seen = visible(mask, len(q), len(k), rows, q.device)
        scores = scores.masked_fill(~seen, -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)
        if sink is not None:
            lse = torch.logaddexp(lse, sink)
        empty = lse == -torch.inf
        p = torch.exp(scores - torch.where(empty, 0.0, lse)[:, None])
        dp = dout[rows] @ v.T
        delta = -(p * dp).sum(dim=-1)
        if dlse is not None:
            delta = delta + torch.where(empty, 0.0, dlse[rows])
        ds = p * (dp + delta[:, None])
        if slope is not None:
            ds = ds * slope
        dq[rows] = ds @ k * softmax_scale
        dk += ds.T @ q[rows] * softmax_scale
        dv += p.T @ dout[rows]
        if sink is not None:
            dsink += (torch.exp(sink - torch.where(empty, 0.0, lse)) * delta).sum()
    return dq, dk, dv, dsink


def _sequences(q: Tensor, queries: Lengths) -> int:
    return q.shape[0] if queries.cu_seqlens is None else len(queries.cu_seqlens) - 1


def _rows(tensor: Tensor, lengths: Lengths, b: int) -> Any:
    """Index of sequence b's rows: a slice of a packed tensor, or (b, slice)."""
    start, stop = 0, tensor.shape[-3]
    if lengths.cu_seqlens is not None:
        start, stop = (int(n) for n in lengths.cu_seqlens[b : b + 2])
    if lengths.seqused is not None:
        stop = start + int(lengths.seqused[b])
    rows = slice(start, stop)
    return (b, rows) if lengths.cu_seqlens is None else rows


def _one_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    mask: Mask,
    softcap: float | None,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(seqlen_q, dv) and (seqlen_q,) of q (seqlen_q, d), k (seqlen_k, d), v (seqlen_k, dv)."""
    out, lse = q.new_zeros((len(q), v.shape[-1])), q.new_full((len(q),), -torch.inf)
    for start in range(0, len(q), QUERY_BLOCK):
        rows = slice(start, min(start + QUERY_BLOCK, len(q)))
        scores = q[rows] @ k.T * softmax_scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        seen = visible(mask, len(q), len(k), rows, q.device)
        scores = scores.masked_fill(~seen, -torch.inf)
        row_lse = torch.logsumexp(scores, dim=-1)
        if sink is not None:
            row_lse = torch.logaddexp(row_lse, sink)
        # A query without keys: exp(-inf - 0) = 0, not exp(-inf - -inf) = NaN.
        shift = torch.where(row_lse == -torch.inf, 0.0, row_lse)
        out[rows] = torch.exp(scores - shift[:, None]) @ v
        lse[rows] = row_lse
    return out, lse


def visible(mask: Mask, seqlen_q: int, seqlen_k: int, rows: slice, device: torch.device) -> Tensor:
    """(rows, seqlen_k): True where a query sees a key."""
    aligned = torch.arange(rows.start, rows.stop, device=device)[:, None] + (seqlen_k - seqlen_q)
    key = torch.arange(seqlen_k, device=device)
    seen = (key >= aligned - mask.left) & (key <= aligned + mask.right)
    return seen & (key // mask.chunk == aligned.clamp(min=0) // mask.chunk)
