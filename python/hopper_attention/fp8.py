"""Attention in FP8: of tensors that are quantised here (`attention_fp8`), or were before."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hopper_attention import arguments, autograd, forward_fp8, ops, runtime, selection
from hopper_attention.arguments import WHOLE, Lengths, Options
from hopper_attention.forward_fp8 import Scaling
from hopper_attention.plan import (
    FP8_TENSORS,
    Fp8,
    Inputs,
    Plan,
    check_shapes_of,
    make_plan,
    prepare,
)
from hopper_attention.quantize import LEAST, Quantized, Recipe, means_of, narrowed, quantize
from hopper_attention.watched import watched


class Operands(NamedTuple):
    """Quantised tensors of one call."""

    q: Quantized
    k: Quantized
    v: Quantized


class Treatment(NamedTuple):
    """How `attention_fp8` quantises: its arguments of these names."""

    recipe: str
    hadamard: bool
    two_level: bool | None
    accumulate_every: int
    max_seqlen_q: int | None
    max_seqlen_k: int | None

    @staticmethod
    def of(
        recipe: Any,
        hadamard: Any,
        two_level: Any,
        accumulate_every: Any,
        max_seqlen_q: Any,
        max_seqlen_k: Any,
    ) -> Treatment:
        """Raises TypeError or ValueError that names the argument."""
        try:
            recipe = Recipe(recipe).value
        except ValueError:
            have = ", ".join(r.value for r in Recipe)
            raise ValueError(f"recipe must be one of {have}; got {recipe!r}") from None
        every = arguments.integer("accumulate_every", accumulate_every, 1)
        if every & (every - 1):
            nearest = 1 << every.bit_length() - 1
            raise ValueError(f"accumulate_every must be a power of two; got {every}, use {nearest}")
        if two_level is False and every > 1:
            raise ValueError(f"accumulate_every={every}: without two_level nothing is flushed")
        bounds = (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k))
        return Treatment(
            recipe,
            arguments.flag("hadamard", hadamard),
            None if two_level is None else arguments.flag("two_level", two_level),
            every,
            *(arguments.bound(name, n) for name, n in bounds),
        )

    def checked(self) -> Treatment:
        """Raises what `of` does."""
        return Treatment.of(*self)


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
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = arguments.NO_WINDOW,
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
        max_seqlen_q, max_seqlen_k: upper bounds of packed lengths, by default the tensors' rows:
            scales take memory for so many.  On a GPU, they are not checked; a tensor there means
            the same as None.
        Everything else as for those two.

    Returns:
        out in q's layout, with v's head dim, in q's dtype, and if asked for lse.

    Raises:
        TypeError, ValueError: as `flash_attn_func`.
        NotImplementedError: smooth_k with softcap or sinks, which see what it takes off; two_level
            of head dims beyond 128.
    """
    options = Options.of(
        softmax_scale, causal, window_size, attention_chunk, softcap, None, None, None, 0,
        deterministic,
    )  # fmt: skip
    treatment = Treatment.of(
        recipe, hadamard, two_level, accumulate_every, max_seqlen_q, max_seqlen_k
    )
    smooth_k = arguments.flag("smooth_k", smooth_k)
    return_lse = arguments.flag("return_lse", return_lse)
    arguments.check_tensors(q, k, v)
    _check_classes(q=q, k=k, v=v, learnable_sink=learnable_sink)
    sink = arguments.resolve_sink(learnable_sink, q)
    lengths = _lengths(cu_seqlens_q, seqused_q), _lengths(cu_seqlens_k, seqused_k)
    if not (q.dtype is k.dtype is v.dtype and q.dtype in arguments.DTYPES):
        q, k, v = arguments.autocast(q, k, v)
    inputs = Inputs(q, k, v, sink, *lengths)
    if smooth_k and (softcap or sink is not None):
        raise NotImplementedError("smooth_k: not with softcap or sinks; use smooth_k=False")
    watch = watched(inputs)
    if smooth_k:
        mean = _mean_of_keys(inputs, treatment, watch)
        # A constant: softmax does not see it, so gradients are those of K, and more exact.
        inputs = inputs._replace(k=k - _of_rows(mean, lengths[1], k))
    if watch:
        ops.refuse_tangents(q, k, v, sink)
        out, lse = torch.ops.hopper_attention.attention_fp8(*inputs.flat, *options, *treatment)
    else:
        out, lse = quantize_and_attend(inputs, options, treatment)
    if smooth_k and return_lse:
        lse = torch.where(lse > -torch.inf, lse + _scores_of(mean, inputs, options), lse)
    return (out, lse) if return_lse else out


