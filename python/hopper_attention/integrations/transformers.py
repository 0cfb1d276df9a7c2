"""Hugging Face transformers 5: `attn_implementation="hopper_attention"` after `register()`.

transformers calls two functions.  `make_mask` runs once a forward pass (once per kind of layer) and
is told which tokens see which; `attention_forward` runs in every layer and is told little of that,
at times nothing or something else (`is_causal` missing or wrong, no window).  transformers' own
eager attention does what the mask says, and so does this: `make_mask` always returns a mask, which
carries the pattern that was asked for, and `attention_forward` applies that pattern.  What a layer
says of itself counts only where no mask was asked for.

`transformers_masks` has the forms of masks.  Where the tokens that count are not the first ones of
their rows, a gather with static shapes moves them there, attention runs on so many of each row, and
the inverse gather brings the results back: no wait for the device and no shape that depends on
data, so it all traces under torch.compile(fullgraph=True).

Distances (sliding windows, chunks) count tokens that count, as in transformers' own flash path;
its eager and sdpa paths count padding *between* tokens, too.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hopper_attention.functional import flash_attn_func, flash_attn_varlen_func
from hopper_attention.integrations.transformers_masks import (
    NAME,
    Padding,
    Pattern,
    assert_whole,
    cu_seqlens_of,
    in_graph,
    is_made,
    make_mask,
    mask_message,
    read,
    to_front,
    whose,
)

HALF = (torch.bfloat16, torch.float16)


def register() -> None:
    """Make `attn_implementation="hopper_attention"` known; again does nothing.

    Models that compute attention by themselves are refused when they are built with it, or set to
    it: NotImplementedError with the class's name.

    Raises:
        ImportError: transformers is missing or older than 5.
    """
    import transformers
    from transformers.masking_utils import AttentionMaskInterface

    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"transformers {transformers.__version__} is too old; 5 is needed")
    transformers.AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)
    _check_classes_of(transformers.PreTrainedModel)


# ----------------------------------------------------------------------------------------- classes


def _check_classes_of(base: Any) -> None:
    """Look at models of `base` when they are built with this attention, or set to it.

    transformers itself accepts each registered name for each model.  Every model, and every model
    inside of another, runs these two methods: one before it has modules (and again in
    set_attn_implementation), the other when it has them.
    """
    if hasattr(base.post_init, "knows_hopper_attention"):
        return
    check, finish = base.get_correct_attn_implementation, base.post_init

    @functools.wraps(check)
    def get_correct_attn_implementation(self: Any, *arguments: Any, **options: Any) -> str:
        chosen = check(self, *arguments, **options)
        if chosen == NAME:
            model: Any = type(self)
            _check_class(model, _own_attention(model) or _own_scores(self))
        return chosen

    @functools.wraps(finish)
    def post_init(self: Any, *arguments: Any, **options: Any) -> None:
        finish(self, *arguments, **options)
        if self.config._attn_implementation == NAME:
            _check_class(type(self), _own_scores(self))

    post_init.knows_hopper_attention = True  # type: ignore[attr-defined]
    base.get_correct_attn_implementation = get_correct_attn_implementation
    base.post_init = post_init


def _check_class(model: type, own: str | None) -> None:
    if own is not None:
        raise NotImplementedError(
            f"{NAME}: {model.__name__} computes its own attention ({own}) and would not call this; "
            'use attn_implementation="eager", or "sdpa" where it has that.  Parts of a larger '
            f'model can differ: attn_implementation={{"": "{NAME}", "vision_config": "eager"}}'
        )


@functools.cache
def _own_attention(model: type) -> str | None:
    """A class of attention beside `model` that does not know transformers' attention interface.

    The source decides, as in transformers' own test of whether attention can be set: whether the
    file that defines the class refers to ALL_ATTENTION_FUNCTIONS.  Files of transformers and of the
    hub hold one model each.  Users' files may hold anything: there, only what a class derives from
    is looked at.
    """
    for ancestor in model.__mro__:
        if ancestor.__module__ == "transformers.modeling_utils":
            return _table_of_layers(model)
        if not ancestor.__module__.startswith(("transformers.models.", "transformers_modules.")):
            continue
        for thing in vars(sys.modules[ancestor.__module__]).values():
            if not isinstance(thing, type) or not issubclass(thing, torch.nn.Module):
                continue
            named = re.search("Attention|Attn", thing.__name__)
            if named and not hasattr(sys.modules[thing.__module__], "ALL_ATTENTION_FUNCTIONS"):
                return thing.__name__
    return None


def _table_of_layers(model: type) -> str | None:
    """A table without our name in which `model`, or a layer it refers to, looks its layers up."""
    seen, left = {model}, [model]
    while left:
        layer = left.pop()
        try:
            source, beside = inspect.getsource(layer), vars(sys.modules[layer.__module__])
        except (OSError, TypeError, KeyError):  # of a notebook, or a file that was only executed
            continue
        if table := re.search(r"(\w+ATTENTION_CLASSES)\[", source):
            return table[1]
        for name in set(re.findall(r"\b[A-Z]\w+", source)):
            thing = beside.get(name)
            if isinstance(thing, type) and issubclass(thing, torch.nn.Module) and thing not in seen:
                seen.add(thing)
                left.append(thing)
    return None


def _own_scores(model: Any) -> str | None:
    """A class of `model`'s modules that masks scores of its own, beside others that call this.

    Models in it that have their own configuration, and with it their own attention, look after
    themselves.
    """
    modules = list(model.children())
    while modules:
        module = modules.pop()
        if getattr(module, "config", model.config) is not model.config:
            if hasattr(module, "get_correct_attn_implementation"):
                continue
        layer: Any = type(module)
        if _masks_scores(layer):
            return layer.__name__
        modules.extend(module.children())
    return None


@functools.cache
def _masks_scores(layer: type) -> bool:
    if not re.search("Attention|Indexer|Convolution", layer.__name__):
        return False
    try:
        source = inspect.getsource(layer)
    except (OSError, TypeError):  # of a notebook, perhaps: its own scores would fail with our mask
        return False
    own = r"(scores|product) \+?= .*([+-] \w*mask|masked_fill)"
    if "ALL_ATTENTION_FUNCTIONS" not in source and re.search(own, source):
        return True
    # The mask that is for the interface is used before, as one of (batch, 1, q, k).
    used = r"(masked_fill_?\(|torch\.all\(~)attention_mask|attention_mask\.logical_not"
    return bool(re.search(used, source))


# --------------------------------------------------------------------------------------- attention

CHANGES_THE_RESULT = (
    *("position_bias", "alibi", "attn_bias", "bias", "head_mask", "sinks"),
    *("indices", "block_indices", "topk_indices", "attention_chunk", "output_attentions"),
    *("cache", "block_table", "k_cache", "v_cache"),
)
"""Arguments that models hand over and that would change the result; others do not."""


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
        attention_mask: what `make_mask` returned, which says who sees whom, whatever the layer
            says; or (batch, tokens), or None: then the layer does.
        sliding_window: W: a query sees itself and W - 1 keys before, and without causality as
            many behind.
        s_aux: (heads,), attention sinks.
        position_ids: (batch or 1, seqlen_q).  Under a causal mask that hides nothing, and without
            keys of a cache, positions that restart separate sequences packed into a row.  Seeing
            that takes one wait for the device in a forward pass; a graph (torch.compile, CUDA
            graphs) cannot wait, so there packing must be given as `cu_seq_lens_q`
            (DataCollatorWithFlattening(return_flash_attn_kwargs=True)), and positions that restart
            without are a failed device assertion.
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1), of sequences packed in one row.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v), 0 at padding, and None for the weights.

    Raises:
        NotImplementedError: dropout, weights, masks or arguments that no kernel here has, a
            model in float32; a mask made for other lengths; a layer that hides keys where no mask
            was asked for.
        ValueError: both a mask and cu_seq_lens, or one of these alone.
    """
    _check_call(dropout, kwargs)
    query, key, value = (x.transpose(1, 2) for x in _cast(module, query, key, value))
    if is_made(attention_mask):
        made = read(attention_mask, query, key, module)  # type: ignore[arg-type]
        pattern, padding, offsets = made.pattern, made.padding, made.cu_seqlens
    else:
        pattern = _told(module, is_causal, sliding_window)
        padding, offsets = _as_it_came(attention_mask, query, key, pattern), None
        if attention_mask is None and cu_seq_lens_q is None:
            _check_unmasked(module, pattern, query, key)
    if (cu_seq_lens_q is None) != (cu_seq_lens_k is None):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k: one is given without the other")
    if cu_seq_lens_q is not None:
        if padding is not None:
            raise ValueError("attention_mask and cu_seq_lens_q are both given; give one of them")
    elif offsets is not None:
        cu_seq_lens_q = cu_seq_lens_k = offsets
    elif is_made(attention_mask) and pattern.causal:
        cu_seq_lens_q = cu_seq_lens_k = _sequences(
            attention_mask, position_ids, query, key, padding, module
        )
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "causal": pattern.causal,
        "window_size": pattern.window,
        "attention_chunk": pattern.chunk,
        "softcap": softcap or 0.0,
        "learnable_sink": s_aux,
        "deterministic": False if deterministic is None else deterministic,
    }
    if padding is not None:
        return _padded(query, key, value, padding, options), None
    if cu_seq_lens_q is None or cu_seq_lens_k is None:  # checked above: both or neither
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


