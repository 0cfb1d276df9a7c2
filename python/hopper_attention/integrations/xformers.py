"""xFormers' `memory_efficient_attention`: its shapes, its attention biases, its log-sum-exp.

As in facebookresearch/xformers 0.0.3x (xformers/ops/fmha/__init__.py and attn_bias.py).  xFormers
itself is not imported: biases are known by the names of their classes, so that they work wherever
they come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hopper_attention import functional
from hopper_attention.problem import scalars


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: object = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """softmax(scale * query key^T + attn_bias) value.

    Args:
        query: (batch, M, K), (batch, M, heads, K) or (batch, M, groups, heads, K); bf16 or fp16.
        key, value: the same with their length.  Of five dimensions, groups that are expanded over
            their heads (stride 0) are read once, as grouped-query attention.
        attn_bias: None, or an attention bias of xFormers that is a mask: see `MASKS`.  Block
            diagonal ones pack their sequences into rows of batch 1.
        p: dropout; must be 0.
        scale: 1 / sqrt(K) by default.
        op: must be None: the operator is this one.
        output_dtype: query's, or torch.float32.

    Returns:
        (batch, M, [[groups,] heads,] Kv), differentiable.

    Raises:
        ValueError: an argument is wrong by itself or does not fit the others.
        NotImplementedError: dropout, biases that are tensors or that hold one, paged keys, and
            masks aligned at the top left in blocks with more queries than keys.
    """
    return _attention(query, key, value, attn_bias, p, scale, op, output_dtype)[0]


memory_efficient_attention_forward = memory_efficient_attention


def memory_efficient_attention_forward_requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: object = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`memory_efficient_attention` and its log-sum-exp.

    Returns:
        out, and lse (batch, [groups,] heads, M), float32, natural logarithm; of block diagonal
        biases batch is 1 and M is all queries.
    """
    return _attention(query, key, value, attn_bias, p, scale, op, output_dtype)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any,
    p: float,
    scale: float | None,
    op: object,
    output_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    if scalars.real("p", p, (0.0, 1.0)) > 0:
        raise NotImplementedError(f"p={p}: dropout is not supported; use p=0.0")
    if op is not None:
        raise NotImplementedError("op: other operators are xFormers' own; use op=None")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if not query.ndim == key.ndim == value.ndim or query.ndim not in (3, 4, 5):
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(
            f"query, key and value have shapes {shapes}; expected (batch, M, K), (batch, M, heads, "
            "K) or (batch, M, groups, heads, K), all three alike"
        )
    problem = Problem(*_four_dimensions(query, key, value), {"causal": False})
    problem = _masked(problem, attn_bias)
    options = {**problem.options, "softmax_scale": scale, "out_dtype": output_dtype}
    out, lse = problem.run(options)
    return out.reshape(*query.shape[:-1], value.shape[-1]), _lse_shape(lse, query)


