"""Hugging Face transformers 5: `attn_implementation="hopper_attention"` after `register()`.

transformers calls two functions.  `make_mask` runs once a forward pass (once per kind of layer) and
says which tokens count; `attention_forward` runs in every layer.  Between them travels what a
model passes on as `attention_mask`, in one of these forms:

    None                            every query and every key counts
    int32 (batch, 1, 1, 2)          the first so many queries and the first so many keys count
    bool (batch, 1, 1, q + k)       which queries and which keys count
    int32 (1, 1, 1, 3 or more)      cu_seqlens of sequences packed in rows
    bool or int (batch, <= k)       a padding mask that a model passed on as it came

Where a mask tells tokens apart one by one, those that count are moved to the front of their rows by
a gather with static shapes, attention runs on so many of each row, and the inverse gather brings
the results back: no wait for the device and no shape that depends on data, so it all traces under
torch.compile(fullgraph=True).  The four-dimensional forms pass through `generate`, which makes
masks for static caches ahead of the compiled step, without being made anew.

Distances (sliding windows, chunks) count tokens that count, as in transformers' own flash path;
its eager and sdpa paths count padding *between* tokens, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hopper_attention.functional import flash_attn_func, flash_attn_varlen_func

NAME = "hopper_attention"
HALF = (torch.bfloat16, torch.float16)


def register() -> None:
    """Make `attn_implementation="hopper_attention"` known; again does nothing.

    Raises:
        ImportError: transformers is missing or older than 5.
    """
    import transformers
    from transformers.masking_utils import AttentionMaskInterface

    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"transformers {transformers.__version__} is too old; 5 is needed")
    transformers.AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)


# ------------------------------------------------------------------------------------------- masks


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str | None = None,
    **_: object,
) -> Tensor | None:
    """What of a batch counts, in one of the forms above; transformers' mask interface.

    Queries are tokens q_offset .. q_offset + q_length of their rows (q_offset is a tensor for a
    static cache), keys are kv_offset .. kv_offset + kv_length; those behind the last query are
    slots of a cache that nobody has written.  Outside of torch.compile this waits for the device
    once to see whether a gather is needed, as transformers' own flash mask function does.

    Raises:
        NotImplementedError: a pattern that no kernel here has: custom mask functions, blocks of
            tokens that see one another, chunks in a cache that has dropped its first keys.
    """
    causal = allow_is_bidirectional_skip is None  # only bidirectional masks are asked about that
    _check_pattern(mask_function, use_vmap)
    _check_chunks(config, local_size, kv_offset)
    if attention_mask is None:
        if not causal:
            return None
        written = q_offset + q_length - kv_offset
        if isinstance(written, int) and written == kv_length:
            return _packing(mask_function, batch_size, q_length, kv_length, local_size, device)
        return _lengths(batch_size, q_length, written, device)
    if attention_mask.ndim != 2:
        raise NotImplementedError(_mask_message(attention_mask))
    end = kv_offset + kv_length
    tokens = torch.nn.functional.pad(
        attention_mask.bool()[:, :end], (0, _missing(attention_mask, end))
    )
    if causal:
        tokens = tokens & (torch.arange(end, device=tokens.device) < q_offset + q_length)
        queries = tokens[:, torch.arange(q_length, device=tokens.device) + q_offset]
    elif q_length == kv_length:  # where a window is, padding has no distance
        queries = tokens
    else:
        queries = tokens.new_ones(batch_size, q_length)
    return _shortest_form(queries, tokens[:, kv_offset:])


def _missing(attention_mask: Tensor, end: int) -> int:
    return max(end - attention_mask.shape[1], 0)


def _shortest_form(queries: Tensor, keys: Tensor) -> Tensor | None:
    both = torch.cat([queries, keys], dim=1)
    if not _in_graph():
        # Queries are some of the keys, one after another, or all count: theirs is a prefix, too.
        prefix = (keys[:, 1:] <= keys[:, :-1]).all()
        everything, prefix_only = torch.stack([both.all(), prefix]).tolist()
        if everything:
            return None
        if prefix_only:
            used = torch.stack([queries.sum(-1), keys.sum(-1)], dim=-1)
            return used.to(torch.int32)[:, None, None, :]
    return both[:, None, None, :]


def _packing(
    mask_function: Callable[..., Tensor] | None,
    batch: int,
    seqlen: int,
    seqlen_k: int,
    local_size: int | None,
    device: torch.device | str | None,
) -> Tensor | None:
    """cu_seqlens of what transformers found packed, for models whose layers get no position_ids.

    A sequence (or chunk) begins where a token does not see the one before.
    """
    if mask_function is None or mask_function.__name__ == "causal_mask_function":
        return None
    if seqlen != seqlen_k or seqlen == 1:
        return None
    row = torch.arange(batch, device=device)[:, None]
    query = torch.arange(1, seqlen, device=device)[None]
    restarts = ~mask_function(row, row, query, query - 1).expand(batch, -1)
    if not _in_graph():
        offsets = _cu_seqlens(restarts)
        return None if offsets is None else offsets[None, None, None]
    if local_size is None:  # windows and chunks may have such places, too
        _assert_whole(restarts)
    return None


def _lengths(
    batch: int, queries: int, keys: int | Tensor, device: torch.device | str | None
) -> Tensor:
    used = torch.empty(2, dtype=torch.int32, device=device)
    used[0] = queries
    used[1] = keys
    return used.expand(batch, 1, 1, 2)


def _check_pattern(mask_function: Callable[..., Any] | None, use_vmap: bool) -> None:
    """Only causal, bidirectional, local, chunked and packed patterns reach the kernels."""
    if use_vmap or getattr(mask_function, "__name__", "") == "or_mask":
        raise NotImplementedError(
            f"{NAME}: this model adds to its causal mask (or_mask_function, and_mask_function or "
            'block_sequence_ids); use attn_implementation="sdpa" or "flex_attention"'
        )


def _check_chunks(config: Any, local_size: int | None, kv_offset: int) -> None:
    chunk = getattr(config, "attention_chunk_size", None)
    if local_size is None or local_size != chunk or kv_offset == 0:
        return
    raise NotImplementedError(
        f"{NAME}: attention_chunk_size={chunk} with a cache that has dropped its first {kv_offset} "
        'keys; use a cache as long as the text, or attn_implementation="sdpa"'
    )


def _mask_message(mask: Tensor) -> str:
    return (
        f"{NAME}: attention_mask of shape {tuple(mask.shape)}; supported: (batch, tokens), 1 for "
        'tokens that count.  For other masks use attn_implementation="sdpa"'
    )


# --------------------------------------------------------------------------------------- attention

CHANGES_THE_RESULT = (
    *("position_bias", "alibi", "attn_bias", "bias", "head_mask", "sinks"),
    *("indices", "block_indices", "topk_indices", "attention_chunk", "output_attentions"),
    *("cache", "block_table", "k_cache", "v_cache"),
)
"""Of what models hand to attention functions; the rest says how, or is for others."""


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    deterministic: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """One layer's attention; transformers' attention interface.

    Args:
        module: the layer; its `is_causal`, if the argument is not given.
        query: (batch, heads, seqlen_q, head_dim), bf16 or fp16.  In float32 (autocast, or norms
            that were cast up) it is computed and returned in autocast's dtype, or the one of the
            layer's weights.
        key, value: (batch, heads_kv, seqlen_k, head_dim).
        attention_mask: what `make_mask` returned, or (batch, tokens).
        sliding_window: W: a query sees itself and W - 1 keys before, and without causality as
            many behind.
        s_aux: (heads,), attention sinks.
        position_ids: (batch or 1, seqlen_q).  Without a mask (or one that hides nothing) and a
            cache, positions that restart separate sequences packed into a row.  Seeing that takes
            one wait for the device in a forward pass; a graph (torch.compile, CUDA graphs) cannot
            wait, so there packing must be given as `cu_seq_lens_q`
            (DataCollatorWithFlattening(return_flash_attn_kwargs=True)), and positions that restart
            without are a failed device assertion.
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1), of sequences packed in one row.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v), 0 at padding, and None for the weights.

    Raises:
        NotImplementedError: dropout, weights, masks or arguments that no kernel here has, a
            model in float32.
        ValueError: both a mask and cu_seq_lens.
    """
    _check_call(dropout, kwargs)
    query, key, value = (x.transpose(1, 2) for x in _cast(module, query, key, value))
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "causal": causal,
        "window_size": _window(sliding_window, causal),
        "attention_chunk": _chunk(module),
        "softcap": softcap or 0.0,
        "learnable_sink": s_aux,
        "deterministic": bool(deterministic),
    }
    if attention_mask is not None and _holds_cu_seqlens(attention_mask):
        if cu_seq_lens_q is None:
            cu_seq_lens_q = cu_seq_lens_k = attention_mask.flatten()
        attention_mask = None
    if attention_mask is not None:
        if cu_seq_lens_q is not None:
            raise ValueError("attention_mask and cu_seq_lens_q are both given; give one of them")
        if _in_graph() and attention_mask.dtype != torch.int32:
            # Where all tokens count, an eager call sees no mask, but perhaps packed sequences.
            positions = _own_positions(position_ids, query, key)
            if positions is not None:
                _assert_whole(_restarts(positions) & attention_mask.bool().all())
        return _padded(query, key, value, attention_mask, options), None
    if cu_seq_lens_q is None:
        cu_seq_lens_q = _sequences(position_ids, query, key)
        cu_seq_lens_k = cu_seq_lens_q
    if cu_seq_lens_q is None:
        return flash_attn_func(query, key, value, **options), None  # type: ignore[return-value]
    bounds = (max_length_q, max_length_k)
    return _packed(query, key, value, cu_seq_lens_q, cu_seq_lens_k, bounds, options), None


def _check_call(dropout: float, others: dict[str, object]) -> None:
    if dropout:
        raise NotImplementedError(
            f"{NAME}: dropout={dropout} is not supported; set the config's attention_dropout to 0"
        )
    for name in CHANGES_THE_RESULT:
        value = others.get(name)
        if value is not None and value is not False:
            raise NotImplementedError(
                f'{name}: not supported by {NAME}; use attn_implementation="eager" or "sdpa"'
            )


def _cast(module: torch.nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
    query = tensors[0]
    if query.dtype != torch.float32:
        return tensors
    device = query.device.type
    dtype: Any
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        # Quantized weights have no dtype to compute in; their config says it.
        linear = next((m for m in module.modules() if isinstance(m, torch.nn.Linear)), None)
        weights = query.dtype if linear is None else linear.weight.dtype
        dtype = (
            weights if weights in HALF else getattr(getattr(module, "config", None), "dtype", None)
        )
    if dtype not in HALF:
        raise NotImplementedError(
            f"{NAME}: a model in {query.dtype}; load it with dtype=torch.bfloat16 or "
            "torch.float16, or run it under torch.autocast"
        )
    return tuple(x.to(dtype) for x in tensors)


def _window(sliding_window: int | None, causal: bool) -> tuple[int, int]:
    if sliding_window is None:
        return (-1, -1)
    return (sliding_window - 1, 0 if causal else sliding_window - 1)


def _chunk(module: torch.nn.Module) -> int:
    """Llama 4's attention chunks: no argument says so, only the layer's type."""
    config: Any = getattr(module, "config", None)
    layer = getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    if layer is None or not types or types[layer] != "chunked_attention":
        return 0
    return config.attention_chunk_size


# -------------------------------------------------------------------------- once in a forward pass

Derived = TypeVar("Derived")


def _once_a_tensor(derive: Callable[..., Derived]) -> Callable[..., Derived]:
    """All layers are given the same mask and positions: what follows from them is kept with them.

    Not in graphs, which must compute it when they run, nor of inference tensors, which do not
    count their changes.
    """
    kept: Any = WeakTensorKeyDictionary()

    @functools.wraps(derive)
    def derived(tensor: Tensor, *arguments: object) -> Derived:
        if _in_graph() or tensor.is_inference():
            return derive(tensor, *arguments)
        key = (tensor._version, *arguments)
        known = kept.get(tensor)
        if known is None or known[0] != key:
            kept[tensor] = known = (key, derive(tensor, *arguments))
        return known[1]

    return derived


def _in_graph() -> bool:
    return torch.compiler.is_compiling() or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    )


# ---------------------------------------------------------------------------------- padded batches


class Padding(NamedTuple):
    """Tokens that count of both sides; None: all of them, or no move."""

    queries: Order | None
    used_q: Tensor | None
    keys: Order | None
    used_k: Tensor


class Order(NamedTuple):
    """A permutation of each row, (batch, seqlen), and its inverse."""

    forward: Tensor
    back: Tensor


def _padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    aligned = q.shape[1] > 1 and (options["causal"] or options["window_size"] != (-1, -1))
    padding = _padding(mask, q.shape[1], k.shape[1], aligned)
    if padding.queries is not None:
        q = Reorder.apply(q, *padding.queries)
    if padding.keys is not None:
        k, v = Reorder.apply(k, *padding.keys), Reorder.apply(v, *padding.keys)
    out = flash_attn_varlen_func(
        q, k, v, None, None, None, None, padding.used_q, padding.used_k, **options
    )
    if padding.queries is not None:
        out = Reorder.apply(out, padding.queries.back, padding.queries.forward)
    return out  # type: ignore[return-value]


@_once_a_tensor
def _padding(mask: Tensor, seqlen_q: int, seqlen_k: int, aligned: bool) -> Padding:
    """aligned: whether which keys a query sees depends on which query it is."""
    if mask.ndim == 4 and mask.shape[1:] == (1, 1, 2) and mask.dtype == torch.int32:
        used_q, used_k = (x.contiguous() for x in mask[:, 0, 0].unbind(-1))
        return Padding(None, used_q if aligned else None, None, used_k)
    queries, keys = _tokens(mask, seqlen_q, seqlen_k)
    used_k = keys.sum(-1, dtype=torch.int32)
    if not aligned:
        return Padding(None, None, _to_front(keys), used_k)
    if queries.shape[1] < seqlen_q:
        raise NotImplementedError(_mask_message(mask))
    return Padding(_to_front(queries), queries.sum(-1, dtype=torch.int32), _to_front(keys), used_k)


def _tokens(mask: Tensor, seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor]:
    """Which queries and which keys count, bool (batch, seqlen)."""
    both = (1, 1, seqlen_q + seqlen_k)
    if mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1:] == both:
        queries, keys = mask[:, 0, 0].split([seqlen_q, seqlen_k], dim=-1)
        return queries, keys
    if mask.ndim != 2 or mask.shape[1] > seqlen_k:
        raise NotImplementedError(_mask_message(mask))
    # transformers' convention: the mask ends with the queries; keys behind it are unwritten.
    keys = torch.nn.functional.pad(mask.bool(), (0, seqlen_k - mask.shape[1]))
    return mask.bool()[:, -seqlen_q:], keys


def _to_front(tokens: Tensor) -> Order:
    """The tokens that count, in their order, then the others."""
    count = tokens.cumsum(-1)
    others = count[:, -1:] + (~tokens).cumsum(-1)
    back = torch.where(tokens, count, others) - 1
    return Order(torch.argsort(back, dim=-1), back)


class Reorder(torch.autograd.Function):
    """Rows of x (batch, seqlen, heads, head_dim) in another order; its gradient in the old one.

    As a gather, which has no atomics: the derivative of torch.gather adds, since it cannot know
    that no row is taken twice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:]))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        order, back = ctx.saved_tensors
        return Reorder.apply(gradient, back, order), None, None


