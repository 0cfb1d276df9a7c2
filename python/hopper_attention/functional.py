"""The public functions: arguments checked and normalised, then the device's implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from hopper_attention import dispatch, reference, runtime
from hopper_attention.ranges import annotated

SUPPORTED_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


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
    window_size: Sequence[int | None] = (-1, -1),
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
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softmax_scale * q k^T) v for every batch entry and head.

    Parameter names and order are those of flash-attn 3.

    Args:
        q: (batch, seqlen_q, heads, head_dim), bf16 or fp16.
        k, v: (batch, seqlen_k, heads_kv, head_dim), dtype and device of `q`.  `heads` must be a
            multiple of `heads_kv`; query head h reads key head h // (heads // heads_kv).
            q, k and v may have any strides that are multiples of 16 bytes, with a contiguous last
            dimension; head_dim is 64, 128 or 256.
        softmax_scale: positive; 1 / sqrt(head_dim) by default.
        causal: query i sees key j if j <= i + seqlen_k - seqlen_q (aligned to the bottom right).
        window_size: (left, right); only windows that mask nothing, or just what `causal` masks, are
            supported so far.  -1 or None: unbounded.
        num_splits: 0 (chosen by the library) or 1; the forward kernel does not split keys.
        deterministic: accepted; forward is always deterministic.
        return_attn_probs, return_lse: either one adds the log-sum-exp to the result.

    Returns:
        out (batch, seqlen_q, heads, head_dim) in q's dtype, and if asked for lse (batch, heads,
        seqlen_q), float32, natural logarithm.  A query that sees no key has out 0 and lse -inf.

    Raises:
        TypeError, ValueError: an argument is wrong by itself or does not fit the others.
        NotImplementedError: a valid combination that is not supported (yet): other dtypes and head
            dims, gradients, qv, descales, windows, attention_chunk, softcap, learnable_sink,
            num_splits > 1, pack_gqa, sm_margin; a GPU that is not sm_90.
        Nothing is launched and nothing written in any of these cases.

    FlashAttention-3, arXiv 2407.08608.
    """
    no_tensors = qv is q_descale is k_descale is v_descale is learnable_sink is None
    if not no_tensors or attention_chunk or softcap or pack_gqa or sm_margin:
        _refuse_unsupported(
            qv=qv,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            attention_chunk=attention_chunk or None,
            softcap=softcap or None,
            learnable_sink=learnable_sink,
            pack_gqa=pack_gqa or None,
            sm_margin=sm_margin or None,
        )
    if num_splits not in (0, 1):
        raise NotImplementedError(f"num_splits={num_splits}: not supported yet; use 0 or 1")
    _check_tensors(q, k, v)
    scale = _softmax_scale(softmax_scale, q.shape[-1])
    causal = _resolve_mask(causal, window_size, q.shape[1], k.shape[1])
    out, lse = _forward(q, k, v, scale, causal)
    return (out, lse) if return_attn_probs or return_lse else out


@annotated("forward")
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    backend = runtime.backend_for(q)
    batch, seqlen_q, heads, head_dim = q.shape
    instance = dispatch.forward_instance(SUPPORTED_DTYPES[q.dtype], head_dim, causal)
    q, k, v = _addressable("q", q), _addressable("k", k), _addressable("v", v)
    if backend is runtime.Backend.REFERENCE:
        return reference.attention(q, k, v, softmax_scale=scale, causal=causal)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)
    if batch and seqlen_q and heads:
        runtime.launch(backend, instance, (q, k, v, out, lse), (scale,))
    return out, lse


