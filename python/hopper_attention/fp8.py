"""Attention of FP8 tensors: descales in the forms that the kernel takes, dispatch, launch.

How values are quantised: quantize.py; what the kernel does with them: hopper/forward_fp8.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hopper_attention import arguments, autograd, dispatch, reference, runtime, selection
from hopper_attention.arguments import Options
from hopper_attention.plan import Inputs, Plan, make_plan, prepare
from hopper_attention.quantize import (
    LEAST,
    Quantized,
    Recipe,
    block_rows,
    quantize,
    spread,
)
from hopper_attention.ranges import annotated

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK = 64
"""Rows that share a scale in the kernel (hopper/forward_fp8.py)."""
FADED = 60.0
"""log2: V's blocks that are smaller than their head's largest by more count as so much smaller."""
INTERLEAVED = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
"""Which of 16 keys a place of V's columns has: as P lies in registers (`Fp8Fragment`)."""


class Operands(NamedTuple):
    """Quantised tensors of one call, dense."""

    q: Quantized
    k: Quantized
    v: Quantized


def attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    recipe: str | Recipe = "block64",
    hadamard: bool = False,
    smooth_k: bool = False,
    two_level: bool | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    learnable_sink: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_func` with Q, K and V quantised to e4m3; gradients as if they were not.

    Backward is that of `flash_attn_func`, in bf16 or fp16, with this forward's results.

    Args:
        q, k, v: as for `flash_attn_func`, bf16 or fp16; head dims multiples of 16.
        recipe: which elements share a scale: "per_tensor", "per_head", "block64", "block128".
        hadamard: Q and K are rotated first, which spreads outliers over a head's columns.
        smooth_k: the mean of K over its sequence is taken off first, which no softmax sees.
        two_level: each key block's P V is added to O in float32, since FP8 tensor cores keep about
            14 bits of their sums; None: where there is a kernel for it.
        Everything else as for `flash_attn_func`.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v) in q's dtype, and if asked for lse.

    Raises:
        TypeError, ValueError: as `flash_attn_func`.
        NotImplementedError: smooth_k with softcap or sinks, which see what it takes off; two_level
            of head dims beyond 128.
    """
    try:
        recipe = Recipe(recipe)
    except ValueError:
        have = ", ".join(r.value for r in Recipe)
        raise ValueError(f"recipe must be one of {have}; got {recipe!r}") from None
    options = Options.of(
        softmax_scale, causal, window_size, attention_chunk, softcap, None, None, None, 0,
        deterministic,
    )  # fmt: skip
    for name, flag in (("hadamard", hadamard), ("smooth_k", smooth_k), ("return_lse", return_lse)):
        arguments.flag(name, flag)
    if two_level is not None:
        arguments.flag("two_level", two_level)
    arguments.check_tensors(q, k, v)
    _check_classes(q=q, k=k, v=v, learnable_sink=learnable_sink)
    sink = arguments.resolve_sink(learnable_sink, q)
    if smooth_k and (softcap or sink is not None):
        raise NotImplementedError("smooth_k: not with softcap or sinks; use smooth_k=False")
    inputs = Inputs(q, k, v, sink)
    selection.target_for_fp8(q)
    plan = prepare(inputs, options)
    _check_head_dims(q, v)
    instance = dispatch.forward_fp8_instance(
        q.shape[-1], v.shape[-1], plan.mask.kind, plan.softcap is not None, two_level
    )

    def quantize_and_run(plan: Plan, inputs: Inputs) -> tuple[Tensor, Tensor]:
        q, k, v, sink, *_ = inputs
        operands = Operands(
            quantize(q, recipe, heads_kv=k.shape[2], hadamard=hadamard),
            quantize(k, recipe, hadamard=hadamard, centered=smooth_k),
            quantize(v, recipe, octaves=True),
        )
        out, lse = run(plan, instance, operands, sink, q.dtype)
        if smooth_k and k.shape[1] > 0:
            lse = lse + plan.scale * _scores_of_mean(q, k)
        return out, lse

    out, lse = autograd.Attention.apply(plan, quantize_and_run, *inputs)
    return (out, lse) if return_lse else out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learnable_sink: Tensor | None,
    descales: tuple[Tensor | None, Tensor | None, Tensor | None],
    options: Options,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of `flash_attn_func`'s arguments, where q is FP8."""
    arguments.check_tensors(q, k, v)
    _check_classes(q=q, k=k, v=v, learnable_sink=learnable_sink)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype != torch.float8_e4m3fn:
            raise NotImplementedError(
                f"{name} has dtype {tensor.dtype}; with FP8 tensors all three are float8_e4m3fn"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name} requires grad: use attention_fp8 to train")
    _check_head_dims(q, v)
    out_dtype = options.out_dtype or torch.bfloat16
    if out_dtype not in OUT_DTYPES:
        have = ", ".join(map(str, OUT_DTYPES))
        raise NotImplementedError(f"out_dtype={out_dtype} is not supported for FP8; use {have}")
    sink = arguments.resolve_sink(learnable_sink, q)
    shapes = (q.shape, k.shape, v.shape)
    target = selection.target_for_fp8(q)
    plan = make_plan(shapes, (torch.bfloat16,) * 3, options._replace(out_dtype=None), target)
    arguments.check_sink_values(sink)
    operands = Operands(
        Quantized(q, _checked_descale("q_descale", descales[0], q, k.shape[2])),
        Quantized(k, _checked_descale("k_descale", descales[1], k, k.shape[2])),
        Quantized(v, _checked_descale("v_descale", descales[2], v, k.shape[2])),
    )
    if out is not None:
        arguments.check_out(out, q, k, v, out_dtype)
    instance = dispatch.forward_fp8_instance(
        q.shape[-1], v.shape[-1], plan.mask.kind, plan.softcap is not None, None
    )
    result, lse = run(plan, instance, operands, sink, out_dtype)
    return (result if out is None else out.copy_(result)), lse


def _check_classes(**tensors: Tensor | None) -> None:
    """There is no operator that subclasses could be taken apart for."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and type(tensor) not in (Tensor, torch.nn.Parameter):
            raise NotImplementedError(
                f"{name} is a {type(tensor).__name__}; FP8 takes plain tensors (DTensor.to_local())"
            )


def _check_head_dims(q: Tensor, v: Tensor) -> None:
    """Rows of bytes are addressed in steps of 16."""
    for name, tensor in (("q and k", q), ("v", v)):
        if tensor.ndim and tensor.shape[-1] % 16:
            raise NotImplementedError(
                f"head_dim {tensor.shape[-1]} of {name} is not supported for FP8; supported: "
                f"multiples of 16 (nearest: {-(-tensor.shape[-1] // 16) * 16})"
            )


def _checked_descale(name: str, descale: Tensor | None, x: Tensor, heads_kv: int) -> Tensor:
    if descale is None:
        return torch.ones(1, device=x.device)
    if not isinstance(descale, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(descale).__name__}")
    if descale.device != x.device:
        raise ValueError(f"{name} is on {descale.device}, its tensor is on {x.device}")
    if descale.dtype != torch.float32:
        raise ValueError(f"{name} has dtype {descale.dtype}; expected torch.float32")
    if descale.is_cpu and not ((descale >= 0) & (descale < torch.inf)).all():
        raise ValueError(f"{name} must be finite and not negative")
    batch, seqlen, heads, _ = x.shape
    blocks = [-(-seqlen // rows) for rows in (64, 128)]
    fitting = [(1,), (), (batch, heads_kv), *((batch, heads, n) for n in blocks)]
    if tuple(descale.shape) not in fitting:
        raise ValueError(
            f"{name} has shape {tuple(descale.shape)}; expected (1,), (batch, heads_kv) = "
            f"{(batch, heads_kv)}, or of blocks of 64 or 128 rows {fitting[3]} or {fitting[4]}"
        )
    return descale


def compute(
    operands: tuple[Quantized, Quantized, Quantized],
    softmax_scale: float,
    mask: arguments.Mask,
    two_level: bool | None = None,
) -> Tensor:
    """out (batch, seqlen_q, heads, head_dim_v), float32, of quantised tensors and a resolved mask.

    By the kernel: CUDA tensors, or CPU tensors inside `simulator.enabled()`.
    """
    q, k, v = (x.values for x in operands)
    plain = Options.of(softmax_scale, False, (-1, -1), 0, 0.0, None, None, None, 0, False)
    shapes, target = (q.shape, k.shape, v.shape), selection.target_for_fp8(q)
    plan = replace(make_plan(shapes, (torch.bfloat16,) * 3, plain, target), mask=mask)
    instance = dispatch.forward_fp8_instance(q.shape[-1], v.shape[-1], mask.kind, False, two_level)
    return run(plan, instance, Operands(*operands), None, torch.float32)[0]


def _scores_of_mean(q: Tensor, k: Tensor) -> Tensor:
    """(batch, heads, seqlen_q): q times the mean of its head's keys."""
    mean = k.float().mean(dim=1).repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    return torch.einsum("bqhd,bhd->bhq", q.float(), mean)


@annotated("forward_fp8")
def run(
    plan: Plan, instance: str, operands: Operands, sink: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(out, lse) on whatever the operands' device has; they fit the plan, but for their dtype."""
    q, k, v = (x.values for x in operands)
    backend = plan.backend_for(q)
    if backend is runtime.Backend.REFERENCE or k.numel() == 0:
        exact = (x.values.float() * spread(x.descale, x.values) for x in operands)
        return reference.attention(
            *exact, softmax_scale=plan.scale, mask=plan.mask, softcap=plan.softcap, sink=sink,
            out_dtype=out_dtype,
        )  # fmt: skip
    written = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    out, lse = (
        q.new_empty(plan.out_shape, dtype=written),
        q.new_empty(plan.lse_shape, dtype=torch.float32),
    )
    stored = out.view(torch.bfloat16)  # float32 as pairs
    if out.numel() > 0:
        rows = (arguments.made_addressable(*x) for x in (("q", q), ("k", k)))
        scales = _query_scales(operands), *_key_scales(operands)
        tensors = (*rows, columns_of(v), stored, lse, *scales)
        values = plan.values | {
            "output_float32": int(written == torch.float32),
            "learnable_sink": 0 if sink is None else sink.data_ptr(),
        }
        scalars = [values[name] for name in runtime.scalar_names(instance)]
        pointees = () if sink is None else (sink,)
        runtime.launch(backend, instance, tensors, scalars, pointees, plan.options.sm_margin)
    return out.to(out_dtype), lse


def columns_of(v: Tensor) -> Tensor:
    """(batch, heads_kv, head_dim_v, keys): V transposed, keys interleaved, zeros up to a 16th.

    A pass over V, which is read again for every tile of queries; in the kernel it would be
    transposed for every tile (docs/fp8.md).
    """
    seqlen = v.shape[1]
    padded = torch.nn.functional.pad(v.view(torch.uint8), (0, 0, 0, 0, 0, -seqlen % 16))
    groups = padded.unflatten(1, (-1, 16))[:, :, INTERLEAVED]
    return groups.flatten(1, 2).permute(0, 2, 3, 1).contiguous().view(v.dtype)


def _query_scales(operands: Operands) -> Tensor:
    """(batch, heads, ceil(seqlen_q / 64)); strides of 0 where a scale covers more."""
    values, descale = operands.q
    batch, seqlen, heads, _ = values.shape
    blocks = -(-seqlen // BLOCK)
    return _in_blocks(descale, seqlen, heads).clamp(min=LEAST).expand(batch, heads, blocks)


def _key_scales(operands: Operands) -> tuple[Tensor, Tensor]:
    """`Descales.keys` and `.v` of hopper/forward_fp8.py."""
    (values, k_descale), (_, v_descale) = operands.k, operands.v
    batch, seqlen, heads_kv, _ = values.shape
    k, v = (_in_blocks(d, seqlen, heads_kv) for d in (k_descale, v_descale))
    k, largest = k.clamp(min=LEAST), v.amax(dim=2, keepdim=True)
    shift = torch.log2(v / largest.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=-FADED)
    largest = largest.expand(batch, heads_kv, 1)
    both = torch.stack(torch.broadcast_tensors(k, shift), dim=3).expand(batch, heads_kv, -1, 2)
    pairs = -(-seqlen // (2 * BLOCK))
    if both.shape[2] == 1:  # the same for all
        both = both.expand(batch, heads_kv, 2, 2).flatten(2).unsqueeze(2)
        return both.expand(batch, heads_kv, pairs, 4), largest
    if both.shape[2] % 2:  # beyond the last key: any number, as -inf is multiplied by it
        both = torch.cat([both, both[:, :, -1:]], dim=2)
    return both.reshape(batch, heads_kv, pairs, 4), largest


def _in_blocks(descale: Tensor, seqlen: int, heads: int) -> Tensor:
    """(batch or 1, heads or 1, blocks of 64 or 1)."""
    if descale.ndim < 2:
        return descale.reshape(1, 1, 1)
    if descale.ndim == 2:
        return descale.repeat_interleave(heads // descale.shape[1], dim=1)[..., None]
    rows = block_rows(descale.shape[2], seqlen)
    blocks = -(-seqlen // BLOCK)
    return descale.repeat_interleave(rows // BLOCK, dim=2)[..., :blocks]