# ------------------------------------------------------------------------- what layers say of them


def _told(module: torch.nn.Module, is_causal: bool | None, sliding_window: int | None) -> Pattern:
    """The pattern as the layer has it; without `is_causal`, nothing is hidden, as in eager."""
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    window = (-1, -1)
    if sliding_window is not None:
        window = (sliding_window - 1, 0 if causal else sliding_window - 1)
    return Pattern(causal, window, _chunk(module))


def _chunk(module: torch.nn.Module) -> int:
    """Llama 4's attention chunks: no argument says so, only the layer's type."""
    config: Any = getattr(module, "config", None)
    layer = getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    if layer is None or not types or types[layer] != "chunked_attention":
        return 0
    return config.attention_chunk_size


def _check_unmasked(module: torch.nn.Module, pattern: Pattern, q: Tensor, k: Tensor) -> None:
    """Without a mask transformers' eager attention hides nothing, its sdpa follows is_causal."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    reach = pattern.chunk or pattern.window[0] + 1 or seqlen_k
    if (pattern.causal and seqlen_q > 1) or reach < seqlen_k:
        raise NotImplementedError(
            f"{whose(module)} hides keys ({pattern}), but was given no mask, without which "
            f"transformers' eager attention hides none: what {NAME} should do cannot be told.  "
            'Give an attention_mask (transformers.masking_utils), or use attn_implementation="sdpa"'
        )


def _as_it_came(mask: Tensor | None, q: Tensor, k: Tensor, pattern: Pattern) -> Padding | None:
    """Read a padding mask (batch, tokens) that a model passed on, in every layer anew.

    transformers' convention: the mask ends with the queries; keys behind it are unwritten.
    """
    if mask is None:
        return None
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if mask.ndim != 2 or mask.shape[1] > seqlen_k:
        raise NotImplementedError(mask_message(mask))
    tokens = mask.bool()
    keys = torch.nn.functional.pad(tokens, (0, seqlen_k - mask.shape[1]))
    used_k = keys.sum(-1, dtype=torch.int32)
    if seqlen_q == 1 or not pattern.hides:
        return Padding(None, None, to_front(keys), used_k)
    queries = tokens[:, -seqlen_q:]
    if queries.shape[1] < seqlen_q:
        raise NotImplementedError(mask_message(mask))
    return Padding(to_front(queries), queries.sum(-1, dtype=torch.int32), to_front(keys), used_k)


# ---------------------------------------------------------------------------------- padded batches


def _padded(q: Tensor, k: Tensor, v: Tensor, padding: Padding, options: dict[str, Any]) -> Tensor:
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
    cu_seqlens_k: Tensor,
    bounds: tuple[int | Tensor | None, int | Tensor | None],
    options: dict[str, Any],
) -> Tensor:
    same = cu_seqlens_k is cu_seqlens_q
    cu_seqlens_q = cu_seqlens_q.to(torch.int32)
    cu_seqlens_k = cu_seqlens_q if same else cu_seqlens_k.to(torch.int32)
    rows = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    out: Any = flash_attn_varlen_func(
        rows[0], rows[1], rows[2], cu_seqlens_q, cu_seqlens_k, *bounds, **options
    )
    return out.view(*q.shape[:-1], -1)


class Sequences(NamedTuple):
    """The sequences that one forward pass found in position_ids."""

    position_ids: Tensor
    content: Tensor
    cu_seqlens: Tensor | None
    layers: set[int]


_found: Any = WeakTensorKeyDictionary()
"""Sequences by the mask of a forward pass.

