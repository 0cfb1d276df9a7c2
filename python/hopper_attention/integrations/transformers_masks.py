"""The masks of `integrations.transformers`: what transformers asked for, carried to every layer.

A mask is four-dimensional, so that it passes through `generate` (which makes masks for static
caches ahead of the compiled step) without being made anew.  What attention must know without
waiting for the device is in its dtype and shape, (batch, pattern, form, tokens):

    pattern     which `Pattern` was asked for, by its place in a table of this process
    tokens      q + k, the queries and keys it was asked for
    uint32, form 1              every token counts
    uint32, form 2              the first so many queries and the first so many keys count
    uint64, form 3              others count: the order that moves them to the front, its inverse,
                                how many they are
    uint32, form 4 or more      cu_seqlens of sequences packed in rows, the last one repeated;
                                (1, pattern, form, tokens of all rows + 1)

Dimensions over which nothing varies are expanded and cost no memory until somebody copies the
mask.  But for one query and one key, no such shape broadcasts against scores (batch, heads, q, k),
and the dtypes are nobody else's: a model that computes attention by itself with such a mask fails,
where None would have let every token see every other.  Most of these models are refused earlier,
when they are built.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAME = "hopper_attention"


ADDED_TO = (
    f"{NAME}: this model adds to its mask (or_mask_function, and_mask_function or "
    'block_sequence_ids); use attn_implementation="sdpa" or "flex_attention"'
)


class Pattern(NamedTuple):
    """Which keys a query sees, aligned to the bottom right: flash-attn's arguments."""

    causal: bool
    window: tuple[int, int] = (-1, -1)
    chunk: int = 0

    @property
    def hides(self) -> bool:
        return self != EVERYTHING


EVERYTHING = Pattern(causal=False)

_codes = [(False, -1, -1, 0), (True, -1, -1, 0)]
"""(causal, left, right, chunk) of each pattern that was asked for.

It only grows, so a graph may take an entry for constant.  Only functions that graphs do not trace
touch the list: a graph that did would be bound to its length, and made anew whenever it grows.
"""
_codes_grow = threading.Lock()
FIRST_CODE = 2
"""A dimension of 1 would broadcast."""


@torch.compiler.assume_constant_result
def _code_of(causal: bool, left: int, right: int, chunk: int) -> int:
    key = (causal, left, right, chunk)
    with _codes_grow:
        if key not in _codes:
            _codes.append(key)
        return _codes.index(key) + FIRST_CODE


@torch.compiler.assume_constant_result
def _entry(code: int, place: int) -> int:
    return _codes[code - FIRST_CODE][place]


def _pattern_of(code: int) -> Pattern:
    # Without int() a graph has something here whose type it cannot tell.
    causal, left, right, chunk = (int(_entry(code, place)) for place in range(4))
    return Pattern(bool(causal), (left, right), chunk)


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
) -> Tensor:
    """Return a mask in one of the forms above: which tokens count, who sees whom.

    Queries are tokens q_offset .. q_offset + q_length of their rows (q_offset is a tensor for a
    static cache), keys are kv_offset .. kv_offset + kv_length; those behind the last query are
    slots of a cache that nobody has written.  Outside of torch.compile this waits for the device
    once to see whether a gather is needed, as transformers' own flash mask function does.

    Raises:
        NotImplementedError: a pattern that no kernel here has: custom mask functions, blocks of
            tokens that see one another, chunks in a cache that has dropped its first keys, windows
            of queries that are not the last tokens.
    """
    pattern = _asked(mask_function, allow_is_bidirectional_skip, local_size, use_vmap, config)
    if pattern.chunk and kv_offset:
        raise NotImplementedError(
            f"{NAME}: attention_chunk_size={pattern.chunk} with a cache that has dropped its first "
            f'{kv_offset} keys; use a cache as long as the text, or attn_implementation="sdpa"'
        )
    if pattern.hides and not pattern.causal:
        last = q_offset + q_length, kv_offset + kv_length
        if not isinstance(q_offset, int) or last[0] != last[1]:
            raise NotImplementedError(
                f"{NAME}: a window of {pattern.window[0]} on both sides, whose queries "
                f"({q_length} from {q_offset}) are not the last of {last[1]} keys; use "
                'attn_implementation="sdpa"'
            )
    if device is None:  # never the default device, which may be another one
        given = next((x for x in (attention_mask, q_offset) if isinstance(x, Tensor)), None)
        device = "cpu" if given is None else given.device
    code, total = _code_of(pattern.causal, *pattern.window, pattern.chunk), q_length + kv_length
    if attention_mask is None:
        written = q_offset + q_length - kv_offset
        if not pattern.causal or (isinstance(written, int) and written == kv_length):
            packed = None
            if pattern.causal and q_length == kv_length > 1:
                packed = _packing(mask_function, batch_size, q_length, local_size, device)
            if packed is not None:
                return _cu_seqlens_form(packed, code, batch_size * q_length)
            return _plain_form(batch_size, code, total, device)
        used = torch.empty((2, batch_size), dtype=torch.int32, device=device)
        used[0] = q_length
        used[1] = written
        return _used_form(used, code, total)
    if attention_mask.ndim != 2:
        raise NotImplementedError(mask_message(attention_mask))
    end = kv_offset + kv_length
    tokens = torch.nn.functional.pad(
        attention_mask.bool()[:, :end], (0, max(end - attention_mask.shape[1], 0))
    )
    if pattern.causal:
        tokens = tokens & (torch.arange(end, device=tokens.device) < q_offset + q_length)
        queries = tokens[:, torch.arange(q_length, device=tokens.device) + q_offset]
    elif q_length == kv_length:  # where a window is, padding has no distance
        queries = tokens
    else:
        queries = tokens.new_ones(batch_size, q_length)
    return _shortest_form(queries, tokens[:, kv_offset:], code)


