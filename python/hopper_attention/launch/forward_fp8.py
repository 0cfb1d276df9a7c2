"""out and lse of quantised tensors by the kernel, or by the reference; descales as it takes them.

How values are quantised: launch/quantize.py; what the kernel does with them: kernel_fp8.py in
hopper/forward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hopper_attention import reference
from hopper_attention.cute_kernels.conventions import LARGEST_E4M3, LEAST_DESCALE
from hopper_attention.dispatch.plan import Plan, make_plan, prepare
from hopper_attention.dispatch.target import Executor, target_for_fp8
from hopper_attention.launch.arguments import as_entry, clear_unused, launch
from hopper_attention.launch.quantize import columns_of, narrowed, quantize
from hopper_attention.nvtx import annotated
from hopper_attention.problem import memory
from hopper_attention.problem.fp8 import (
    check_scale_of_values,
    checked_descale,
    checked_out_descale,
    sequence_bounds,
)
from hopper_attention.problem.quantization import (
    Fp8Options,
    QuantizationRequest,
    Quantized,
    Recipe,
)
from hopper_attention.problem.values import (
    FP8_TENSORS,
    Descales,
    Inputs,
    Lengths,
    Mask,
    Options,
    PrecisionOptions,
    SequenceBounds,
)
from hopper_attention.reference.quantize import block_rows, spread

BLOCK = 64
"""Rows that share a scale in the kernel."""
FADED = 60.0
"""log2: V's blocks that are smaller than their head's largest by more count as so much smaller."""


class Scaling(NamedTuple):
    """Scales that go with quantised inputs, of any of the shapes of `quantize.Quantized`."""

    q: Tensor
    k: Tensor
    v: Tensor
    max_seqlen_q: int
    """The bound of lengths in which blocks are counted; the rows of tensors that are not packed."""
    max_seqlen_k: int
    out: Tensor | None = None
    """The descale of an e4m3 result, (1,); None: 1."""
    columns: Tensor | None = None
    """V as `quantize.columns_of` has it, if that was made already."""


@annotated("forward_fp8")
def run(
    plan: Plan, inputs: Inputs, scaling: Scaling, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) on whatever the inputs' device has; they fit the plan, but for their dtype.

    `out` is written if given.
    """
    q, k, v, *_ = inputs
    executor = plan.executor_for(q)
    nothing = k.numel() == 0 or scaling.max_seqlen_q == 0 or scaling.max_seqlen_k == 0
    if executor is Executor.REFERENCE or nothing:
        result, lse = _run_reference(plan, inputs, scaling)
        return (result if out is None else out.copy_(result)), lse
    if out is None:
        out = q.new_empty(plan.out_shape, dtype=plan.out_dtype)
    else:
        out = memory.addressable("out", out)
    lse = q.new_empty(plan.lse_shape, dtype=torch.float32)
    columns = scaling.columns
    if columns is None:
        columns = columns_of(v, inputs.keys, scaling.max_seqlen_k)
    clear_unused(inputs, out, lse)
    if out.numel() > 0 and inputs.sequences > 0:
        rows = (memory.made_addressable(*x) for x in (("q", q), ("k", k)))
        rows_q, rows_k = (as_entry(x, 4) for x in rows)
        key_descales, v_descale = _key_scales(inputs, scaling)
        values = {
            **plan.values,
            **inputs._asdict(),
            "q": rows_q,
            "k": rows_k,
            "v": columns,
            "out": as_entry(out.view(torch.bfloat16), 4),  # as the kernel takes any
            "lse": as_entry(lse, 3),
            "q_descale": _query_scales(inputs, scaling),
            "key_descales": key_descales,
            "v_descale": v_descale,
            "out_descale": scaling.out,
            "num_sequences": inputs.sequences,
        }
        launch(executor, plan.instance, values, plan.options.sm_margin)
    return out, lse