Positions are looked at once in a forward pass, since that waits for the device, and all of its
layers use what was found.  A pass is known by its mask, a tensor that `make_mask` made for this
pass and that nobody else writes to; not by position_ids, which loops refill, at times by ways that
count no version (a NumPy buffer, `.data`, collectives).  Only a mask made ahead of the model can
serve several passes.  There, a layer that comes again begins a new one, and so does any layer on
the CPU that finds other positions; on a GPU, where that would be a wait, it is a failed device
assertion.
"""


def _sequences(
    mask: Tensor | None,
    position_ids: Tensor | None,
    q: Tensor,
    k: Tensor,
    padding: Padding | None,
    module: torch.nn.Module,
) -> Tensor | None:
    """cu_seqlens of sequences packed into rows, or None where each row is one.

    In a graph the number of sequences would have to be a bound, the number of tokens; every tile
    looks for its sequence among them, which would cost more than attention.
    """
    seqlen, seqlen_k = q.shape[1], k.shape[1]
    if seqlen == 1 or seqlen != seqlen_k:
        return None
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != seqlen:
        return None  # three-dimensional ones are places in an image and say nothing of sequences
    if in_graph():
        restarts = _restarts(position_ids)
        if padding is not None:  # eager calls see whether anything is hidden
            restarts = restarts & (padding.used_k == seqlen_k).all()
        assert_whole(restarts)
        return None
    if padding is not None:
        return None
    known = _found.get(mask)
    if known is None or not _serves(known, position_ids, module):
        content = position_ids.detach().clone()
        offsets = cu_seqlens_of(_restarts(content).expand(q.shape[0], -1))
        known = _found[mask] = Sequences(position_ids, content, offsets, set())
    known.layers.add(id(module))
    return known.cu_seqlens


def _serves(known: Sequences, position_ids: Tensor, module: torch.nn.Module) -> bool:
    if known.position_ids is not position_ids or id(module) in known.layers:
        return False
    if known.content.is_inference() and not torch.is_inference_mode_enabled():
        return False  # autograd could not save what follows from it
    if position_ids.device.type == "cpu":
        return torch.equal(known.content, position_ids)
    torch._assert_async(
        (known.content == position_ids).all(),
        f"{NAME}: position_ids were overwritten while the layers of one forward pass read them",
    )
    return True


def _restarts(position_ids: Tensor) -> Tensor:
    """Say for tokens 1, 2, ... of each row whether they begin a sequence.

    Where positions fall, or are the row's least one again (not always 0): transformers' rule for
    its flash path, which leaves positions that jump ahead alone.
    """
    later = position_ids[:, 1:]
    return (later < position_ids[:, :-1]) | (later == position_ids.amin(-1, keepdim=True))
