"""The public functions, with flash-attn 3's parameter names and order."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hopper_attention import arguments, backward, dispatch, reference, runtime
from hopper_attention.arguments import WHOLE, Lengths, Mask, Options
from hopper_attention.autograd import Attention, Gradients
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
    out_dtype: torch.dtype | None = None,
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
        softmax_scale: 1e-30 to 1e30; 1 / sqrt(head_dim) by default.
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
        sm_margin: multiprocessors that forward leaves to other work, such as communication.
        return_attn_probs, return_lse: either one adds the log-sum-exp to the result.
        learnable_sink: (heads,), a score that joins each row's softmax without a value (gpt-oss);
            up to 1e38, or -inf.
        out_dtype: q's dtype by default, or torch.float32: not rounded, to be merged with others;
            without gradients.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v) in `out_dtype`, and if asked for lse (batch, heads,
        seqlen_q), float32, natural logarithm, the sink included.  A query that sees no key has out
        0, and lse -inf or the sink.  Both are differentiable with respect to q, k, v and the sinks.

    Raises:
        TypeError, ValueError: an argument is wrong by itself or does not fit the others.
        NotImplementedError: a valid combination that is not supported (yet): other dtypes and head
            dims, qv, descales, num_splits > 1, gradients of float32 results; a GPU that is not
            sm_90.
        Nothing is launched and nothing written in any of these cases.

    FlashAttention-3, arXiv 2407.08608.
    """
    _check_hints(qv, q_descale, k_descale, v_descale, num_splits, pack_gqa, sm_margin)
    with_lse = _with_lse(return_attn_probs, return_lse)
    deterministic = _deterministic(deterministic)
    options = Options.of(softmax_scale, causal, window_size, attention_chunk, softcap)
    arguments.check_tensors(q, k, v)
    shapes, dtypes = (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype)
    layout = DENSE
    if pack_gqa is not None or out_dtype is not None:
        layout = Layout(pack_gqa=pack_gqa, out_dtype=out_dtype)
    plan = _make_plan(shapes, dtypes, options, layout)
    sink = arguments.resolve_sink(learnable_sink, q)
    out, lse = _attend(plan, q, k, v, sink, sm_margin, deterministic)
    return (out, lse) if with_lse else out


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
    out_dtype: torch.dtype | None = None,
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
        unpacked q.  Rows that seqused_q leaves out are 0 and -inf; packed rows behind the last
        sequence are undefined on a GPU; their gradients are 0.

    Raises:
        As `flash_attn_func`.  The values of the index tensors are checked on the CPU; on a GPU only
        with HOPPER_ATTENTION_DEBUG set, since that waits for the device.
    """
    _check_hints(qv, q_descale, k_descale, v_descale, num_splits, pack_gqa, sm_margin)
    with_lse = _with_lse(return_attn_probs, return_lse)
    deterministic = _deterministic(deterministic)
    options = Options.of(softmax_scale, causal, window_size, attention_chunk, softcap)
    arguments.check_tensors(q, k, v)
    shapes, dtypes = (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype)
    _check_bounds(max_seqlen_q, max_seqlen_k)
    layout = Layout(
        varlen=True,
        packed_q=cu_seqlens_q is not None,
        packed_k=cu_seqlens_k is not None,
        # Whatever is longer is the same to a plan, which is kept by its arguments.
        max_seqlen_q=min(max_seqlen_q, LONG) if isinstance(max_seqlen_q, int) else LONG,
        pack_gqa=pack_gqa,
        out_dtype=out_dtype,
    )
    plan = _make_plan(shapes, dtypes, options, layout)
    runtime.backend_for(q)  # refuses other devices before their index tensors are read
    queries, keys = Lengths(cu_seqlens_q, seqused_q), Lengths(cu_seqlens_k, seqused_k)
    batch = _batch(q, k, queries, keys)
    arguments.check_index("cu_seqlens_q", cu_seqlens_q, batch + 1, q)
    arguments.check_index("cu_seqlens_k", cu_seqlens_k, batch + 1, q)
    arguments.check_index("seqused_q", seqused_q, batch, q)
    arguments.check_index("seqused_k", seqused_k, batch, q)
    arguments.check_lengths("q", queries, q.shape[-3])
    arguments.check_lengths("k", keys, k.shape[-3])
    sink = arguments.resolve_sink(learnable_sink, q)
    out, lse = _attend(plan, q, k, v, sink, sm_margin, deterministic, queries, keys, batch)
    return (out, lse) if with_lse else out


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
    out_dtype: torch.dtype | None = None,
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
        num_heads_q = arguments.integer("num_heads_q", num_heads_q, 1)
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
    """Arguments of flash-attn 3 that only say how, or that no kernel here serves yet."""
    arguments.integer("sm_margin", sm_margin, 0, MAX_SM_MARGIN)
    if arguments.integer("num_splits", num_splits, 0) > 1:
        raise NotImplementedError(f"num_splits={num_splits}: not supported yet; use 0 or 1")
    if pack_gqa is not None:
        arguments.flag("pack_gqa", pack_gqa)
    if qv is q_descale is k_descale is v_descale is None:
        return
    arguments.check_unsupported(
        qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale
    )


def _check_bounds(max_seqlen_q: int | Tensor | None, max_seqlen_k: int | Tensor | None) -> None:
    for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(bound, Tensor):
            if bound.numel() != 1 or bound.dtype.is_floating_point:
                raise ValueError(f"{name}: expected one integer, got a {bound.dtype} tensor")
        elif bound is not None:
            arguments.integer(name, bound, 0)


def _deterministic(deterministic: bool) -> bool:
    return arguments.flag("deterministic", deterministic) or (
        torch.are_deterministic_algorithms_enabled()
    )


def _with_lse(return_attn_probs: bool, return_lse: bool) -> bool:
    probs = arguments.flag("return_attn_probs", return_attn_probs)
    return arguments.flag("return_lse", return_lse) or probs


LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "num_sequences")
LONG = 1024
"""From so many queries on, packing the heads of a group cannot save a third of the tiles."""


class Layout(NamedTuple):
    """What a plan depends on beside shapes, dtypes and options."""

    varlen: bool = False
    packed_q: bool = False
    packed_k: bool = False
    max_seqlen_q: int | None = None
    """None: the tensor's rows."""
    pack_gqa: bool | None = None
    out_dtype: torch.dtype | None = None


