"""vLLM's `flash_attn_varlen_func`: its argument order, its in-place `out`, its log-sum-exp.

As in vllm-project/flash-attention at 03ef28b (vllm_flash_attn/flash_attn_interface.py), which
vllm-project/vllm carries as vllm/vllm_flash_attn/flash_attn_interface.py.  vLLM itself is not
imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hopper_attention import functional
from hopper_attention.problem import scalars, values
from hopper_attention.problem.values import FP8_TENSORS


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    q_v: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    num_splits: int = 0,
    fa_version: int | None = 3,
    s_aux: Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
    **later: object,
) -> functional.Result:
    """`hopper_attention.flash_attn_varlen_func` under vLLM's name and conventions.

    Args:
        q: (total_q, heads, head_dim), bf16 or fp16, or float8_e4m3fn with k and v; in sequences by
            `cu_seqlens_q`.
        k, v: (total_k, heads_kv, head_dim) with `cu_seqlens_k`, or (batch, seqlen_k, heads_kv,
            head_dim) with `seqused_k`.
        cu_seqlens_k, seqused_k: exactly one of the two.
        window_size: [left, right]; None or -1 is unbounded.
        out: (total_q, heads, head_dim_v), written and returned; bf16 of FP8 tensors.
        s_aux: (heads,), attention sinks.
        scheduler_metadata, num_splits, fa_version: say how others compute; nothing here depends
            on them.
        q_descale, k_descale, v_descale: of FP8 tensors, (batch, heads_kv), what values must be
            multiplied by; None: 1.  vLLM hands them over with others, too, where they mean nothing.
        later: arguments of versions to come; None is the same as leaving one out.

    Returns:
        out, and with `return_softmax_lse` the log-sum-exp (heads, total_q), float32, natural
        logarithm, sinks included.

    Raises:
        TypeError, ValueError: an argument is wrong by itself or does not fit the others.
        NotImplementedError: paged keys (`block_table`), dropout, ALiBi, `q_v`, FP8 keys or values
            with other queries, context parallelism (`cp_*`), returned probabilities, arguments of
            later versions.
        `out` is not touched in any of these cases.
    """
    if (cu_seqlens_k is None) == (seqused_k is None):
        raise ValueError("exactly one of cu_seqlens_k and seqused_k must be given")
    _refuse(block_table is not None, "block_table", PAGED)
    _refuse(scalars.real("dropout_p", dropout_p, (0.0, 1.0)) > 0, "dropout_p", "use 0")
    _refuse(q_v is not None, "q_v", "use None: attention without a second pair of queries")
    _refuse(alibi_slopes is not None, "alibi_slopes", "use None: a model without ALiBi")
    probabilities = scalars.flag("return_attn_probs", return_attn_probs)
    _refuse(probabilities, "return_attn_probs", "use return_softmax_lse")
    _refuse(scalars.integer("cp_world_size", cp_world_size, 1) > 1, "cp_world_size", MERGE)
    _refuse(scalars.integer("cp_rank", cp_rank, 0) > 0, "cp_rank", MERGE)
    _refuse(cp_tot_seqused_k is not None, "cp_tot_seqused_k", MERGE)
    for name, value in later.items():
        _refuse(value is not None, name, "leave it out")
    scalars.integer("num_splits", num_splits, 0)
    if fa_version is not None:
        scalars.integer("fa_version", fa_version, 2)
    _check_tensor("scheduler_metadata", scheduler_metadata)
    descales = _descales(q, k, v, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    return functional.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_k=seqused_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=values.NO_WINDOW if window_size is None else window_size,
        softcap=softcap,
        deterministic=deterministic,
        return_lse=scalars.flag("return_softmax_lse", return_softmax_lse),
        learnable_sink=s_aux,
        out=out,
        **descales,
    )


PAGED = (
    "gather each sequence's pages into k and v of (batch, seqlen_k, heads_kv, head_dim) and pass "
    "seqused_k"
)
MERGE = "use one rank, or merge the ranks' results by their log-sum-exp"


def _descales(q: Tensor, k: Tensor, v: Tensor, **descales: Tensor | None) -> dict[str, Any]:
    """Those of FP8 tensors; of others they mean nothing."""
    for name, descale in descales.items():
        _check_tensor(name, descale)
    query = getattr(q, "dtype", None)
    if query in FP8_TENSORS:
        return descales
    for name, tensor in (("k", k), ("v", v)):
        if getattr(tensor, "dtype", None) in FP8_TENSORS:
            raise NotImplementedError(
                f"{name} has dtype {tensor.dtype}, q has {query}: not supported; quantise q to "
                f"{FP8_TENSORS[0]}, with q_descale"
            )
    return {}


def _check_tensor(name: str, given: object) -> None:
    if given is not None and not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(given).__name__}")


def _refuse(given: bool, what: str, instead: str) -> None:
    if given:
        raise NotImplementedError(f"{what}: not supported yet; {instead}")