def _run_reference(plan: Plan, inputs: Inputs, scaling: Scaling) -> tuple[Tensor, Tensor]:
    q, k, v, sink, *_ = inputs
    queries, keys = inputs.queries, inputs.keys
    bounds = (scaling.max_seqlen_q, scaling.max_seqlen_k, scaling.max_seqlen_k)
    sides = zip((q, k, v), scaling[:3], (queries, keys, keys), bounds, strict=True)
    exact = (x.float() * spread(scale, x, lengths, bound) for x, scale, lengths, bound in sides)
    narrow = plan.out_dtype == torch.float8_e4m3fn
    out, lse = reference.attention(
        *exact, softmax_scale=plan.scale, mask=plan.mask, softcap=plan.softcap, sink=sink,
        queries=queries, keys=keys, out_dtype=torch.float32 if narrow else plan.out_dtype,
    )  # fmt: skip
    if narrow:
        scaled = out if scaling.out is None else out / scaling.out
        out = scaled.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(plan.out_dtype)
    return out, lse


def _query_scales(inputs: Inputs, scaling: Scaling) -> Tensor:
    """(sequences, heads, ceil(seqlen_q / 64)); strides of 0 where a scale covers more."""
    heads, blocks = inputs.q.shape[-2], -(-scaling.max_seqlen_q // BLOCK)
    scales = _in_blocks(scaling.q, scaling.max_seqlen_q, heads).clamp(min=LEAST_DESCALE)
    return scales.expand(inputs.sequences, heads, blocks)


def _key_scales(inputs: Inputs, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """`Scaling.keys` and `.v` of hopper/forward/kernel_fp8.py."""
    sequences, heads_kv, bound = inputs.sequences, inputs.k.shape[-2], scaling.max_seqlen_k
    pairs = -(-bound // (2 * BLOCK))
    k, v = (_in_blocks(d, bound, heads_kv) for d in (scaling.k, scaling.v))
    if k.shape[2] == v.shape[2] == 1:  # the same for all blocks
        table = k.new_zeros((sequences, heads_kv, 1, 4))
        table[..., ::2] = k.clamp(min=LEAST_DESCALE)[..., None]
        return table.expand(-1, -1, pairs, -1), v.expand(sequences, heads_kv, 1)
    # Beyond the last key of a sequence: any number, as -inf is multiplied by K's.
    used = _used_blocks(inputs.keys, -(-bound // BLOCK))
    if used is not None:
        k, v = k.where(used, 1), v.where(used, 0)
    k, largest = k.clamp(min=LEAST_DESCALE), v.amax(dim=2, keepdim=True)
    shift = torch.log2(v / largest.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=-FADED)
    table = torch.stack(torch.broadcast_tensors(k, shift), dim=3)
    if table.shape[2] % 2:
        table = torch.cat([table, table[:, :, -1:]], dim=2)
    table = table.expand(sequences, heads_kv, -1, -1).reshape(sequences, heads_kv, pairs, 4)
    return table, largest.expand(sequences, heads_kv, 1)


def _used_blocks(lengths: Lengths, blocks: int) -> Tensor | None:
    """(sequences, 1, blocks): whether a sequence has keys there; None: all have."""
    if not lengths.given:
        return None
    if lengths.seqused is not None:
        rows = lengths.seqused
    else:
        assert lengths.cu_seqlens is not None
        rows = lengths.cu_seqlens.diff()
    first = BLOCK * torch.arange(blocks, device=rows.device)
    return first < rows[:, None, None]


def _in_blocks(descale: Tensor, seqlen: int, heads: int) -> Tensor:
    """(sequences or 1, heads or 1, blocks of 64 or 1)."""
    if descale.ndim < 2:
        return descale.reshape(1, 1, 1)
    if descale.ndim == 2:
        return descale.repeat_interleave(heads // descale.shape[1], dim=1)[..., None]
    rows = block_rows(descale.shape[2], seqlen)
    blocks = -(-seqlen // BLOCK)
    return descale.repeat_interleave(rows // BLOCK, dim=2)[..., :blocks]


def quantize_and_run(plan: Plan, inputs: Inputs, treatment: Fp8Options) -> tuple[Tensor, Tensor]:
    q, k, v, *_ = inputs
    recipe, hadamard = Recipe(treatment.recipe), treatment.hadamard
    bound_q, bound_k = sequence_bounds(inputs, treatment.bound_q, treatment.bound_k)
    of_queries: dict[str, Any] = {"lengths": inputs.queries, "max_seqlen": bound_q}
    of_keys: dict[str, Any] = {"lengths": inputs.keys, "max_seqlen": bound_k}
    arranged = _arranges(plan, inputs)

    def quantized(x: Tensor, recipe: Recipe, **how: Any) -> Quantized:
        return quantize(x, QuantizationRequest.of(x, recipe, **how))

    q8 = quantized(q, recipe, heads_kv=k.shape[-2], hadamard=hadamard, **of_queries)
    k8 = quantized(k, recipe, hadamard=hadamard, **of_keys)
    v8 = quantized(v, treatment.recipe_of_values, octaves=True, arranged=arranged, **of_keys)
    scaling = Scaling(
        q8.descale, k8.descale, v8.descale, bound_q, bound_k,
        columns=v8.values if arranged else None,
    )  # fmt: skip
    values = inputs._replace(q=q8.values, k=k8.values, v=v if arranged else v8.values)
    return run(plan, values, scaling)


def _arranges(plan: Plan, inputs: Inputs) -> bool:
    """Say whether a kernel takes V, which is then arranged for it."""
    reference = plan.executor_for(inputs.q) is Executor.REFERENCE
    return not reference and inputs.k.numel() > 0


def descale_and_attend(
    inputs: Inputs,
    descales: Descales,
    bounds: SequenceBounds,
    options: Options,
    precision: PrecisionOptions,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend` with everything checked that can be checked without data."""
    q, k, v, *_ = inputs
    keys = inputs.keys
    accepted = {"q": FP8_TENSORS[:1], "k": FP8_TENSORS, "v": FP8_TENSORS}
    for (name, dtypes), tensor in zip(accepted.items(), (q, k, v), strict=True):
        if tensor.dtype not in dtypes:
            have = " or ".join(map(str, dtypes))
            raise NotImplementedError(
                f"{name} has dtype {tensor.dtype}; supported with FP8 tensors: {have}"
            )
    plan = prepare(inputs, options, precision)
    bound_q, bound_k = sequence_bounds(inputs, *bounds)
    given = descales._asdict()
    sides = {"q_descale": (q, bound_q), "k_descale": (k, bound_k), "v_descale": (v, bound_k)}
    q_descale, k_descale, v_descale = (
        checked_descale(name, given[name], x, k.shape[-2], inputs.sequences, bound)
        for name, (x, bound) in sides.items()
    )
    if not precision.exact_softmax:
        check_scale_of_values(v, v_descale)
    out_descale = checked_out_descale(descales.out_descale, plan.out_dtype, q)
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
    return run(plan, inputs._replace(k=k, v=v), scaling, out)


def compute(
    operands: tuple[Quantized, Quantized, Quantized],
    softmax_scale: float,
    mask: Mask,
    precision: PrecisionOptions,
) -> Tensor:
    """out (batch, seqlen_q, heads, head_dim_v), float32, of quantised tensors and a resolved mask.

    By the kernel: CUDA tensors, or CPU tensors inside `simulator.enabled()`.
    """
    q, k, v = (x.values for x in operands)
    options = Options.of(softmax_scale, out_dtype=torch.float32)
    shapes, dtypes = (q.shape, k.shape, v.shape), (torch.bfloat16,) * 3
    plan = make_plan(shapes, dtypes, options, target_for_fp8(q), fp8=precision, mask=mask)
    q_descale, k_descale, v_descale = (x.descale for x in operands)
    scaling = Scaling(q_descale, k_descale, v_descale, q.shape[1], k.shape[1])
    return run(plan, Inputs(q, k, v), scaling)[0]