def _asked(
    mask_function: Callable[..., Any] | None,
    allow_is_bidirectional_skip: bool | None,
    local_size: int | None,
    use_vmap: bool,
    config: Any,
) -> Pattern:
    """The pattern behind transformers' mask function.

    Its functions cannot be taken apart in a graph, so it is inferred from what comes with them;
    `local_size` alone says nothing, since some models give one with a function that has none.
    """
    name = getattr(mask_function, "__name__", "")
    if use_vmap or name == "or_mask":
        raise NotImplementedError(ADDED_TO)
    # Only bidirectional masks are asked about that.
    causal = allow_is_bidirectional_skip is None
    if local_size is None or name in ("causal_mask_function", "bidirectional_mask_function"):
        return Pattern(causal)
    chunk = getattr(config, "attention_chunk_size", None)
    if not causal:  # both bounds belong to the window
        return Pattern(causal, (local_size, local_size))
    if local_size != chunk:
        return Pattern(causal, (local_size - 1, 0))
    if getattr(config, "sliding_window", None) == chunk:
        raise NotImplementedError(
            f"{NAME}: attention_chunk_size and sliding_window are both {chunk}, and which of them "
            'a mask is for cannot be told; use attn_implementation="sdpa"'
        )
    return Pattern(causal, chunk=chunk)


def _plain_form(batch: int, code: int, total: int, device: torch.device | str) -> Tensor:
    nothing = torch.zeros((1, 1, 1, 1), dtype=torch.int32, device=device)
    return nothing.view(torch.uint32).expand(batch, code, 1, total)


def _used_form(used: Tensor, code: int, total: int) -> Tensor:
    """used: int32 (2, batch), of queries and of keys; each is contiguous, as kernels want them."""
    return used.view(torch.uint32).T[:, None, :, None].expand(-1, code, 2, total)


def _cu_seqlens_form(cu_seqlens: Tensor, code: int, tokens: int) -> Tensor:
    ends = torch.cat([cu_seqlens, cu_seqlens[-1:]])
    return ends.view(torch.uint32)[None, None, :, None].expand(1, code, -1, tokens + 1)


def _shortest_form(queries: Tensor, keys: Tensor, code: int) -> Tensor:
    batch, total = keys.shape[0], queries.shape[1] + keys.shape[1]
    used = torch.stack([queries.sum(-1), keys.sum(-1)])
    if not in_graph():
        # Queries are some of the keys, one after another, or all count: theirs is a prefix, too.
        prefix = (keys[:, 1:] <= keys[:, :-1]).all()
        everything = queries.all() & keys.all()
        everything, prefix = torch.stack([everything, prefix]).tolist()
        if everything:
            return _plain_form(batch, code, total, keys.device)
        if prefix:
            return _used_form(used.to(torch.int32), code, total)
    orders = [torch.cat(both, dim=-1) for both in zip(to_front(queries), to_front(keys))]
    counts = torch.nn.functional.pad(used.T, (0, total - 2))
    form = torch.stack([*orders, counts], dim=1).view(torch.uint64)
    return form[:, None].expand(-1, code, -1, -1)


def _packing(
    mask_function: Callable[..., Tensor] | None,
    batch: int,
    seqlen: int,
    local_size: int | None,
    device: torch.device | str,
) -> Tensor | None:
    """cu_seqlens of what transformers found packed.

    A sequence (or chunk) begins where a token does not see the one before.  Where one sees the next
    one, blocks of tokens see one another, which transformers combines with packing under one name.
    """
    if mask_function is None or mask_function.__name__ == "causal_mask_function":
        return None
    row = torch.arange(batch, device=device)[:, None]
    query = torch.arange(1, seqlen, device=device)[None]
    restarts = ~mask_function(row, row, query, query - 1).expand(batch, -1)
    ahead = mask_function(row, row, query - 1, query).any()
    if not in_graph():
        if ahead:
            raise NotImplementedError(ADDED_TO)
        return cu_seqlens_of(restarts)
    torch._assert_async(~ahead, ADDED_TO)
    if local_size is None:  # windows and chunks may have such places, too
        assert_whole(restarts)
    return None