# ---------------------------------------------------------------------------------- packed batches


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    bounds: tuple[int | Tensor | None, int | Tensor | None],
    options: dict[str, Any],
) -> Tensor:
    if cu_seqlens_k is None:
        raise ValueError("cu_seq_lens_q is given, cu_seq_lens_k is not")
    same = cu_seqlens_k is cu_seqlens_q
    cu_seqlens_q = cu_seqlens_q.to(torch.int32)
    cu_seqlens_k = cu_seqlens_q if same else cu_seqlens_k.to(torch.int32)
    rows = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    out: Any = flash_attn_varlen_func(
        rows[0], rows[1], rows[2], cu_seqlens_q, cu_seqlens_k, *bounds, **options
    )
    return out.view(*q.shape[:-1], -1)


def _sequences(position_ids: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """cu_seqlens of sequences packed into rows, or None where each row is one.

    In a graph the number of sequences would have to be a bound, the number of tokens; every tile
    looks for its sequence among them, which would cost more than attention.
    """
    positions = _own_positions(position_ids, q, k)
    if positions is None:
        return None
    if _in_graph():
        _assert_whole(_restarts(positions))
        return None
    return _offsets(positions, q.shape[0])


def _own_positions(position_ids: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Of positions that are those of the layer's own tokens, without a cache."""
    seqlen, seqlen_k = q.shape[1], k.shape[1]
    if seqlen == 1 or seqlen != seqlen_k:
        return None
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != seqlen:
        return None  # three-dimensional ones are places in an image and say nothing of sequences
    return position_ids


@_once_a_tensor
def _offsets(position_ids: Tensor, batch: int) -> Tensor | None:
    return _cu_seqlens(_restarts(position_ids).expand(batch, -1))


def _holds_cu_seqlens(mask: Tensor) -> bool:
    of_one = mask.ndim == 4 and mask.shape[:3] == (1, 1, 1)
    return of_one and mask.dtype == torch.int32 and mask.shape[3] > 2


def _cu_seqlens(restarts: Tensor) -> Tensor | None:
    """Of rows in which tokens 1, 2, ... begin a sequence or not; None: each row is one."""
    starts = torch.nn.functional.pad(restarts, (1, 0), value=True)
    first = starts.flatten().nonzero().flatten()  # waits for the device
    if first.shape[0] == starts.shape[0]:
        return None
    return torch.cat([first, first.new_full((1,), starts.numel())]).to(torch.int32)


def _assert_whole(restarts: Tensor) -> None:
    torch._assert_async(
        ~restarts.any(),
        f"{NAME}: position_ids restart inside a row of a graph; pass cu_seq_lens_q and "
        "cu_seq_lens_k (DataCollatorWithFlattening(return_flash_attn_kwargs=True))",
    )


def _restarts(position_ids: Tensor) -> Tensor:
    """Whether tokens 1, 2, ... of each row begin a sequence.

    Where positions fall, or are the row's least one again (not always 0): transformers' rule for
    its flash path, which leaves positions that jump ahead alone.
    """
    later = position_ids[:, 1:]
    return (later < position_ids[:, :-1]) | (later == position_ids.amin(-1, keepdim=True))
