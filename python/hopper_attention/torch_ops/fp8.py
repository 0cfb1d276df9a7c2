"""The library's operators for FP8: `torch.ops.hopper_attention.attention_fp8` and `.forward_fp8`.

Of 16-bit tensors, quantised on the way, and differentiable; and of quantised tensors.  What
attention.py is for the others: compilers and modes see them, a plain call goes past the dispatcher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hopper_attention.dispatch.plan import Plan, prepare
from hopper_attention.launch.forward_fp8 import descale_and_attend, quantize_and_run
from hopper_attention.launch.quantize import means_of
from hopper_attention.problem import checks, memory, scalars
from hopper_attention.problem.checks import check_fp8_shapes_of, check_shapes_of
from hopper_attention.problem.fp8 import check_classes, check_operands, sequence_bounds
from hopper_attention.problem.quantization import Fp8Options
from hopper_attention.problem.values import (
    DTYPES,
    Descales,
    Inputs,
    Lengths,
    Options,
    PrecisionOptions,
    SequenceBounds,
)
from hopper_attention.torch_ops import attention, autograd
from hopper_attention.torch_ops.eager import needs_dispatcher
from hopper_attention.torch_ops.schema import ATTENTION_FP8, FORWARD_FP8

attention.library.define(f"attention_fp8({ATTENTION_FP8}) -> (Tensor out, Tensor lse)")
attention.library.define(f"forward_fp8({FORWARD_FP8}) -> (Tensor out, Tensor lse)")
attention.library.define(
    "means(Tensor k, Tensor? cu_seqlens, Tensor? seqused, SymInt bound) -> Tensor mean"
)


@torch.library.impl(attention.library, "attention_fp8", attention.KERNELS)
def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, options, treatment = ATTENTION_FP8.groups_of(arguments)
    return quantize_and_attend(attention.checked(inputs), options.checked(), treatment.checked())


@torch.library.impl(attention.library, "forward_fp8", attention.KERNELS)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, descales, options, bounds, precision = FORWARD_FP8.groups_of(arguments)
    given = bounds._asdict().items()
    bounds = SequenceBounds(*(scalars.bound(name, bound) for name, bound in given))
    inputs, options = attention.checked(inputs), options.checked()
    precision = PrecisionOptions.of(*precision)
    return descale_and_attend(inputs, descales, bounds, options, precision)


@torch.library.register_fake("hopper_attention::attention_fp8", lib=attention.library)
def _fake_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, options, treatment = ATTENTION_FP8.groups_of(arguments)
    check_shapes_of(inputs)
    check_fp8_shapes_of(inputs, options, treatment.precision)
    return attention.fake_results(inputs, inputs.q.dtype)


@torch.library.register_fake("hopper_attention::forward_fp8", lib=attention.library)
def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, _, options, _, precision = FORWARD_FP8.groups_of(arguments)
    check_fp8_shapes_of(inputs, options, precision)
    return attention.fake_results(inputs, options.out_dtype or torch.bfloat16)


@torch.library.impl(attention.library, "means", attention.KERNELS)
def _means(k: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None, bound: int) -> Tensor:
    lengths = Lengths(cu_seqlens, seqused)
    return means_of(k, lengths, bound if lengths.given else None)


@torch.library.register_fake("hopper_attention::means", lib=attention.library)
def _fake_means(k: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None, bound: int) -> Tensor:
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return k.new_empty((sequences, *k.shape[-2:]), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.options, _ = ATTENTION_FP8.groups_of(inputs)
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate as if nothing had been quantised."""
    found = attention.gradients(ctx.saved_tensors, ctx.options, dout, dlse)
    return ATTENTION_FP8.gradients(found)


torch.library.register_autograd(
    "hopper_attention::attention_fp8", _differentiate, setup_context=_save, lib=attention.library
)


def _refuse_derivatives(ctx: Any, *gradients: Tensor | None) -> None:
    raise NotImplementedError("FP8 tensors have no gradients: use attention_fp8 to train")


torch.library.register_autograd(
    "hopper_attention::forward_fp8", _refuse_derivatives, lib=attention.library
)


@register_flop_formula(torch.ops.hopper_attention.attention_fp8, get_raw=True)
def _attention_flops(*arguments: Any, out_val: Any = None) -> int:
    """Count the attention's FLOPs; quantisation multiplies little."""
    inputs, *_ = ATTENTION_FP8.groups_of(arguments)
    return attention.forward_flops(inputs)


@register_flop_formula(torch.ops.hopper_attention.forward_fp8, get_raw=True)
def _forward_flops(*arguments: Any, out_val: Any = None) -> int:
    inputs, *_ = FORWARD_FP8.groups_of(arguments)
    return attention.forward_flops(inputs)