class Order(NamedTuple):
    """A permutation of each row, (batch, seqlen), and its inverse."""

    forward: Tensor
    back: Tensor


def to_front(tokens: Tensor) -> Order:
    """The tokens that count, in their order, then the others."""
    count = tokens.cumsum(-1)
    others = count[:, -1:] + (~tokens).cumsum(-1)
    back = torch.where(tokens, count, others) - 1
    return Order(torch.argsort(back, dim=-1), back)


def mask_message(mask: Tensor) -> str:
    return (
        f"{NAME}: attention_mask of shape {tuple(mask.shape)}; supported: (batch, tokens), 1 for "
        'tokens that count.  For other masks use attn_implementation="sdpa" or "eager"'
    )


# ------------------------------------------------------------------------------------ reading masks


class Padding(NamedTuple):
    """Tokens that count of both sides; None: all of them, or no move."""

    queries: Order | None
    used_q: Tensor | None
    keys: Order | None
    used_k: Tensor


class Made(NamedTuple):
    """A mask of `make_mask`, read."""

    pattern: Pattern
    cu_seqlens: Tensor | None = None
    padding: Padding | None = None


def is_made(mask: Tensor | None) -> bool:
    return mask is not None and mask.ndim == 4 and mask.dtype in (torch.uint32, torch.uint64)


def read(mask: Tensor, q: Tensor, k: Tensor, module: torch.nn.Module) -> Made:
    """q, k: (batch, seqlen, ...).

    Raises:
        NotImplementedError: the mask was asked for other lengths than these.
    """
    batch, code, form, total = mask.shape
    pattern = _pattern_of(int(code))
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    packed = mask.dtype == torch.uint32 and form >= 4
    if packed:
        fits = seqlen_q == seqlen_k and q.shape[0] * seqlen_q + 1 == total
    else:
        fits = seqlen_q + seqlen_k == total
    if not fits or batch not in (1, q.shape[0]):
        if form == 1 and not pattern.hides:
            return Made(pattern)
        raise NotImplementedError(
            f"{whose(module)}: the mask was made for {batch} rows of {total} queries and keys "
            f"together, attention has {q.shape[0]} rows of {seqlen_q} and {seqlen_k}: which keys "
            f'{NAME} should leave out cannot be told.  Use attn_implementation="eager" or "sdpa"'
        )
    if form == 1:
        return Made(pattern)
    if packed:
        cu_seqlens = saveable(mask.view(torch.int32)[0, 0, :-1, 0]).contiguous()
        return Made(pattern, cu_seqlens=cu_seqlens)
    mask = mask.expand(q.shape[0], -1, -1, -1)  # one row may have been asked for all
    aligned = seqlen_q > 1 and pattern.hides  # which keys a query sees depends on which it is
    if form == 2:
        rows = mask.view(torch.int32)[:, 0, :, 0]
        used_q, used_k = (saveable(rows[:, i]).contiguous() for i in (0, 1))
        return Made(pattern, padding=Padding(None, used_q if aligned else None, None, used_k))
    forward, back, counts = saveable(mask.view(torch.int64)[:, 0]).unbind(1)
    used_q, used_k = (counts[:, i].to(torch.int32) for i in (0, 1))
    keys = Order(forward[:, seqlen_q:], back[:, seqlen_q:])
    if not aligned:
        return Made(pattern, padding=Padding(None, None, keys, used_k))
    queries = Order(forward[:, :seqlen_q], back[:, :seqlen_q])
    return Made(pattern, padding=Padding(queries, used_q, keys, used_k))


def saveable(x: Tensor) -> Tensor:
    """Autograd cannot save what was made in inference mode, such as a mask made ahead in it."""
    if in_graph() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return x.clone()


def whose(module: torch.nn.Module) -> str:
    """For messages: the layer's class and its kind of model."""
    kind = getattr(getattr(module, "config", None), "model_type", None)
    return type(module).__name__ + (f" of {kind}" if kind else "")


def in_graph() -> bool:
    return torch.compiler.is_compiling() or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    )


def cu_seqlens_of(restarts: Tensor) -> Tensor | None:
    """Return cu_seqlens, from whether tokens 1, 2, ... begin a sequence; None: each row is one."""
    starts = torch.nn.functional.pad(restarts, (1, 0), value=True)
    first = starts.flatten().nonzero().flatten()  # waits for the device
    if first.shape[0] == starts.shape[0]:
        return None
    return torch.cat([first, first.new_full((1,), starts.numel())]).to(torch.int32)


def assert_whole(restarts: Tensor) -> None:
    torch._assert_async(
        ~restarts.any(),
        f"{NAME}: position_ids restart inside a row of a graph; pass cu_seq_lens_q and "
        "cu_seq_lens_k (DataCollatorWithFlattening(return_flash_attn_kwargs=True))",
    )