def _four_dimensions(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, M, heads, K), key and value with as many heads as are in memory."""
    if query.ndim == 3:
        return query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2)
    if query.ndim == 4:
        return query, key, value
    if query.shape[2:4] != key.shape[2:4] or key.shape[2:4] != value.shape[2:4]:
        heads = ", ".join(str(tuple(x.shape[2:4])) for x in (query, key, value))
        raise ValueError(f"query, key and value have (groups, heads) {heads}; expected the same")
    if key.stride(3) == value.stride(3) == 0:
        return query.flatten(2, 3), key[:, :, :, 0], value[:, :, :, 0]
    return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)


def _lse_shape(lse: Tensor, query: Tensor) -> Tensor:
    """From (batch, heads, M)."""
    if query.ndim == 3:
        return lse.squeeze(1)
    return lse.unflatten(1, query.shape[2:4]) if query.ndim == 5 else lse


# ------------------------------------------------------------------------------------------- masks


@dataclass(frozen=True)
class Problem:
    """The call to make: with cu_seqlens, rows of batch 1 hold all sequences."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None

    def run(self, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """out (batch, M, heads, Kv) and lse (batch, heads, M)."""
        result: Any
        if self.cu_seqlens_q is None:
            result = functional.flash_attn_func(self.q, self.k, self.v, **options, return_lse=True)
            return result
        result = functional.flash_attn_varlen_func(
            self.q[0],
            self.k[0],
            self.v[0],
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.max_seqlen_q,
            self.max_seqlen_k,
            seqused_k=self.seqused_k,
            **options,
            return_lse=True,
        )
        out, lse = result
        return out[None], lse[None]

    def with_options(self, **options: Any) -> Problem:
        return replace(self, options=options)


def _masked(problem: Problem, bias: Any) -> Problem:
    if bias is None:
        return problem
    return MASKS[_name(bias)](problem, bias)


def _name(bias: Any) -> str:
    """The class of xFormers' that says which keys are seen.

    A class derived from it may add what it likes but not another mask.  LowerTriangularMask is a
    subclass of torch.Tensor without values; a real tensor has none of the names.
    """
    if type(bias).__name__ in MASKS:
        return type(bias).__name__  # compilers cannot read base classes
    for kind in type(bias).__mro__:
        if kind.__name__ in MASKS:
            return kind.__name__
        if kind.__dict__.keys() & {"materialize", "_create_block_mask", "__dataclass_fields__"}:
            break
    raise NotImplementedError(f"attn_bias: {type(bias).__name__} is not supported; {NEAREST}")


def _causal(problem: Problem, bias: Any) -> Problem:
    return problem.with_options(causal=True)


def _causal_from_top_left(problem: Problem, bias: Any) -> Problem:
    """Query i sees keys up to i, wherever the keys end."""
    seqlen_q, seqlen_k = problem.q.shape[1], problem.k.shape[1]
    if seqlen_q <= seqlen_k:  # nobody sees the keys behind
        k, v = problem.k[:, :seqlen_q], problem.v[:, :seqlen_q]
        return replace(problem, k=k, v=v).with_options(causal=True)
    return problem.with_options(window_size=(-1, seqlen_q - seqlen_k))


def _local(problem: Problem, bias: Any) -> Problem:
    sides = ((name, getattr(bias, name)) for name in ("window_left", "window_right"))
    left, right = (scalars.integer(f"attn_bias.{name}", side, -1) for name, side in sides)
    return problem.with_options(window_size=(left, right))


def _causal_local(problem: Problem, bias: Any) -> Problem:
    """A query sees itself and the _window_size - 1 keys before."""
    window = scalars.integer("attn_bias._window_size", bias._window_size, 1)
    return problem.with_options(causal=True, window_size=(window - 1, 0))


Masking = Callable[[Problem, Any], Problem]


def _in_blocks(mask: Masking | None = None) -> Masking:
    def masked(problem: Problem, bias: Any) -> Problem:
        problem = _blocks(problem, bias)
        return problem if mask is None else mask(problem, bias)

    return masked


def _in_blocks_from_top_left(mask: Masking) -> Masking:
    """Leave out the keys behind the queries of a block, which nobody sees."""

    def masked(problem: Problem, bias: Any) -> Problem:
        queries, keys = (_lengths(s.seqstart_py) for s in (bias.q_seqinfo, bias.k_seqinfo))
        if any(q > k for q, k in zip(queries, keys)):
            raise NotImplementedError(
                f"attn_bias: {type(bias).__name__} with more queries than keys in a block is not "
                "supported; use BlockDiagonalCausalFromBottomRightMask, or as many keys"
            )
        problem = mask(_blocks(problem, bias), bias)
        if queries == keys:
            return problem
        used = problem.cu_seqlens_q.diff()  # type: ignore[union-attr]
        return replace(problem, seqused_k=used)

    return masked


def _blocks(problem: Problem, bias: Any) -> Problem:
    """The sequences of a bias; those of keys may be shorter than the room they have."""
    queries, keys, device = bias.q_seqinfo, bias.k_seqinfo, problem.q.device
    _check_rows("query", problem.q, queries)
    _check_rows("key", problem.k, keys)
    used = getattr(keys, "seqlen", None)
    if used is not None:
        _check_room(keys.seqstart_py, keys.seqlen_py)
    first = keys.seqstart_py[0]  # the kernels' begin at 0
    return replace(
        problem,
        k=problem.k[:, first:],
        v=problem.v[:, first:],
        cu_seqlens_q=_on(queries.seqstart, device),
        cu_seqlens_k=_on(keys.seqstart, device) - first,
        seqused_k=None if used is None else _on(used, device),
        max_seqlen_q=_longest("q_seqinfo", queries),
        max_seqlen_k=_longest("k_seqinfo", keys),
    )


def _longest(name: str, seqinfo: Any) -> int:
    """xFormers has -1 where there are no sequences."""
    return max(scalars.integer(f"attn_bias.{name}.max_seqlen", seqinfo.max_seqlen, -1), 0)


def _check_room(starts: list[int], lengths: list[int]) -> None:
    if any(used > room for used, room in zip(lengths, _lengths(starts))):
        raise NotImplementedError(
            f"attn_bias: blocks of {lengths} keys at {starts} overlap or descend; give each block "
            "its own keys, in order"
        )


def _check_rows(name: str, x: Tensor, seqinfo: Any) -> None:
    rows = seqinfo.seqstart_py[-1]
    if x.shape[0] != 1 or x.shape[1] != rows:
        raise ValueError(
            f"{name} has (batch, M) {tuple(x.shape[:2])}; attn_bias packs (1, {rows}) rows"
        )


def _lengths(starts: list[int]) -> list[int]:
    return [end - start for start, end in zip(starts, starts[1:])]


def _on(index: Tensor, device: torch.device) -> Tensor:
    return index.to(device=device, dtype=torch.int32, non_blocking=True)


MASKS: dict[str, Masking] = {
    "LowerTriangularMask": _causal_from_top_left,
    "LowerTriangularFromBottomRightMask": _causal,
    "LowerTriangularFromBottomRightLocalAttentionMask": _causal_local,
    "LocalAttentionFromBottomRightMask": _local,
    "BlockDiagonalMask": _in_blocks(),
    "BlockDiagonalCausalMask": _in_blocks_from_top_left(_causal),
    "BlockDiagonalCausalFromBottomRightMask": _in_blocks(_causal),
    "BlockDiagonalCausalLocalAttentionMask": _in_blocks_from_top_left(_causal_local),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": _in_blocks(_causal_local),
    "BlockDiagonalPaddedKeysMask": _in_blocks(),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": _in_blocks(_causal),
    "BlockDiagonalLocalAttentionPaddedKeysMask": _in_blocks(_local),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": _in_blocks(_causal_local),
    "BlockDiagonalGappyKeysMask": _in_blocks(),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": _in_blocks(_causal),
}
"""Readers of masks by the name of xFormers' class; those with pages of their own are not here."""

NEAREST = "use one of " + ", ".join(MASKS)
