"""The public functions, with flash-attn 3's parameter names and order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hopper_attention.problem import checks, scalars, values
from hopper_attention.problem.values import (
    DENSE,
    FP8_TENSORS,
    Descales,
    Lengths,
    Options,
    SequenceBounds,
)
from hopper_attention.torch_ops import attention, fp8

WindowSize = Sequence[int | None]
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
    window_size: WindowSize = values.NO_WINDOW,
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
    out_dtype: torch.dtype | None = None,
    out_descale: Tensor | None = None,
    out: Tensor | None = None,
    exact_softmax: bool = True,
) -> Result:
    """softmax(softmax_scale * q k^T) v for every batch entry and head.

    Query i is aligned with key a = i + seqlen_k - seqlen_q (bottom right).

    Args:
        q: (batch, seqlen_q, heads, head_dim), bf16 or fp16; head_dim a multiple of 8 up to 256.
            Or float8_e4m3fn, with k and v, which may be float8_e5m2; head_dim a multiple of 16; any
            strides (what TMA cannot address is copied), v with rows or columns contiguous.
        k: (batch, seqlen_k, heads_kv, head_dim), dtype and device of `q`.  `heads` must be a
            multiple of `heads_kv`; query head h reads key head h // (heads // heads_kv).
        v: (batch, seqlen_k, heads_kv, head_dim_v); head_dim_v as head_dim, and may differ from it.
            q, k and v may have any strides that are multiples of 16 bytes, with a contiguous last
            dimension.
        softmax_scale: 1e-20 to 1e6; 1 / sqrt(head_dim) by default.  Scores, scaled, are float32:
            beyond 1e7 gradients, beyond 1e9 results may have no correct digits left.  The kernels
            take unscaled scores below -1e30 for -inf.
        causal: query i sees keys up to a.
        window_size: (left, right): query i sees keys from a - left to a + right.  -1 or None:
            unbounded.  With `causal`, right is 0.
        attention_chunk: if not 0, query i sees only keys of its chunk: those j with
            j // attention_chunk == max(a, 0) // attention_chunk.
        softcap: if not 0, scores become softcap * tanh(score / softcap) after scaling; from 1e-6
            to 4096.
        num_splits: 0 (chosen by the library) or 1; the forward kernel does not split keys.
        deterministic: gradients have the same bits in every run, at some cost; implied by
            torch.use_deterministic_algorithms.  Forward is always deterministic.
        pack_gqa: whether the query heads that read one key head share tiles, which saves tiles
            where there are few queries; None: where that saves a third of them.
        sm_margin: multiprocessors that forward leaves to other work, such as communication; up to
            100, and fewer than there are.
        return_attn_probs, return_lse: either one adds the log-sum-exp to the result.
        q_descale, k_descale, v_descale: of FP8 tensors, float32, what values must be multiplied
            by: one number, (batch, heads_kv), or of blocks of 64 or 128 rows (batch, heads or
            heads_kv, blocks); None: 1.
        learnable_sink: (heads,), a score that joins each row's softmax without a value (gpt-oss);
            up to 1e38, or -inf.
        out_dtype: q's dtype by default, or torch.float32: not rounded, to be merged with others;
            without gradients.  Of FP8 tensors bf16 by default, fp16, float32 or float8_e4m3fn.
        out_descale: (1,), float32, what a float8_e4m3fn result must be multiplied by; beyond 448
            times it, it saturates.  None: 1.
        out: written and returned, where the result has a place: strides as allowed for q, no
            memory of q, k or v.  Without gradients.
        exact_softmax: of FP8 tensors; False: without exponentials, as `attention_fp8` has it, for v
            of one descale, or of (batch, heads_kv).  CPU tensors are computed exactly.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v) in `out_dtype`, and if asked for lse (batch, heads,
        seqlen_q), float32, natural logarithm, the sink included.  A query that sees no key has out
        0, and lse -inf or the sink.  Both are differentiable with respect to q, k, v and the sinks.

    Raises:
        TypeError, ValueError: an argument is wrong by itself or does not fit the others.
        NotImplementedError: a valid combination that is not supported (yet): other dtypes and head
            dims, qv, num_splits > 1, gradients of float32 results; FP8 on Ampere; a GPU without
            kernels (`dispatch.target.choose`).
        Nothing is launched and nothing written in any of these cases.

    FlashAttention-3, arXiv 2407.08608.
    """
    _check_unsupported(qv, num_splits)
    with_lse = _with_lse(return_attn_probs, return_lse)
    options = Options.of(
        softmax_scale, causal, window_size, attention_chunk, softcap, None, pack_gqa, out_dtype,
        sm_margin, deterministic,
    )  # fmt: skip
    if getattr(q, "dtype", None) in FP8_TENSORS:
        descales = Descales(q_descale, k_descale, v_descale, out_descale)
        lengths, bounds = (DENSE, DENSE), SequenceBounds()
        result, lse = fp8.attend(
            q, k, v, learnable_sink, lengths, descales, bounds, options, exact_softmax, out
        )
    else:
        if not (
            q_descale is k_descale is v_descale is out_descale is None and exact_softmax is True
        ):
            _check_of_fp8(Descales(q_descale, k_descale, v_descale, out_descale), exact_softmax)
        result, lse = attention.attend(q, k, v, learnable_sink, DENSE, DENSE, options, out)
    return (result, lse) if with_lse else result


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
    window_size: WindowSize = values.NO_WINDOW,
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
    out_dtype: torch.dtype | None = None,
    out_descale: Tensor | None = None,
    out: Tensor | None = None,
    exact_softmax: bool = True,
) -> Result:
    """`flash_attn_func` for sequences of different lengths, packed or padded; no padding is read.

    Args:
        q: (total_q, heads, head_dim), packed: sequence b is rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1]; or, with cu_seqlens_q None, (batch, seqlen_q, heads, head_dim).
        k, v: the same with cu_seqlens_k; the one may be packed and the other not.
        cu_seqlens_q, cu_seqlens_k: (batch + 1) int32, ascending from 0.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths: integers, or tensors of one.  The
            kernels find the lengths on the device, so None will do, and a tensor on a GPU means the
            same as None: nothing waits for it.
        seqused_q, seqused_k: (batch,) int32: only so many of a sequence's rows are used.
        q_descale, k_descale, v_descale: sequences in place of batch entries; of blocks, which count
            from each sequence's first row, as many as max_seqlen_q or max_seqlen_k has if rows are
            packed; as many as the tensor's rows have where they are not, or the bound is not known.
        Everything else as for `flash_attn_func`.

    Returns:
        out in q's layout, and if asked for lse (heads, total_q), or (batch, heads, seqlen_q) for an
        unpacked q.  Rows that seqused_q leaves out are 0 and -inf; packed rows behind the last
        sequence are undefined on a GPU (in training, do not multiply what comes of them: 0 * NaN);
        their gradients are 0.

    Raises:
        As `flash_attn_func`.  The values of the index tensors are checked on the CPU; on a GPU only
        with HOPPER_ATTENTION_DEBUG set, since that waits for the device.
    """
    _check_unsupported(qv, num_splits)
    with_lse = _with_lse(return_attn_probs, return_lse)
    bound_q = scalars.bound("max_seqlen_q", max_seqlen_q)
    bound_k = scalars.bound("max_seqlen_k", max_seqlen_k)
    options = Options.of(
        softmax_scale, causal, window_size, attention_chunk, softcap,
        values.packing_bound(bound_q), pack_gqa, out_dtype, sm_margin, deterministic,
    )  # fmt: skip
    queries, keys = Lengths(cu_seqlens_q, seqused_q), Lengths(cu_seqlens_k, seqused_k)
    descales = Descales(q_descale, k_descale, v_descale, out_descale)
    if getattr(q, "dtype", None) in FP8_TENSORS:
        lengths, bounds = (queries, keys), SequenceBounds(bound_q, bound_k)
        result, lse = fp8.attend(
            q, k, v, learnable_sink, lengths, descales, bounds, options, exact_softmax, out
        )
    else:
        _check_of_fp8(descales, exact_softmax)
        result, lse = attention.attend(q, k, v, learnable_sink, queries, keys, options, out)
    return (result, lse) if with_lse else result


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: WindowSize = values.NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    learnable_sink: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    exact_softmax: bool = True,
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
        num_heads_q = scalars.integer("num_heads_q", num_heads_q, 1)
        heads_kv, rest = divmod(qkv.shape[2] - num_heads_q, 2) if qkv.dim() == 4 else (0, 1)
        if rest or heads_kv < 1:
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
        out_dtype=out_dtype,
        exact_softmax=exact_softmax,
    )


def _check_unsupported(qv: Tensor | None, num_splits: int) -> None:
    """Arguments of flash-attn 3 that no kernel here serves yet."""
    if scalars.integer("num_splits", num_splits, 0) > 1:
        raise NotImplementedError(f"num_splits={num_splits}: not supported yet; use 0 or 1")
    if qv is not None:
        checks.check_unsupported(qv=qv)


def _check_of_fp8(descales: Descales, exact_softmax: bool) -> None:
    """Refuse what goes with FP8 tensors only."""
    if not scalars.flag("exact_softmax", exact_softmax):
        raise NotImplementedError("exact_softmax=False: only of FP8 tensors; leave it out")
    for name, descale in descales._asdict().items():
        if descale is not None:
            raise NotImplementedError(f"{name}: only of FP8 tensors; leave it out")


def _with_lse(return_attn_probs: bool, return_lse: bool) -> bool:
    probs = scalars.flag("return_attn_probs", return_attn_probs)
    return scalars.flag("return_lse", return_lse) or probs
