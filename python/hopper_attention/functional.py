"""The public functions, with flash-attn 3's parameter names and order."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hopper_attention import arguments, dispatch, reference, runtime
from hopper_attention.arguments import WHOLE, Lengths, Mask
from hopper_attention.ranges import annotated

WindowSize = Sequence[int | None]
MAX_SM_MARGIN = 100
"""Every sm_90 GPU has more multiprocessors."""
Result = Tensor | tuple[Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    learnable_sink: Tensor | None = None,
) -> Result:
    """softmax(softmax_scale * q k^T) v for every batch entry and head.

    Query i is aligned with key a = i + seqlen_k - seqlen_q (bottom right).

    Args:
        q: (batch, seqlen_q, heads, head_dim), bf16 or fp16; head_dim a multiple of 8 up to 256.
        k: (batch, seqlen_k, heads_kv, head_dim), dtype and device of `q`.  `heads` must be a
            multiple of `heads_kv`; query head h reads key head h // (heads // heads_kv).
        v: (batch, seqlen_k, heads_kv, head_dim_v); head_dim_v as head_dim, and may differ from it.
            q, k and v may have any strides that are multiples of 16 bytes, with a contiguous last
            dimension.
        softmax_scale: positive; 1 / sqrt(head_dim) by default.
        causal: query i sees keys up to a.
        window_size: (left, right): query i sees keys from a - left to a + right.  -1 or None:
            unbounded.  With `causal`, right is 0.
        attention_chunk: if not 0, query i sees only keys of its chunk: those j with
            j // attention_chunk == a // attention_chunk.
        softcap: if not 0, scores become softcap * tanh(score / softcap) after scaling.
        num_splits: 0 (chosen by the library) or 1; the forward kernel does not split keys.
        deterministic: accepted; forward is always deterministic.
        sm_margin: multiprocessors to leave to other work, such as communication.
        return_attn_probs, return_lse: either one adds the log-sum-exp to the result.
        learnable_sink: (heads,), a score that joins each row's softmax without a value (gpt-oss).

    Returns:
        out (batch, seqlen_q, heads, head_dim_v) in q's dtype, and if asked for lse (batch, heads,
        seqlen_q), float32, natural logarithm, the sink included.  A query that sees no key has out
        0, and lse -inf or the sink.

    Raises:
        TypeError, ValueError: an argument is wrong by itself or does not fit the others.
        NotImplementedError: a valid combination that is not supported (yet): other dtypes and head
            dims, gradients, qv, descales, num_splits > 1, pack_gqa; a GPU that is not sm_90.
        Nothing is launched and nothing written in any of these cases.

    FlashAttention-3, arXiv 2407.08608.
    """
    _check_hints(qv, q_descale, k_descale, v_descale, num_splits, pack_gqa, sm_margin)
    arguments.check_tensors(q, k, v)
    layout = (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype), False, False, False
    plan = _plan(*layout, softmax_scale, causal, window_size, attention_chunk, softcap)
    sink = arguments.resolve_sink(learnable_sink, q)
    out, lse = _forward(plan, q, k, v, sink, sm_margin)
    return (out, lse) if return_attn_probs or return_lse else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    learnable_sink: Tensor | None = None,
) -> Result:
    """`flash_attn_func` for sequences of different lengths, packed or padded; no padding is read.

    Args:
        q: (total_q, heads, head_dim), packed: sequence b is rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1]; or, with cu_seqlens_q None, (batch, seqlen_q, heads, head_dim).
        k, v: the same with cu_seqlens_k; the one may be packed and the other not.
        cu_seqlens_q, cu_seqlens_k: (batch + 1) int32, ascending from 0.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths, on the host or the device; the
            kernels find the lengths on the device, so nothing waits for these and None will do.
        seqused_q, seqused_k: (batch,) int32: only so many of a sequence's rows are used.
        Everything else as for `flash_attn_func`.

    Returns:
        out in q's layout, and if asked for lse (heads, total_q), or (batch, heads, seqlen_q) for an
        unpacked q.  Rows that seqused_q leaves out are 0 and -inf.

    Raises:
        As `flash_attn_func`.  The values of the index tensors are checked on the CPU; on a GPU only
        with HOPPER_ATTENTION_DEBUG set, since that waits for the device.
    """
    _check_hints(qv, q_descale, k_descale, v_descale, num_splits, pack_gqa, sm_margin)
    arguments.check_tensors(q, k, v)
    shapes, dtypes = (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype)
    layout = shapes, dtypes, cu_seqlens_q is not None, cu_seqlens_k is not None, True
    plan = _plan(*layout, softmax_scale, causal, window_size, attention_chunk, softcap)
    queries, keys = Lengths(cu_seqlens_q, seqused_q), Lengths(cu_seqlens_k, seqused_k)
    batch = _batch(q, k, queries, keys)
    arguments.check_index("cu_seqlens_q", cu_seqlens_q, batch + 1, q)
    arguments.check_index("cu_seqlens_k", cu_seqlens_k, batch + 1, q)
    arguments.check_index("seqused_q", seqused_q, batch, q)
    arguments.check_index("seqused_k", seqused_k, batch, q)
    arguments.check_lengths("q", queries, q.shape[-3])
    arguments.check_lengths("k", keys, k.shape[-3])
    for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if bound is not None and not isinstance(bound, (int, Tensor)):
            raise TypeError(f"{name}: expected an integer, got {type(bound).__name__}")
    sink = arguments.resolve_sink(learnable_sink, q)
    out, lse = _forward(plan, q, k, v, sink, sm_margin, queries, keys, batch)
    return (out, lse) if return_attn_probs or return_lse else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: WindowSize = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    learnable_sink: Tensor | None = None,
) -> Result:
    """`flash_attn_func` on views of one tensor; nothing is copied.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim); or with `num_heads_q`, for GQA, (batch, seqlen,
            num_heads_q + 2 * heads_kv, head_dim).
        Everything else as for `flash_attn_func`, and what it returns and raises.
    """
    if not isinstance(qkv, Tensor):
        raise TypeError(f"qkv: expected a torch.Tensor, got {type(qkv).__name__}")
    if num_heads_q is None:
        if qkv.dim() != 5 or qkv.shape[2] != 3:
            raise ValueError(
                f"qkv has shape {tuple(qkv.shape)}; expected (batch, seqlen, 3, heads, head_dim), "
                "or num_heads_q and (batch, seqlen, num_heads_q + 2 * heads_kv, head_dim)"
            )
        q, k, v = qkv.unbind(dim=2)
    else:
        heads_kv, rest = divmod(qkv.shape[2] - num_heads_q, 2) if qkv.dim() == 4 else (0, 1)
        if rest or heads_kv < 1 or num_heads_q < 1:
            raise ValueError(
                f"qkv has shape {tuple(qkv.shape)}; with num_heads_q={num_heads_q} expected "
                "(batch, seqlen, num_heads_q + 2 * heads_kv, head_dim)"
            )
        q, k, v = qkv.split([num_heads_q, heads_kv, heads_kv], dim=2)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
        return_lse=return_lse,
        learnable_sink=learnable_sink,
    )


def _check_hints(
    qv: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    num_splits: int,
    pack_gqa: bool | None,
    sm_margin: int,
) -> None:
    """Arguments of flash-attn 3 that no kernel here serves yet."""
    if not (isinstance(sm_margin, int) and 0 <= sm_margin <= MAX_SM_MARGIN):
        raise ValueError(f"sm_margin must be between 0 and {MAX_SM_MARGIN}, got {sm_margin!r}")
    if qv is q_descale is k_descale is v_descale is None and not pack_gqa:
        if num_splits in (0, 1):
            return
        raise NotImplementedError(f"num_splits={num_splits}: not supported yet; use 0 or 1")
    arguments.check_unsupported(
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        pack_gqa=pack_gqa or None,
    )


LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "num_sequences")


@dataclass(frozen=True)
class Plan:
    """What all calls of one kind share: shapes, dtypes and options checked, the instance chosen."""

    instance: str
    scale: float
    mask: Mask
    softcap: float | None
    lse_shape: tuple[int, ...]
    varlen: bool

    @functools.cached_property
    def scalars(self) -> list[float | int]:
        """The instance's scalar arguments where none of them stands for a tensor."""
        return self.scalars_with({})

    def scalars_with(self, tensors: dict[str, int]) -> list[float | int]:
        """The same with addresses and the number of sequences by name; 0 where absent."""
        values: dict[str, float | int] = {
            **dict.fromkeys(("learnable_sink", *LENGTHS), 0),
            "softmax_scale": self.scale,
            "softcap": self.softcap or 0.0,
            "window_left": self.mask.left,
            "window_right": self.mask.right,
            "attention_chunk": self.mask.chunk,
            **tensors,
        }
        return [values[name] for name in runtime.scalar_names(self.instance)]