def _mean_of_keys(inputs: Inputs, treatment: Treatment, watch: bool) -> Tensor:
    """(sequences, heads_kv, head_dim), rounded to k's dtype."""
    k, keys = inputs.k.detach(), inputs.keys
    bound = _bounds(inputs, treatment.max_seqlen_q, treatment.max_seqlen_k)[1]
    if watch:
        check_shapes_of(inputs)
        mean = torch.ops.hopper_attention.means(k, keys.cu_seqlens, keys.seqused, bound)
    else:
        _check_operands(inputs)
        mean = means_of(k, keys, bound)
    return mean.to(k.dtype)


def _of_rows(of_sequences: Tensor, lengths: Lengths, x: Tensor) -> Tensor:
    """What each row of x has of (sequences, heads, head_dim); rows of no sequence anything."""
    if lengths.cu_seqlens is None:
        return of_sequences.unsqueeze(1)
    if of_sequences.shape[0] == 0:
        return of_sequences.new_zeros(1)
    rows = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    number = torch.searchsorted(lengths.cu_seqlens[1:], rows, right=True)
    return of_sequences[number.clamp(max=of_sequences.shape[0] - 1)]


def _scores_of(mean: Tensor, inputs: Inputs, options: Options) -> Tensor:
    """In lse's layout: of the mean of the keys of each query's head."""
    q, k = inputs.q, inputs.k
    scale = q.shape[-1] ** -0.5 if options.softmax_scale is None else options.softmax_scale
    mean = mean.repeat_interleave(q.shape[-2] // k.shape[-2], dim=1)
    scores = (q * _of_rows(mean, inputs.queries, q)).sum(dim=-1, dtype=torch.float32)
    return scale * (scores.mT if inputs.queries.cu_seqlens is None else scores.T)


def quantize_and_attend(
    inputs: Inputs, options: Options, treatment: Treatment
) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable if anything requires grad."""
    if options.out_dtype is not None:
        raise NotImplementedError("out_dtype: attention_fp8's is q's; use flash_attn_func")
    _check_operands(inputs)
    plan = prepare(inputs, options, Fp8(treatment.two_level, treatment.accumulate_every))

    def run(plan: Plan, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return _quantize_and_run(plan, inputs, treatment)

    return autograd.Attention.apply(plan, run, *inputs)


def _check_operands(inputs: Inputs) -> None:
    """What is quantised here: 16 bits, as the kernels can load it."""
    arguments.check_dtypes(inputs.q.dtype, inputs.k.dtype, inputs.v.dtype)
    check_shapes_of(inputs)
    for name, tensor in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v)):
        arguments.addressable(name, tensor)


def _quantize_and_run(plan: Plan, inputs: Inputs, treatment: Treatment) -> tuple[Tensor, Tensor]:
    q, k, v, sink, queries, keys = inputs
    recipe, hadamard = Recipe(treatment.recipe), treatment.hadamard
    bound_q, bound_k = _bounds(inputs, treatment.max_seqlen_q, treatment.max_seqlen_k)
    of_queries: dict[str, Any] = {"lengths": queries, "max_seqlen": bound_q}
    of_keys: dict[str, Any] = {"lengths": keys, "max_seqlen": bound_k}
    arranged = _arranges(plan, inputs)
    q8 = quantize(q, recipe, heads_kv=k.shape[-2], hadamard=hadamard, **of_queries)
    k8 = quantize(k, recipe, hadamard=hadamard, **of_keys)
    v8 = quantize(v, recipe, octaves=True, arranged=arranged, **of_keys)
    scaling = Scaling(
        q8.descale, k8.descale, v8.descale, bound_q, bound_k,
        columns=v8.values if arranged else None,
    )  # fmt: skip
    values = Inputs(q8.values, k8.values, v if arranged else v8.values, sink, queries, keys)
    return forward_fp8.run(plan, values, scaling)


def _arranges(plan: Plan, inputs: Inputs) -> bool:
    """Whether a kernel takes V, arranged as it wants it."""
    reference = plan.backend_for(inputs.q) is runtime.Backend.REFERENCE
    return not reference and inputs.k.numel() > 0


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learnable_sink: Tensor | None,
    lengths: tuple[Lengths, Lengths],
    descales: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    bounds: tuple[int | None, int | None],
    options: Options,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the public functions' arguments, where q is FP8.

    `descales` are of q, k, v and out, `bounds` max_seqlen_q and _k.
    """
    arguments.check_tensors(q, k, v)
    _check_classes(q=q, k=k, v=v, learnable_sink=learnable_sink)
    sink = arguments.resolve_sink(learnable_sink, q)
    inputs = Inputs(q, k, v, sink, *lengths)
    names = (
        "q",
        "k",
        "v",
        "learnable_sink",
        *(f"{name}_descale" for name in ("q", "k", "v", "out")),
    )
    for name, tensor in zip(names, (q, k, v, sink, *descales), strict=True):
        if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name} requires grad: use attention_fp8 to train")
    if options.pack_gqa:
        raise NotImplementedError("pack_gqa: not for FP8, where rows of a tile share a scale")
    if out is not None:
        arguments.check_out(out, q, k, v, options.out_dtype or torch.bfloat16)
    if watched(inputs):
        ops.refuse_tangents(*(x for x in (q, k, v, sink, *descales) if isinstance(x, Tensor)))
        result, lse = torch.ops.hopper_attention.forward_fp8(
            *inputs.flat, *descales, *options, *bounds
        )
        return (result if out is None else out.copy_(result)), lse
    if out is not None:
        arguments.addressable("out", out)
        torch.autograd.graph.increment_version(out)  # kernels write it behind autograd's back
    return descale_and_attend(inputs, descales, bounds, options, out)


