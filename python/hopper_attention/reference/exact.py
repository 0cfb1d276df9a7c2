"""Attention stated plainly in PyTorch: what CPU tensors get; in float64 the tests' reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from hopper_attention.problem.values import DENSE, FULL, Lengths, Mask

Function = TypeVar("Function", bound=Callable)
SCORES = 1 << 25
"""How many are held at once, so that memory stays bounded."""


def _in_own_dtype(function: Function) -> Function:
    """Outside autocast, which would round what is multiplied."""

    @functools.wraps(function)
    def wrapped(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


@_in_own_dtype
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    mask: Mask = FULL,
    softcap: float | None = None,
    sink: Tensor | None = None,
    queries: Lengths = DENSE,
    keys: Lengths = DENSE,
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
    for b in range(_sequences(q, queries)):
        at_q, at_k = _rows(q, queries, b), _rows(k, keys, b)
        out_rows, lse_rows = _one_sequence(
            q[at_q].to(compute_dtype),
            k[at_k].to(compute_dtype),
            v[at_k].to(compute_dtype),
            softmax_scale,
            mask,
            softcap,
            None if sink is None else sink.to(compute_dtype),
        )
        out[at_q] = out_rows.to(out_dtype)
        _rows_of_statistics(lse, at_q)[:] = lse_rows
    return out, lse


@_in_own_dtype
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
    queries: Lengths = DENSE,
    keys: Lengths = DENSE,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dsink) of sum(out * dout) + sum(lse * dlse), for `attention` as above.

    In the inputs' dtype, or float64 if that is computed in.  Rows without keys or sink have none.
    `out` and `lse`: what forward returned, or, for the share of these keys in the gradients, the
    result over more keys; computed anew if not given, which is more exact than a rounded `out`.
    """
    dq, dk, dv = (x.new_zeros(x.shape, dtype=compute_dtype) for x in (q, k, v))
    dsink = None if sink is None else sink.new_zeros(sink.shape, dtype=compute_dtype)
    if out is None or lse is None:
        out, lse = attention(
            q.to(compute_dtype), k.to(compute_dtype), v.to(compute_dtype),
            softmax_scale=softmax_scale, mask=mask, softcap=softcap, sink=sink, queries=queries,
            keys=keys, compute_dtype=compute_dtype,
        )  # fmt: skip
    for b in range(_sequences(q, queries)):
        at_q, at_k = _rows(q, queries, b), _rows(k, keys, b)
        row_lse = _rows_of_statistics(lse, at_q).to(compute_dtype)
        # sum_j p_ij dp_ij, by the chain rule; and a row's LSE moves with its scores as p does.
        delta = -(out[at_q].to(compute_dtype) * dout[at_q].to(compute_dtype)).sum(dim=-1).T
        if dlse is not None:
            dlse_rows = _rows_of_statistics(dlse, at_q).to(compute_dtype)
            delta = delta + torch.where(row_lse == -torch.inf, 0.0, dlse_rows)
        parts = _one_sequence_gradients(
            q[at_q].to(compute_dtype),
            k[at_k].to(compute_dtype),
            v[at_k].to(compute_dtype),
            dout[at_q].to(compute_dtype),
            row_lse,
            delta,
            softmax_scale,
            mask,
            softcap,
        )
        dq[at_q], dk[at_k], dv[at_k] = parts
        if sink is not None and dsink is not None:
            dsink += (_weights(sink.to(compute_dtype)[:, None], row_lse) * delta).sum(dim=-1)
    if compute_dtype == torch.float64:
        return dq, dk, dv, dsink
    if dsink is not None and sink is not None:
        dsink = dsink.to(sink.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsink


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


def _rows_of_statistics(statistics: Tensor, at_q: Any) -> Tensor:
    """(heads, rows) of a tensor like lse, for an index of q's rows."""
    return statistics[:, at_q] if isinstance(at_q, slice) else statistics[at_q[0], :, at_q[1]]


def _one_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    mask: Mask,
    softcap: float | None,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(seqlen_q, heads, dv) and (heads, seqlen_q) of q (seqlen_q, heads, d), k, v."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    (heads, seqlen_q, _), (heads_kv, seqlen_k, _) = q.shape, k.shape
    out, lse = q.new_empty((heads, seqlen_q, v.shape[-1])), q.new_empty((heads, seqlen_q))
    for rows in _blocks_of_queries(seqlen_q, seqlen_k, heads):
        scores = _ungrouped(_grouped(q[:, rows], heads_kv) @ k.mT, heads) * softmax_scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores.masked_fill_(~visible(mask, seqlen_q, seqlen_k, rows, q.device), -torch.inf)
        p, lse[:, rows] = _softmax(scores, sink)
        out[:, rows] = _ungrouped(_grouped(p, heads_kv) @ v, heads)
    return out.transpose(0, 1), lse


def _one_sequence_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    softmax_scale: float,
    mask: Mask,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the shapes of q, k, v; lse and delta (heads, seqlen_q)."""
    q, k, v, dout = (x.transpose(0, 1) for x in (q, k, v, dout))
    (heads, seqlen_q, _), (heads_kv, seqlen_k, _) = q.shape, k.shape
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows in _blocks_of_queries(seqlen_q, seqlen_k, heads):
        query, dout_rows = _grouped(q[:, rows], heads_kv), _grouped(dout[:, rows], heads_kv)
        scores, slope = _ungrouped(query @ k.mT, heads) * softmax_scale, None
        if softcap is not None:
            tanh = torch.tanh(scores / softcap)
            scores, slope = softcap * tanh, 1 - tanh.square()
        scores.masked_fill_(~visible(mask, seqlen_q, seqlen_k, rows, q.device), -torch.inf)
        p = _weights(scores, lse[:, rows, None])
        ds = p * (_ungrouped(dout_rows @ v.mT, heads) + delta[:, rows, None])
        if slope is not None:
            ds = ds * slope
        ds, p = _grouped(ds, heads_kv) * softmax_scale, _grouped(p, heads_kv)
        dq[:, rows] = _ungrouped(ds @ k, heads)
        dk += ds.mT @ query
        dv += p.mT @ dout_rows
    return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)


def _blocks_of_queries(seqlen_q: int, seqlen_k: int, heads: int) -> Iterator[slice]:
    step = max(1, SCORES // max(1, heads * seqlen_k))
    for start in range(0, seqlen_q, step):
        yield slice(start, min(start + step, seqlen_q))


def _grouped(heads: Tensor, heads_kv: int) -> Tensor:
    """(heads, rows, n) -> (heads_kv, group * rows, n): what meets one key head, together."""
    count, rows, n = heads.shape
    return heads.reshape(heads_kv, count // heads_kv * rows, n)


def _ungrouped(grouped: Tensor, heads: int) -> Tensor:
    """(heads_kv, group * rows, n) -> (heads, rows, n)."""
    heads_kv, rows, n = grouped.shape
    return grouped.reshape(heads, heads_kv * rows // heads, n)


def _softmax(scores: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities of scores (heads, rows, keys), and the rows' LSE.

    `sink` (heads,) joins each row without a column.  A row without keys and sink: 0, LSE -inf.
    """
    heads, rows, keys = scores.shape
    top = scores.new_full((heads, rows, 1), -torch.inf)
    if keys > 0:
        top = scores.amax(dim=-1, keepdim=True)
    if sink is not None:
        top = torch.maximum(top, sink[:, None, None])
    top = torch.where(top == -torch.inf, 0.0, top)
    e = torch.exp(scores - top)
    total = e.sum(dim=-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink[:, None, None] - top)
    return e / total.masked_fill(total == 0, 1.0), (top + torch.log(total)).squeeze(-1)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(-|scores - lse|), which a rounded LSE cannot make more than 1, as in the kernels.

    A query without keys: exp(-inf - 0) = 0, not exp(-inf - -inf) = NaN.
    """
    return torch.exp(-(scores - torch.where(lse == -torch.inf, 0.0, lse)).abs())


def visible(mask: Mask, seqlen_q: int, seqlen_k: int, rows: slice, device: torch.device) -> Tensor:
    """(rows, seqlen_k): True where a query sees a key."""
    aligned = torch.arange(rows.start, rows.stop, device=device)[:, None] + (seqlen_k - seqlen_q)
    key = torch.arange(seqlen_k, device=device)
    seen = (key >= aligned - mask.left) & (key <= aligned + mask.right)
    return seen & (key // mask.chunk == aligned.clamp(min=0) // mask.chunk)