DENSE = Layout()
"""Made once: it is what most calls have."""


@dataclass(frozen=True)
class Plan:
    """What all calls of one kind share: shapes, dtypes and options checked, the instance chosen."""

    instance: str
    scale: float
    mask: Mask
    softcap: float | None
    out_shape: tuple[int, ...]
    out_dtype: torch.dtype
    like_q: bool
    """Whether out has q's shape and dtype."""
    lse_shape: tuple[int, ...]
    varlen: bool
    qheads_per_tile: int
    """More than one: the instance is one that looks up lengths, for dense problems, too."""

    @functools.cached_property
    def scalars(self) -> list[float | int]:
        """The instance's scalar arguments where none of them stands for a tensor."""
        return self.scalars_with({})

    def scalars_with(self, tensors: dict[str, int]) -> list[float | int]:
        """The same with addresses and the number of sequences by name; 0 where absent."""
        absent = dict.fromkeys(("learnable_sink", *LENGTHS), 0)
        values: dict[str, float | int] = {**absent, **self.options, **tensors}
        return [values[name] for name in runtime.scalar_names(self.instance)]

    @property
    def options(self) -> dict[str, float | int]:
        """Scalar arguments of the kernels that stand for no tensor."""
        return {
            "softmax_scale": self.scale,
            "softcap": self.softcap or 0.0,
            "window_left": self.mask.left,
            "window_right": self.mask.right,
            "attention_chunk": self.mask.chunk,
            "qheads_per_tile": self.qheads_per_tile,
            "output_float32": int(self.out_dtype == torch.float32),
        }

    def backward_instances(self, q: Tensor, v: Tensor) -> dispatch.BackwardInstances:
        """Raises NotImplementedError if there is no backward for this kind of call."""
        dtype, capped = arguments.DTYPES[q.dtype], self.softcap is not None
        kind, dims = self.mask.kind, (q.shape[-1], v.shape[-1])
        return dispatch.backward_instances(dtype, *dims, kind, capped, self.varlen)


@functools.lru_cache(maxsize=1024)
def _make_plan(
    shapes: tuple[torch.Size, torch.Size, torch.Size],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    options: Options,
    layout: Layout,
) -> Plan:
    arguments.check_dtypes(*dtypes)
    q, k, v = shapes
    arguments.check_shapes(q, k, v, layout.packed_q, layout.packed_k)
    out_dtype = arguments.resolve_out_dtype(layout.out_dtype, dtypes[0])
    mask = arguments.resolve_mask(options, q[-3], k[-3])
    scale = 1.0 / math.sqrt(q[-1]) if options.softmax_scale is None else options.softmax_scale
    softcap = options.softcap or None
    *rows, heads, _ = q
    group = heads // k[-2]
    problem = (arguments.DTYPES[dtypes[0]], q[-1], v[-1], mask.kind, softcap is not None)
    seqlen_q = q[-3] if layout.max_seqlen_q is None else min(q[-3], layout.max_seqlen_q)
    packs = dispatch.packs_heads(*problem, group, seqlen_q, layout.pack_gqa)
    out_shape = (*rows, heads, v[-1])
    return Plan(
        instance=dispatch.forward_instance(*problem, layout.varlen or packs),
        scale=scale,
        mask=mask,
        softcap=softcap,
        out_shape=out_shape,
        out_dtype=out_dtype,
        like_q=out_shape == tuple(q) and out_dtype == dtypes[0],
        lse_shape=(heads, *rows) if layout.packed_q else (rows[0], heads, rows[1]),
        varlen=layout.varlen,
        qheads_per_tile=group if packs else 1,
    )


