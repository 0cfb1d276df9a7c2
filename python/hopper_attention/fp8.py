"""Attention in FP8: of tensors that are quantised here (`attention_fp8`), or were before."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hopper_attention.problem import scalars, values
from hopper_attention.problem.quantization import Fp8Options, Recipe
from hopper_attention.problem.values import DENSE, Lengths, Options
from hopper_attention.torch_ops.fp8 import attend_quantised


def attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    recipe: str | Recipe = "block64",
    hadamard: bool = False,
    smooth_k: bool = False,
    two_level: bool | None = None,
    accumulate_every: int = 1,
    exact_softmax: bool = True,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = values.NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    learnable_sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_func` with Q, K and V quantised to e4m3; gradients as if they were not.

    Backward is that of `flash_attn_func`, in bf16 or fp16, with this forward's results.

    Args:
        q, k, v: as for `flash_attn_func`, or with lengths as for `flash_attn_varlen_func`, bf16 or
            fp16; head dims multiples of 16.
        recipe: which elements share a scale: "per_tensor", "per_head", "block64", "block128".
        hadamard: Q and K are rotated first, which spreads outliers over a head's columns.
        smooth_k: the mean of K over its sequence is taken off first, which no softmax sees.
        two_level: P V of each key block is added to O in float32, since FP8 tensor cores keep about
            14 bits of their sums; None: where there is a kernel for it.
        accumulate_every: with two_level, so many key blocks (of 128 keys, of 64 in some kernels)
            are summed by the tensor cores before; a power of two.
        exact_softmax: False: P is rounded from its logarithm, without exponentials; full and causal
            masks, head dims up to 128.  Faster by the model, less exact where few keys outweigh
            many (docs/fp8.md), lse and so gradients included; V then has one scale a head,
            whatever the recipe.  CPU tensors are computed exactly.
        max_seqlen_q, max_seqlen_k: upper bounds of packed lengths, by default the tensors' rows:
            scales take memory for so many.  On a GPU, they are not checked; a tensor there means
            the same as None.
        Everything else as for those two.

    Returns:
        out in q's layout, with v's head dim, in q's dtype, and if asked for lse.

    Raises:
        TypeError, ValueError: as `flash_attn_func`.
        NotImplementedError: smooth_k with softcap or sinks, which see what it takes off; two_level
            of head dims beyond 128; exact_softmax=False with windows, softcap or such head dims.
    """
    options = Options.of(
        softmax_scale, causal, window_size, attention_chunk, softcap, deterministic=deterministic
    )
    treatment = Fp8Options.of(
        recipe, hadamard, two_level, accumulate_every, exact_softmax, max_seqlen_q, max_seqlen_k
    )
    smooth_k = scalars.flag("smooth_k", smooth_k)
    return_lse = scalars.flag("return_lse", return_lse)
    lengths = _lengths(cu_seqlens_q, seqused_q), _lengths(cu_seqlens_k, seqused_k)
    out, lse = attend_quantised(
        q, k, v, learnable_sink, lengths, options, treatment, smooth_k, return_lse
    )
    return (out, lse) if return_lse else out


def _lengths(cu_seqlens: Tensor | None, seqused: Tensor | None) -> Lengths:
    return DENSE if cu_seqlens is seqused is None else Lengths(cu_seqlens, seqused)