def descale_and_attend(
    inputs: Inputs,
    descales: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    bounds: tuple[int | None, int | None],
    options: Options,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend` with everything checked that can be checked without data."""
    q, k, v, _, _, keys = inputs
    accepted = {"q": FP8_TENSORS[:1], "k": FP8_TENSORS, "v": FP8_TENSORS}
    for (name, dtypes), tensor in zip(accepted.items(), (q, k, v), strict=True):
        if tensor.dtype not in dtypes:
            have = " or ".join(map(str, dtypes))
            raise NotImplementedError(
                f"{name} has dtype {tensor.dtype}; supported with FP8 tensors: {have}"
            )
    plan = prepare(inputs, options, Fp8())
    bound_q, bound_k = _bounds(inputs, *bounds)
    names = ("q_descale", "k_descale", "v_descale")
    sides = ((q, bound_q), (k, bound_k), (v, bound_k))
    q_descale, k_descale, v_descale = (
        _checked_descale(name, descale, x, k.shape[-2], inputs.sequences, bound)
        for name, descale, (x, bound) in zip(names, descales, sides, strict=False)
    )
    out_descale = _checked_out_descale(descales[3], plan.out_dtype, q)
    columns = None
    if k.dtype == torch.float8_e5m2:
        k, k_descale = narrowed(k, k_descale, lengths=keys, max_seqlen=bound_k)
    if v.dtype == torch.float8_e5m2:
        arranged = _arranges(plan, inputs)
        values, v_descale = narrowed(
            v, v_descale, arranged=arranged, lengths=keys, max_seqlen=bound_k
        )
        columns, v = (values, v) if arranged else (None, values)
    scaling = Scaling(q_descale, k_descale, v_descale, bound_q, bound_k, out_descale, columns)
    return forward_fp8.run(plan, inputs._replace(k=k, v=v), scaling, out)


def compute(
    operands: tuple[Quantized, Quantized, Quantized],
    softmax_scale: float,
    mask: arguments.Mask,
    two_level: bool | None = None,
    accumulate_every: int = 1,
) -> Tensor:
    """out (batch, seqlen_q, heads, head_dim_v), float32, of quantised tensors and a resolved mask.

    By the kernel: CUDA tensors, or CPU tensors inside `simulator.enabled()`.
    """
    q, k, v = (x.values for x in operands)
    options = Options.of(
        softmax_scale, False, arguments.NO_WINDOW, 0, 0.0, None, None, torch.float32, 0, False
    )
    shapes, dtypes = (q.shape, k.shape, v.shape), (torch.bfloat16,) * 3
    how = Fp8(two_level, accumulate_every)
    target = selection.target_for_fp8(q)
    plan = make_plan(shapes, dtypes, options, target, fp8=how, mask=mask)
    q_descale, k_descale, v_descale = (x.descale for x in operands)
    scaling = Scaling(q_descale, k_descale, v_descale, q.shape[1], k.shape[1])
    return forward_fp8.run(plan, Inputs(q, k, v), scaling)[0]


def _lengths(cu_seqlens: Tensor | None, seqused: Tensor | None) -> Lengths:
    return WHOLE if cu_seqlens is seqused is None else Lengths(cu_seqlens, seqused)


def _bounds(inputs: Inputs, *given: int | None) -> tuple[int, int]:
    """Upper bounds of the sequences' lengths: of packed ones what the caller says."""
    sides = (("q", inputs.q, inputs.queries), ("k", inputs.k, inputs.keys))
    bound_q, bound_k = (
        _bound(f"max_seqlen_{side}", x.shape[-3], lengths, bound)
        for (side, x, lengths), bound in zip(sides, given, strict=True)
    )
    return bound_q, bound_k


def _bound(name: str, rows: int, lengths: Lengths, given: int | None) -> int:
    if lengths.cu_seqlens is None or given is None:
        return rows
    if arguments.readable(lengths.cu_seqlens):
        used = lengths.cu_seqlens.diff() if lengths.seqused is None else lengths.seqused
        if (used > given).any():
            raise ValueError(f"{name} is {given}, less than a sequence of {used.max()}")
    return given


def _check_classes(**tensors: Tensor | None) -> None:
    """Neither sharding rules nor anything else is known of the operators' operands."""
    for name, tensor in tensors.items():
        if tensor is not None and is_traceable_wrapper_subclass(tensor):
            raise NotImplementedError(
                f"{name} is a {type(tensor).__name__}; FP8 takes plain tensors (DTensor.to_local())"
            )


def _checked_descale(
    name: str, descale: Tensor | None, x: Tensor, heads_kv: int, sequences: int, seqlen: int
) -> Tensor:
    if descale is None:
        return torch.ones(1, device=x.device)
    _check_scales(name, descale, x)
    heads = x.shape[-2]
    blocks = [-(-seqlen // rows) for rows in (64, 128)]
    fitting = [(1,), (), (sequences, heads_kv), *((sequences, heads, n) for n in blocks)]
    if tuple(descale.shape) not in fitting:
        side = "q" if name == "q_descale" else "k"
        raise ValueError(
            f"{name} has shape {tuple(descale.shape)}; expected (1,), (batch, heads_kv) = "
            f"{(sequences, heads_kv)}, or of blocks of 64 or 128 rows {fitting[3]} or "
            f"{fitting[4]}, as many as a max_seqlen_{side} of {seqlen} has"
        )
    if descale.is_cpu and ((descale > 0) & (descale < LEAST)).any():
        raise ValueError(f"{name} must be 0 or at least {LEAST:g}")
    return descale.resolve_neg()


def _checked_out_descale(
    descale: Tensor | None, out_dtype: torch.dtype, q: Tensor
) -> Tensor | None:
    if descale is None:
        return None
    if out_dtype != torch.float8_e4m3fn:
        raise ValueError("out_descale: only with out_dtype=torch.float8_e4m3fn; leave it out")
    _check_scales("out_descale", descale, q)
    if descale.numel() != 1:
        raise ValueError(f"out_descale has shape {tuple(descale.shape)}; expected (1,)")
    if descale.is_cpu and not (descale > 0).all():
        raise ValueError("out_descale must be positive")
    return descale.resolve_neg()


def _check_scales(name: str, descale: Any, x: Tensor) -> None:
    if not isinstance(descale, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(descale).__name__}")
    if descale.device != x.device:
        raise ValueError(f"{name} is on {descale.device}, its tensor is on {x.device}")
    if descale.dtype != torch.float32:
        raise ValueError(f"{name} has dtype {descale.dtype}; expected torch.float32")
    if descale.layout is not torch.strided:
        raise ValueError(f"{name}: expected a plain tensor, not a sparse one")
    if descale.is_cpu and not ((descale >= 0) & (descale < torch.inf)).all():
        raise ValueError(f"{name} must be finite and not negative")
