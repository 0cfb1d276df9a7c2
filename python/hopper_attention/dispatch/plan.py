"""The plan of a call: checked shapes and options, the kernel, shared by all equal calls."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hopper_attention.dispatch import instances, manifest
from hopper_attention.dispatch.target import (
    REFERENCE,
    Executor,
    Target,
    check_margin,
    executor_for,
    target_for,
    target_for_fp8,
)
from hopper_attention.problem import checks
from hopper_attention.problem.checks import check_index_tensors, result_type
from hopper_attention.problem.values import (
    DTYPES,
    FP8_TENSORS,
    Inputs,
    Mask,
    Options,
    PrecisionOptions,
    resolve_mask,
    result_shapes,
)


def prepare(inputs: Inputs, options: Options, fp8: PrecisionOptions | None = None) -> Plan:
    """The plan for a call, with everything about the call checked; `fp8`: of FP8 kernels.

    Raises TypeError, ValueError or NotImplementedError, as the public functions say.
    """
    q, k, v, sink, *_ = inputs
    shapes, dtypes = (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype)
    if fp8 is not None and q.dtype in FP8_TENSORS:
        dtypes = (torch.bfloat16,) * 3  # whose result theirs is
    if not inputs.varlen:
        plan = make_plan(shapes, dtypes, options, _target(q, fp8), fp8=fp8)
    else:
        target = _target(q, fp8)
        plan = make_plan(shapes, dtypes, options, target, *inputs.packed, True, fp8)
        executor_for(q)  # refuses other devices before their index tensors are read
        check_index_tensors(inputs)
    if sink is not None:
        checks.check_sink_values(sink)
    if options.sm_margin > 0:
        check_margin(q, options.sm_margin)
    return plan


def _target(q: Tensor, fp8: PrecisionOptions | None) -> Target:
    return target_for(q) if fp8 is None else target_for_fp8(q)


@dataclass(frozen=True)
class Plan:
    """Everything that equal calls share: shapes, dtypes and options, checked, and the instance."""

    target: Target
    """Whose kernels."""
    instance: str
    """Empty: the reference was asked for.  Compiled, if the target launches kernels."""
    scale: float
    mask: Mask
    softcap: float | None
    out_shape: tuple[int, ...]
    out_dtype: torch.dtype
    output_type: int
    """Number of out_dtype among those that the kernel stores."""
    like_q: bool
    """True if out has q's shape and dtype."""
    lse_shape: tuple[int, ...]
    lse_strides: tuple[int, ...]
    varlen: bool
    qheads_per_tile: int
    """More than one: the instance is one that looks up lengths, for dense problems, too."""
    options: Options
    accumulate_every: int = 1

    @functools.cached_property
    def scalars(self) -> list[float | int]:
        """The instance's scalar arguments where there are neither lengths nor sinks."""
        absent = dict.fromkeys((*Inputs._fields, "num_sequences"), 0)
        values: dict[str, float | int] = {**absent, **self.values}
        arguments = manifest.arguments(self.instance)
        return [values[name] for name, is_tensor in arguments if not is_tensor]

    @property
    def values(self) -> dict[str, float | int]:
        """Scalar arguments of the kernels that stand for no tensor, by name."""
        return {
            "softmax_scale": self.scale,
            "softcap": self.softcap or 0.0,
            "window_left": self.mask.left,
            "window_right": self.mask.right,
            "attention_chunk": self.mask.chunk,
            "qheads_per_tile": self.qheads_per_tile,
            "output_type": self.output_type,
            "accumulate_every": self.accumulate_every,
        }

    def executor_for(self, q: Tensor) -> Executor:
        """The executor for q's device; the plan remembers a forced reference for its gradients."""
        if self.target.kernels == REFERENCE:
            return Executor.REFERENCE
        return executor_for(q)

    def backward_instances(self, q: Tensor, v: Tensor) -> instances.BackwardInstances:
        """Raises NotImplementedError if there is no backward for this kind of call."""
        dtype, capped = DTYPES[q.dtype], self.softcap is not None
        kind, dims = self.mask.kind, (q.shape[-1], v.shape[-1])
        return instances.backward_instances(dtype, *dims, kind, capped, self.varlen, self.target)


@functools.lru_cache(maxsize=1024)
def make_plan(
    shapes: tuple[torch.Size, torch.Size, torch.Size],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    options: Options,
    target: Target,
    packed_q: bool = False,
    packed_k: bool = False,
    varlen: bool = False,
    fp8: PrecisionOptions | None = None,
    mask: Mask | None = None,
) -> Plan:
    """Raises what `prepare` does about these.  `mask`: in place of the options'."""
    checks.check_dtypes(*dtypes)
    q, k, v = shapes
    checks.check_shapes(q, k, v, packed_q, packed_k)
    out_dtype, output_type = result_type(options.out_dtype, dtypes[0], fp8)
    mask = mask or resolve_mask(options, q[-3], k[-3])
    scale = 1.0 / math.sqrt(q[-1]) if options.softmax_scale is None else options.softmax_scale
    softcap = options.softcap or None
    group = q[-2] // k[-2]
    kind = (q[-1], v[-1], mask.kind, softcap is not None)
    instance, packs = "", False
    if fp8 is not None:  # heads are not packed: the rows of a tile share Q's scale
        checks.check_fp8_head_dims(q[-1], v[-1])
        if target.kernels != REFERENCE:
            find = instances.forward_fp8_instance
            instance = instances.or_listed(
                target, find, *kind, varlen, fp8.two_level, fp8.exact_softmax
            )
            if fp8.accumulate_every > 1 and not instances.is_two_level(instance):
                raise NotImplementedError(
                    f"accumulate_every={fp8.accumulate_every}: head dims {q[-1]} and {v[-1]} have "
                    "no kernel of two levels; use 1"
                )
    elif target.kernels != REFERENCE:
        dtype = DTYPES[dtypes[0]]
        seqlen_q = q[-3] if options.max_seqlen_q is None else min(q[-3], options.max_seqlen_q)
        packs = instances.packs_heads(dtype, *kind, group, seqlen_q, options.pack_gqa, target)
        indexed = varlen or packs
        instance = instances.or_listed(
            target, instances.forward_instance, dtype, *kind, indexed, target
        )
    out_shape, lse_shape = result_shapes(q, v, packed_q)
    return Plan(
        target=target,
        instance=instance,
        scale=scale,
        mask=mask,
        softcap=softcap,
        out_shape=out_shape,
        out_dtype=out_dtype,
        output_type=output_type,
        like_q=fp8 is None and out_shape == tuple(q) and out_dtype == dtypes[0],
        lse_shape=lse_shape,
        lse_strides=torch.empty(lse_shape, device="meta").stride(),
        varlen=varlen,
        qheads_per_tile=group if packs else 1,
        options=options,
        accumulate_every=1 if fp8 is None else fp8.accumulate_every,
    )
