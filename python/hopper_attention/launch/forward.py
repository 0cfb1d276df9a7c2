"""out and lse by the kernel, or by the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from hopper_attention import reference
from hopper_attention.dispatch import target
from hopper_attention.dispatch.plan import Plan
from hopper_attention.launch import runtime
from hopper_attention.launch.arguments import as_entry, clear_unused, launch
from hopper_attention.nvtx import annotated
from hopper_attention.problem import memory
from hopper_attention.problem.values import Inputs


@annotated("forward")
def run(plan: Plan, inputs: Inputs, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) on whatever q's device has; the inputs are those that were checked for `plan`.

    `out` is written if given (`problem.memory.check_out`); contiguous and new if not.
    """
    executor = plan.executor_for(inputs.q)
    if out is not None:
        out = memory.addressable("out", out)
    if executor is target.Executor.REFERENCE:
        return _run_reference(plan, inputs, out)
    if inputs.learnable_sink is None and not plan.varlen and plan.qheads_per_tile == 1:
        return _run_plain(executor, plan, inputs, out)
    return _run_indexed(executor, plan, inputs, out)


def _run_reference(plan: Plan, inputs: Inputs, out: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v, sink, *_ = inputs
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        memory.addressable(name, tensor)  # refuses what the kernels refuse
    result, lse = reference.attention(
        q, k, v, softmax_scale=plan.scale, mask=plan.mask, softcap=plan.softcap, sink=sink,
        queries=inputs.queries, keys=inputs.keys, out_dtype=plan.out_dtype,
    )  # fmt: skip
    return (result if out is None else out.copy_(result)), lse


def _run_plain(
    executor: target.Executor, plan: Plan, inputs: Inputs, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run a call without lengths, sinks and packed heads, as most are, in little Python."""
    q, k, v, *_ = inputs
    described = [
        memory.address_shape_stride("q", q),
        memory.address_shape_stride("k", k),
        memory.address_shape_stride("v", v),
    ]
    out, lse, stored = _results(plan, q, out)
    if out.numel() > 0:
        described.append((stored.data_ptr(), stored.shape, stored.stride()))
        described.append((lse.data_ptr(), plan.lse_shape, plan.lse_strides))
        runtime.launch(
            executor, plan.instance, (q, k, v, stored, lse), plan.scalars,
            sm_margin=plan.options.sm_margin, described=described,
        )  # fmt: skip
    return out, lse


def _run_indexed(
    executor: target.Executor, plan: Plan, inputs: Inputs, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run a call with lengths, sinks, or the heads of a group in one tile."""
    q, k, v, *_ = inputs
    q, k, v = (memory.addressable(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    out, lse, stored = _results(plan, q, out)
    clear_unused(inputs, out, lse)
    if out.numel() > 0 and inputs.sequences > 0:
        operands = {"q": q, "k": k, "v": v, "out": stored}
        values = {
            **plan.values,
            **inputs._asdict(),
            **{name: as_entry(x, 4) for name, x in operands.items()},
            "lse": as_entry(lse, 3),
            "num_sequences": inputs.sequences,
        }
        launch(executor, plan.instance, values, plan.options.sm_margin)
    return out, lse


def _results(plan: Plan, q: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """out and lse, and out as the kernels store it: float32 as pairs of q's dtype."""
    if out is not None:
        pass
    elif plan.like_q:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)  # quicker than by shape
    else:
        out = q.new_empty(plan.out_shape, dtype=plan.out_dtype)
    # As new_empty, in three quarters of its time.
    lse = torch.empty_strided(
        plan.lse_shape, plan.lse_strides, dtype=torch.float32, device=q.device
    )
    return out, lse, out if plan.out_dtype is q.dtype else out.view(q.dtype)