def _refuse_unsupported(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}: not supported yet; leave it at its default")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Types, devices, dtypes, ranks, and the shapes that must match."""
    if not isinstance(q, Tensor):
        raise TypeError(f"q: expected a torch.Tensor, got {type(q).__name__}")
    device, dtype, grad_enabled = q.device, q.dtype, torch.is_grad_enabled()
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, q is on {device}")
        if tensor.dtype not in SUPPORTED_DTYPES:
            raise NotImplementedError(
                f"{name} has dtype {tensor.dtype}; supported: torch.bfloat16, torch.float16"
            )
        if tensor.dtype is not dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, q has {dtype}")
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected (batch, seqlen, heads, head_dim)"
            )
        if grad_enabled and tensor.requires_grad:
            raise NotImplementedError(
                f"{name} requires grad, and there is no backward yet; use torch.no_grad()"
            )
    batch, _, heads, head_dim = q.shape
    k_shape, v_shape = k.shape, v.shape
    for name, shape in (("k", k_shape), ("v", v_shape)):
        if shape[0] != batch:
            raise ValueError(f"{name} has batch {shape[0]}, q has {batch}")
        if shape[3] != head_dim:
            raise ValueError(f"{name} has head_dim {shape[3]}, q has {head_dim}")
    for axis, what in ((1, "seqlen"), (2, "heads")):
        if v_shape[axis] != k_shape[axis]:
            raise ValueError(f"v has {what} {v_shape[axis]}, k has {k_shape[axis]}")
    heads_kv = k_shape[2]
    if heads_kv == 0 or heads % heads_kv != 0:
        raise ValueError(f"q has {heads} heads, not a multiple of the {heads_kv} of k and v")


def _addressable(name: str, tensor: Tensor) -> Tensor:
    """The tensor as TMA can address it: contiguous rows, everything else in steps of 16 bytes.

    That goes for strides which an extent of 1 leaves unused, too: those are replaced.
    """
    batch, seqlen, head, last = tensor.stride()
    step = 8  # elements of two bytes
    if last == 1 and not ((batch | seqlen | head) % step or tensor.data_ptr() % 16):
        return tensor
    if tensor.numel() == 0:
        return tensor
    if last != 1:
        raise ValueError(
            f"{name}: the last dimension must be contiguous (stride 1, got {last}); "
            f"use {name}.contiguous()"
        )
    for axis, stride in enumerate((batch, seqlen, head)):
        if tensor.shape[axis] > 1 and stride % step != 0:
            raise ValueError(
                f"{name}: stride {stride} of dimension {axis} is not a multiple of "
                f"{step} elements (16 bytes); use {name}.contiguous()"
            )
    if tensor.data_ptr() % 16 != 0:
        raise ValueError(f"{name}: the data pointer is not aligned to 16 bytes; use {name}.clone()")
    strides = [s if n > 1 else tensor.shape[-1] for n, s in zip(tensor.shape[:3], tensor.stride())]
    return tensor.as_strided(tensor.shape, [*strides, 1])


def _softmax_scale(softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return 1.0 / math.sqrt(head_dim) if head_dim else 1.0
    if not isinstance(softmax_scale, Real):
        raise TypeError(f"softmax_scale: expected a number, got {type(softmax_scale).__name__}")
    scale = float(softmax_scale)
    if not (math.isfinite(scale) and scale > 0.0):
        raise ValueError(f"softmax_scale must be positive and finite, got {scale}")
    return scale


def _resolve_mask(
    causal: bool, window_size: Sequence[int | None], seqlen_q: int, seqlen_k: int
) -> bool:
    """Whether the mask is causal; windows that are neither full nor causal raise."""
    if window_size == (-1, -1):
        return bool(causal)
    try:
        left, right = (-1 if w is None else int(w) for w in window_size)
    except (TypeError, ValueError):
        raise ValueError(f"window_size must be (left, right), got {window_size!r}") from None
    if left < 0 or left >= seqlen_k - 1:
        left = -1
    if right < 0 or right >= seqlen_q - 1:
        right = -1
    if left == -1 and (right == -1 or causal or right == 0):
        return bool(causal) or right == 0
    raise NotImplementedError(
        f"window_size={tuple(window_size)}: sliding windows are not supported yet; "
        "use (-1, -1), with causal=True or not"
    )