def _plan(*key: Any) -> Plan:
    """As `_make_plan`, looked up where it was made before."""
    try:
        return _cached_plan(*key)
    except TypeError:  # a list is as good a window as a tuple; what else has no hash is refused
        return _make_plan(*key)


def _make_plan(
    shapes: tuple[torch.Size, torch.Size, torch.Size],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    packed_q: bool,
    packed_k: bool,
    varlen: bool,
    softmax_scale: float | None,
    causal: bool,
    window_size: WindowSize,
    attention_chunk: int,
    softcap: float,
) -> Plan:
    arguments.check_dtypes(*dtypes)
    q, k, v = shapes
    arguments.check_shapes(q, k, v, packed_q, packed_k)
    scale = arguments.resolve_scale(softmax_scale, q[-1])
    mask = arguments.resolve_mask(causal, window_size, attention_chunk, q[-3], k[-3])
    cap = arguments.resolve_softcap(softcap)
    dtype = arguments.DTYPES[dtypes[0]]
    has_cap = cap is not None
    instance = dispatch.forward_instance(dtype, q[-1], v[-1], mask.kind, has_cap, varlen)
    *rows, heads, _ = q
    lse_shape = (heads, *rows) if packed_q else (rows[0], heads, rows[1])
    return Plan(instance, scale, mask, cap, lse_shape, varlen)