def attend_quantised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learnable_sink: Tensor | None,
    lengths: tuple[Lengths, Lengths],
    options: Options,
    treatment: Fp8Options,
    smooth_k: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of `attention_fp8`'s arguments: 16-bit tensors, which are quantised on the way.

    Without `with_lse`, lse is that of the keys whose mean `smooth_k` has taken off.
    """
    checks.check_tensors(q, k, v)
    check_classes(q=q, k=k, v=v, learnable_sink=learnable_sink)
    sink = checks.resolve_sink(learnable_sink, q)
    if not (q.dtype is k.dtype is v.dtype and q.dtype in DTYPES):
        q, k, v = checks.autocast(q, k, v)
    inputs = Inputs.of(q, k, v, sink, *lengths)
    if smooth_k and (options.softcap or sink is not None):
        raise NotImplementedError("smooth_k: not with softcap or sinks; use smooth_k=False")
    watch = needs_dispatcher(inputs)
    if smooth_k:
        mean = _mean_of_keys(inputs, treatment, watch)
        # A constant: softmax does not see it, so gradients are those of K, and more exact.
        inputs = inputs._replace(k=k - _of_rows(mean, lengths[1], k))
    if watch:
        attention.refuse_tangents(q, k, v, sink)
        out, lse = torch.ops.hopper_attention.attention_fp8(*inputs, *options, *treatment)
    else:
        out, lse = quantize_and_attend(inputs, options, treatment)
    if smooth_k and with_lse:
        lse = torch.where(lse > -torch.inf, lse + _scores_of(mean, inputs, options), lse)
    return out, lse


def _mean_of_keys(inputs: Inputs, treatment: Fp8Options, watch: bool) -> Tensor:
    """(sequences, heads_kv, head_dim), rounded to k's dtype."""
    k, keys = inputs.k.detach(), inputs.keys
    bound = sequence_bounds(inputs, treatment.bound_q, treatment.bound_k)[1]
    if watch:
        check_shapes_of(inputs)
        mean = torch.ops.hopper_attention.means(k, keys.cu_seqlens, keys.seqused, bound)
    else:
        check_operands(inputs)
        mean = means_of(k, keys, bound)
    return mean.to(k.dtype)


def _of_rows(of_sequences: Tensor, lengths: Lengths, x: Tensor) -> Tensor:
    """Return for each row of x its sequence's entry; rows of no sequence get any."""
    if lengths.cu_seqlens is None:
        return of_sequences.unsqueeze(1)
    if of_sequences.shape[0] == 0:
        return of_sequences.new_zeros(1)
    rows = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    number = torch.searchsorted(lengths.cu_seqlens[1:], rows, right=True)
    return of_sequences[number.clamp(max=of_sequences.shape[0] - 1)]


def _scores_of(mean: Tensor, inputs: Inputs, options: Options) -> Tensor:
    """Return the scores of the mean of the keys of each query's head, in lse's layout."""
    q, k = inputs.q, inputs.k
    scale = q.shape[-1] ** -0.5 if options.softmax_scale is None else options.softmax_scale
    mean = mean.repeat_interleave(q.shape[-2] // k.shape[-2], dim=1)
    scores = (q * _of_rows(mean, inputs.queries, q)).sum(dim=-1, dtype=torch.float32)
    return scale * (scores.mT if inputs.queries.cu_seqlens is None else scores.T)


def quantize_and_attend(
    inputs: Inputs, options: Options, treatment: Fp8Options
) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable if anything requires grad."""
    if options.out_dtype is not None:
        raise NotImplementedError("out_dtype: attention_fp8's is q's; use flash_attn_func")
    check_operands(inputs)
    plan = prepare(inputs, options, treatment.precision)

    def run(plan: Plan, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return quantize_and_run(plan, inputs, treatment)

    return autograd.Attention.apply(plan, run, *inputs)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learnable_sink: Tensor | None,
    lengths: tuple[Lengths, Lengths],
    descales: Descales,
    bounds: SequenceBounds,
    options: Options,
    exact_softmax: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the public functions' arguments, where q is FP8."""
    precision = PrecisionOptions.of(exact_softmax=exact_softmax)
    checks.check_tensors(q, k, v)
    check_classes(q=q, k=k, v=v, learnable_sink=learnable_sink)
    sink = checks.resolve_sink(learnable_sink, q)
    inputs = Inputs.of(q, k, v, sink, *lengths)
    floats = {"q": q, "k": k, "v": v, "learnable_sink": sink, **descales._asdict()}
    for name, tensor in floats.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name} requires grad: use attention_fp8 to train")
    if options.pack_gqa:
        raise NotImplementedError("pack_gqa: not for FP8, where rows of a tile share a scale")
    if out is not None:
        memory.check_out(out, q, k, v, options.out_dtype or torch.bfloat16)
    if needs_dispatcher(inputs):
        attention.refuse_tangents(*(x for x in (q, k, v, sink, *descales) if isinstance(x, Tensor)))
        result, lse = torch.ops.hopper_attention.forward_fp8(
            *inputs, *descales, *options, *bounds, *precision
        )
        return (result if out is None else out.copy_(result)), lse
    if out is not None:
        memory.addressable("out", out)
        torch.autograd.graph.increment_version(out)  # kernels write it behind autograd's back
    return descale_and_attend(inputs, descales, bounds, options, precision, out)
