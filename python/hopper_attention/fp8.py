"""Attention in FP8: of tensors that are quantised here (`attention_fp8`), or were before."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hopper_attention import arguments, autograd, forward_fp8, ops, runtime, selection
from hopper_attention.arguments import WHOLE, Lengths, Options
from hopper_attention.forward_fp8 import Scaling
from hopper_attention.plan import FP8_TENSORS, Fp8, Inputs, Plan, make_plan, prepare
from hopper_attention.quantize import Quantized, Recipe, means_of, narrowed, quantize
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
    smooth_k: bool
    two_level: bool | None
    accumulate_every: int
    max_seqlen_q: int | None
    max_seqlen_k: int | None

    @staticmethod
    def of(
        recipe: Any,
        hadamard: Any,
        smooth_k: Any,
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
            arguments.flag("smooth_k", smooth_k),
            None if two_level is None else arguments.flag("two_level", two_level),
            every,
            *(None if n is None else arguments.integer(name, n, 0) for name, n in bounds),
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
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    learnable_sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
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
        accumulate_every: with two_level, so many key blocks are summed by the tensor cores before;
            a power of two.
        max_seqlen_q, max_seqlen_k: upper bounds of packed lengths, by default the tensors' rows:
            scales take memory for so many.
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
        recipe, hadamard, smooth_k, two_level, accumulate_every, max_seqlen_q, max_seqlen_k
    )
    return_lse = arguments.flag("return_lse", return_lse)
    arguments.check_tensors(q, k, v)
    _check_classes(q=q, k=k, v=v, learnable_sink=learnable_sink)
    sink = arguments.resolve_sink(learnable_sink, q)
    lengths = _lengths(cu_seqlens_q, seqused_q), _lengths(cu_seqlens_k, seqused_k)
    inputs = Inputs(q, k, v, sink, *lengths)
    if watched(inputs):
        ops.refuse_tangents(q, k, v)
        out, lse = torch.ops.hopper_attention.attention_fp8(*inputs.flat, *options, *treatment)
    else:
        out, lse = quantize_and_attend(inputs, options, treatment)
    return (out, lse) if return_lse else out


def quantize_and_attend(
    inputs: Inputs, options: Options, treatment: Treatment
) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable if anything requires grad."""
    if treatment.smooth_k and (options.softcap or inputs.sink is not None):
        raise NotImplementedError("smooth_k: not with softcap or sinks; use smooth_k=False")
    plan = prepare(inputs, options, Fp8(treatment.two_level, treatment.accumulate_every))

    def run(plan: Plan, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return _quantize_and_run(plan, inputs, treatment)

    return autograd.Attention.apply(plan, run, *inputs)


def _quantize_and_run(plan: Plan, inputs: Inputs, treatment: Treatment) -> tuple[Tensor, Tensor]:
    q, k, v, sink, queries, keys = inputs
    recipe, hadamard = Recipe(treatment.recipe), treatment.hadamard
    bound_q, bound_k = _bounds(inputs, treatment.max_seqlen_q, treatment.max_seqlen_k)
    of_queries: dict[str, Any] = {"lengths": queries, "max_seqlen": bound_q}
    of_keys: dict[str, Any] = {"lengths": keys, "max_seqlen": bound_k}
    arranged = _arranges(plan, inputs)
    q8 = quantize(q, recipe, heads_kv=k.shape[-2], hadamard=hadamard, **of_queries)
    k8 = quantize(k, recipe, hadamard=hadamard, centered=treatment.smooth_k, **of_keys)
    v8 = quantize(v, recipe, octaves=True, arranged=arranged, **of_keys)
    scaling = Scaling(
        q8.descale, k8.descale, v8.descale, bound_q, bound_k,
        columns=v8.values if arranged else None,
    )  # fmt: skip
    values = Inputs(q8.values, k8.values, v if arranged else v8.values, sink, queries, keys)
    out, lse = forward_fp8.run(plan, values, scaling)
    if treatment.smooth_k and k.numel() > 0:
        taken_off = plan.scale * _scores_of_mean(inputs, bound_k)
        lse = torch.where(lse > -torch.inf, lse + taken_off, lse)
    return out, lse


def _arranges(plan: Plan, inputs: Inputs) -> bool:
    """Whether a kernel takes V, arranged as it wants it."""
    reference = plan.backend_for(inputs.q) is runtime.Backend.REFERENCE
    return not reference and inputs.k.numel() > 0


def _scores_of_mean(inputs: Inputs, max_seqlen_k: int) -> Tensor:
    """In lse's layout: q times the mean of the keys of its head."""
    q, k, _, _, queries, keys = inputs
    mean = means_of(k, keys, max_seqlen_k).repeat_interleave(q.shape[-2] // k.shape[-2], dim=1)
    if queries.cu_seqlens is None:
        return torch.einsum("bqhd,bhd->bhq", q.float(), mean)
    rows = torch.arange(q.shape[0], device=q.device, dtype=torch.int32)
    sequence = torch.searchsorted(queries.cu_seqlens[1:], rows, right=True)
    return torch.einsum("qhd,qhd->hq", q.float(), mean[sequence.clamp(max=len(mean) - 1)])


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
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name} requires grad: use attention_fp8 to train")
    sink = arguments.resolve_sink(learnable_sink, q)
    inputs = Inputs(q, k, v, sink, *lengths)
    if out is not None:
        arguments.check_out(out, q, k, v, options.out_dtype or torch.bfloat16)
    if watched(inputs):
        result, lse = torch.ops.hopper_attention.forward_fp8(
            *inputs.flat, *descales, *options, *bounds
        )
        return (result if out is None else out.copy_(result)), lse
    if out is not None:
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
        softmax_scale, False, (-1, -1), 0, 0.0, None, None, torch.float32, 0, False
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
        _bound(f"max_seqlen_{side}", x.shape[-3], lengths.cu_seqlens, bound)
        for (side, x, lengths), bound in zip(sides, given, strict=True)
    )
    return bound_q, bound_k


def _bound(name: str, rows: int, cu_seqlens: Tensor | None, given: int | None) -> int:
    if cu_seqlens is None or given is None:
        return rows
    if cu_seqlens.is_cpu and (cu_seqlens.diff() > given).any():  # a GPU would have to be waited for
        raise ValueError(f"{name} is {given}, less than a sequence of {cu_seqlens.diff().max()}")
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
        raise ValueError(
            f"{name} has shape {tuple(descale.shape)}; expected (1,), (batch, heads_kv) = "
            f"{(sequences, heads_kv)}, or of blocks of 64 or 128 rows {fitting[3]} or {fitting[4]}"
        )
    return descale


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
    return descale


def _check_scales(name: str, descale: Any, x: Tensor) -> None:
    if not isinstance(descale, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(descale).__name__}")
    if descale.device != x.device:
        raise ValueError(f"{name} is on {descale.device}, its tensor is on {x.device}")
    if descale.dtype != torch.float32:
        raise ValueError(f"{name} has dtype {descale.dtype}; expected torch.float32")
    if descale.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{name} requires grad, which scales have not; use its detach()")
    if descale.is_cpu and not ((descale >= 0) & (descale < torch.inf)).all():
        raise ValueError(f"{name} must be finite and not negative")