def _batch(q: Tensor, k: Tensor, queries: Lengths, keys: Lengths) -> int:
    """Number of sequences, which whatever names it first says; the others are held to it."""
    sides = (("q", q, queries), ("k", k, keys))
    counts = {}
    for name, tensor, lengths in sides:
        cu_seqlens = lengths.cu_seqlens
        if cu_seqlens is None:
            counts[name] = tensor.shape[0]
        elif not isinstance(cu_seqlens, Tensor):
            kind = type(cu_seqlens).__name__
            raise TypeError(f"cu_seqlens_{name}: expected a torch.Tensor, got {kind}")
        elif cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            shape = tuple(cu_seqlens.shape)
            raise ValueError(f"cu_seqlens_{name} has shape {shape}; expected (batch + 1,)")
        else:
            counts[f"cu_seqlens_{name}"] = cu_seqlens.shape[0] - 1
    (first, batch), (second, other) = counts.items()
    if batch != other:
        raise ValueError(f"{second} has {other} sequences, {first} has {batch}")
    return batch


def _attend(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    sm_margin: int,
    deterministic: bool,
    queries: Lengths = WHOLE,
    keys: Lengths = WHOLE,
    batch: int = 0,
) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable if anything requires grad."""
    wanted = q.requires_grad or k.requires_grad or v.requires_grad
    wanted = wanted or (sink is not None and sink.requires_grad)
    if not (wanted and torch.is_grad_enabled()):
        return _forward(plan, q, k, v, sink, sm_margin, queries, keys, batch)
    if plan.out_dtype != q.dtype:
        raise NotImplementedError(
            f"out_dtype={plan.out_dtype} is not differentiable yet; leave it at {q.dtype}, or call "
            "under torch.no_grad()"
        )
    backend = runtime.backend_for(q)
    if backend is not runtime.Backend.REFERENCE:
        plan.backward_instances(q, v)  # refuses what has no backward before anything is launched

    def compute(q, k, v, sink, queries, keys, batch):  # type: ignore[no-untyped-def]
        return _forward(plan, q, k, v, sink, sm_margin, queries, keys, batch)

    def differentiate(*arguments):  # type: ignore[no-untyped-def]
        return _backward(plan, backend, deterministic, *arguments)

    return Attention.apply(compute, differentiate, q, k, v, sink, queries, keys, batch)


def _backward(
    plan: Plan,
    backend: runtime.Backend,
    deterministic: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink: Tensor | None,
    queries: Lengths,
    keys: Lengths,
    batch: int,
    dout: Tensor,
    dlse: Tensor | None,
) -> Gradients:
    """(dq, dk, dv, dsink) on whatever forward ran on."""
    if backend is runtime.Backend.REFERENCE:
        return reference.gradients(
            q, k, v, dout, dlse, softmax_scale=plan.scale, mask=plan.mask, softcap=plan.softcap,
            sink=sink, queries=queries, keys=keys,
        )  # fmt: skip
    sequences = batch if plan.varlen else q.shape[0]
    saved = backward.Saved(q, k, v, out, lse, sink, queries, keys, sequences)
    instances = plan.backward_instances(q, v)
    return backward.run(backend, instances, saved, plan.options, dout, dlse, deterministic)


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
            queries=queries, keys=keys, out_dtype=plan.out_dtype,
        )  # fmt: skip
    if plan.like_q:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)  # quicker than by shape
    else:
        out = q.new_empty(plan.out_shape, dtype=plan.out_dtype)
    lse = q.new_empty(plan.lse_shape, dtype=torch.float32)
    stored = out if out.dtype == q.dtype else out.view(q.dtype)  # float32 as pairs of q's dtype
    if sink is None and not plan.varlen and plan.qheads_per_tile == 1:
        if out.numel() > 0:
            operands = (q, k, v, stored, lse)
            runtime.launch(backend, plan.instance, operands, plan.scalars, sm_margin=sm_margin)
        return out, lse
    # Rows of no sequence: on a GPU only where asked for, since clearing costs a pass over out.
    if queries.seqused is not None or not q.is_cuda:
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
    sequences = batch if plan.varlen else q.shape[0]
    scalars = plan.scalars_with(numbers | {"num_sequences": sequences})
    views = [*(_as_entry(x, 4) for x in (q, k, v, stored)), _as_entry(lse, 3)]
    if out.numel() > 0 and sequences > 0:
        pointees = tuple(given.values())
        runtime.launch(backend, plan.instance, views, scalars, pointees, sm_margin)
    return out, lse


def _as_entry(tensor: Tensor, rank: int) -> Tensor:
    """Packed tensors are one batch entry."""
    return tensor.unsqueeze(0) if tensor.ndim < rank else tensor