_cached_plan = functools.lru_cache(maxsize=1024)(_make_plan)


def _batch(q: Tensor, k: Tensor, queries: Lengths, keys: Lengths) -> int:
    """Number of sequences, which whatever names it first says; the others are held to it."""
    sides = (("q", q, queries), ("k", k, keys))
    counts = {}
    for name, tensor, lengths in sides:
        cu_seqlens = lengths.cu_seqlens
        if cu_seqlens is None:
            counts[name] = tensor.shape[0]
        elif isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 and len(cu_seqlens) > 0:
            counts[f"cu_seqlens_{name}"] = cu_seqlens.shape[0] - 1
        else:
            raise ValueError(f"cu_seqlens_{name}: expected an int32 vector of batch + 1")
    (first, batch), (second, other) = counts.items()
    if batch != other:
        raise ValueError(f"{second} has {other} sequences, {first} has {batch}")
    return batch


@annotated("forward")
def _forward(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    sm_margin: int,
    queries: Lengths = WHOLE,
    keys: Lengths = WHOLE,
    batch: int = 0,
) -> tuple[Tensor, Tensor]:
    """(out, lse) on whatever q's device has; the arguments are known to fit."""
    backend = runtime.backend_for(q)
    q, k, v = (
        arguments.addressable("q", q),
        arguments.addressable("k", k),
        arguments.addressable("v", v),
    )
    if backend is runtime.Backend.REFERENCE:
        return reference.attention(
            q, k, v, softmax_scale=plan.scale, mask=plan.mask, softcap=plan.softcap, sink=sink,
            queries=queries, keys=keys,
        )  # fmt: skip
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty(plan.lse_shape, dtype=torch.float32)
    if sink is None and not plan.varlen:
        if out.numel() > 0:
            operands = (q, k, v, out, lse)
            runtime.launch(backend, plan.instance, operands, plan.scalars, sm_margin=sm_margin)
        return out, lse
    if queries.seqused is not None:
        out.zero_()
        lse.fill_(-torch.inf)
    pointers = {
        "learnable_sink": sink,
        "cu_seqlens_q": queries.cu_seqlens,
        "cu_seqlens_k": keys.cu_seqlens,
        "seqused_q": queries.seqused,
        "seqused_k": keys.seqused,
    }
    given = {name: tensor for name, tensor in pointers.items() if tensor is not None}
    numbers = {name: tensor.data_ptr() for name, tensor in given.items()}
    scalars = plan.scalars_with(numbers | {"num_sequences": batch})
    views = [*(_as_entry(x, 4) for x in (q, k, v, out)), _as_entry(lse, 3)]
    if out.numel() > 0 and (batch > 0 or not plan.varlen):
        pointees = tuple(given.values())
        runtime.launch(backend, plan.instance, views, scalars, pointees, sm_margin)
    return out, lse


def _as_entry(tensor: Tensor, rank: int) -> Tensor:
    """Packed tensors are one batch entry."""
    return tensor.unsqueeze(0) if tensor.ndim < rank else tensor
