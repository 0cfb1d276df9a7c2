"""The library's operators for FP8: `torch.ops.hopper_attention.attention_fp8` and `.forward_fp8`.

Of 16-bit tensors, quantised on the way, and differentiable; and of quantised tensors.  What ops.py
is for the others: compilers and modes see them, a plain call goes past the dispatcher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hopper_attention import arguments, fp8, ops, quantize
from hopper_attention.arguments import Options
from hopper_attention.fp8 import Treatment
from hopper_attention.plan import Inputs, check_fp8_shapes_of, check_shapes_of, result_shapes

_TREATMENT = (
    "str recipe, bool hadamard, bool? two_level, int accumulate_every, "
    "SymInt? bound_q, SymInt? bound_k"
)
"""`Treatment`, in its order; `Options` has a max_seqlen_q already."""
_DESCALES = "Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, Tensor? out_descale"
_NUM_DESCALES = 4
_NUM_BOUNDS = 2

ops.library.define(
    f"attention_fp8({ops.TENSORS}, {ops.OPTIONS}, {_TREATMENT}) -> (Tensor out, Tensor lse)"
)
ops.library.define(
    f"forward_fp8({ops.TENSORS}, {_DESCALES}, {ops.OPTIONS}, SymInt? bound_q, SymInt? bound_k) -> "
    "(Tensor out, Tensor lse)"
)
ops.library.define(
    "means(Tensor k, Tensor? cu_seqlens, Tensor? seqused, SymInt bound) -> Tensor mean"
)


def _unflat(flat: tuple[Any, ...]) -> tuple[Inputs, Options, Treatment]:
    inputs, scalars = Inputs.of(flat[: ops.NUM_TENSORS]), flat[ops.NUM_TENSORS :]
    count = len(Options._fields)
    return inputs, Options(*scalars[:count]), Treatment(*scalars[count:])


@torch.library.impl(ops.library, "attention_fp8", ops.KERNELS)
def _attention(*flat: Any) -> tuple[Tensor, Tensor]:
    inputs, options, treatment = _unflat(flat)
    arguments.check_tensors(*inputs[:3])
    sink = arguments.resolve_sink(inputs.sink, inputs.q)
    inputs = inputs._replace(sink=sink)
    return fp8.quantize_and_attend(inputs, options.checked(), treatment.checked())


@torch.library.impl(ops.library, "forward_fp8", ops.KERNELS)
def _forward(*flat: Any) -> tuple[Tensor, Tensor]:
    tensors, flat = flat[: ops.NUM_TENSORS], flat[ops.NUM_TENSORS :]
    descales, scalars = flat[:_NUM_DESCALES], flat[_NUM_DESCALES:]
    options = Options(*scalars[:-_NUM_BOUNDS])
    bound_q, bound_k = scalars[-_NUM_BOUNDS:]
    bounds = (arguments.bound("bound_q", bound_q), arguments.bound("bound_k", bound_k))
    inputs = Inputs.of(tensors)
    arguments.check_tensors(*inputs[:3])
    inputs = inputs._replace(sink=arguments.resolve_sink(inputs.sink, inputs.q))
    return fp8.descale_and_attend(inputs, descales, bounds, options.checked())


@torch.library.register_fake("hopper_attention::attention_fp8", lib=ops.library)
def _fake_attention(*flat: Any) -> tuple[Tensor, Tensor]:
    inputs, options, treatment = _unflat(flat)
    check_shapes_of(inputs)
    check_fp8_shapes_of(inputs, options, treatment.two_level)
    return _results(inputs, inputs.q.dtype)


@torch.library.register_fake("hopper_attention::forward_fp8", lib=ops.library)
def _fake_forward(*flat: Any) -> tuple[Tensor, Tensor]:
    inputs = Inputs.of(flat[: ops.NUM_TENSORS])
    options = Options(*flat[ops.NUM_TENSORS + _NUM_DESCALES : -_NUM_BOUNDS])
    check_fp8_shapes_of(inputs, options, None)
    return _results(inputs, options.out_dtype or torch.bfloat16)


@torch.library.impl(ops.library, "means", ops.KERNELS)
def _means(k: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None, bound: int) -> Tensor:
    lengths = arguments.Lengths(cu_seqlens, seqused)
    return quantize.means_of(k, lengths, bound if lengths.given else None)


@torch.library.register_fake("hopper_attention::means", lib=ops.library)
def _fake_means(k: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None, bound: int) -> Tensor:
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return k.new_empty((sequences, *k.shape[-2:]), dtype=torch.float32)


def _results(inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q, v = inputs.q, inputs.v
    out_shape, lse_shape = result_shapes(q.shape, v.shape, inputs.queries.cu_seqlens is not None)
    return q.new_empty(out_shape, dtype=dtype), q.new_empty(lse_shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[: ops.NUM_TENSORS])
    ctx.options = inputs[ops.NUM_TENSORS :][: len(Options._fields)]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """As if nothing had been quantised."""
    gradients = ops.gradients(ctx.saved_tensors, ctx.options, dout, dlse)
    return *gradients, *(None,) * len(Treatment._fields)


torch.library.register_autograd(
    "hopper_attention::attention_fp8", _differentiate, setup_context=_save, lib=ops.library
)


def _refuse_derivatives(ctx: Any, *gradients: Tensor | None) -> None:
    raise NotImplementedError("FP8 tensors have no gradients: use attention_fp8 to train")


torch.library.register_autograd(
    "hopper_attention::forward_fp8", _refuse_derivatives, lib=ops.library
)


@register_flop_formula(
    [torch.ops.hopper_attention.attention_fp8, torch.ops.hopper_attention.forward_fp8], get_raw=True
)
def _flops(*flat: Any, out_val: Any = None) -> int:
    """Without quantisation, which multiplies little."""
    return ops.forward_flops(Inputs.of(flat[: ops.NUM_TENSORS]))
