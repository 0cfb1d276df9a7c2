"""Gradients by the reference, or by the kernels: workspace, three launches, the sinks' gradient.

`Preprocess` reduces dO * O and clears the workspace for dQ, `Backward` makes dK and dV and adds up
dQ, `Postprocess` scales and rounds it.  The workspace's layout: cute_kernels/backward/workspace.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hopper_attention import reference
from hopper_attention.cute_kernels.conventions import WORKSPACE_ROWS
from hopper_attention.dispatch import manifest
from hopper_attention.dispatch.instances import BackwardInstances, main_backward_instance, or_listed
from hopper_attention.dispatch.plan import Plan
from hopper_attention.dispatch.target import Executor, target_for
from hopper_attention.launch.arguments import Value, as_entry, launch
from hopper_attention.nvtx import annotated
from hopper_attention.problem import memory
from hopper_attention.problem.values import DTYPES, Gradients, Inputs


@dataclass(frozen=True)
class Workspace:
    """float32, laid out as in cute_kernels/backward/workspace.py; the semaphore is int32."""

    lse: Tensor
    delta: Tensor
    dq: Tensor
    dq_semaphore: Tensor | None
    """A counter of every block of dQ, where key blocks add to it in order."""

    @staticmethod
    def like(inputs: Inputs, instances: BackwardInstances, deterministic: bool) -> Workspace:
        q, (packed, _) = inputs.q, inputs.packed
        shape = statistics_shape(q, inputs.sequences, packed)
        float32 = torch.float32
        if inputs.varlen:  # gaps between sequences are read for the sinks
            lse = q.new_full(shape, torch.inf, dtype=float32)
            delta = q.new_zeros(shape, dtype=float32)
        else:
            lse, delta = q.new_empty(shape, dtype=float32), q.new_empty(shape, dtype=float32)
        dq = q.new_empty((*shape, instances.head_dim), dtype=float32)
        semaphore = None
        if deterministic:
            blocks = (*shape[:2], shape[2] // instances.tile_m)
            semaphore = q.new_zeros(blocks, dtype=torch.int32)
        return Workspace(lse, delta, dq, semaphore)


def statistics_shape(q: Tensor, sequences: int, packed: bool) -> tuple[int, int, int]:
    """(entries, heads, rows) of the workspace."""
    *rows, heads, _ = q.shape
    if packed:
        return 1, heads, (rows[0] + sequences * WORKSPACE_ROWS) // WORKSPACE_ROWS * WORKSPACE_ROWS
    return rows[0], heads, -(-rows[1] // WORKSPACE_ROWS) * WORKSPACE_ROWS


def workspace_bytes(
    q: Tensor, v: Tensor, cu_seqlens_q: Tensor | None = None, deterministic: bool = False
) -> int:
    """Bytes that backward allocates beside the gradients: float32 dQ, two floats a query row.

    q, v: as for the forward functions; only shapes and dtype count.  With `deterministic`, a
    counter for every block of rows is added.
    """
    dtype = DTYPES[q.dtype]
    dims, target = (q.shape[-1], v.shape[-1]), target_for(q)
    problem = (dtype, *dims, "full", False, False, target)
    name = or_listed(target, main_backward_instance, *problem)
    tile = manifest.config_of(name)
    packed = cu_seqlens_q is not None
    sequences = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else q.shape[0]
    rows = math.prod(statistics_shape(q, sequences, packed))
    counters = rows // tile["tile_m"] if deterministic else 0
    return rows * 4 * (tile["head_dim"] + 2) + 4 * counters


@annotated("backward")
def run(
    plan: Plan, inputs: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> Gradients:
    """Return gradients, on whatever q's device has.

    `out` and `lse` may belong to more keys than `inputs` holds: then these are the gradients'
    shares of the keys at hand, as ring attention needs them.
    """
    executor = plan.executor_for(inputs.q)
    _check_results(plan, inputs, out, lse, dout, dlse)
    if executor is Executor.REFERENCE:
        q, k, v, sink, *_ = inputs
        found = reference.gradients(
            q, k, v, dout, dlse, out=out, lse=lse, softmax_scale=plan.scale, mask=plan.mask,
            softcap=plan.softcap, sink=sink, queries=inputs.queries, keys=inputs.keys,
        )  # fmt: skip
        return Gradients(*found)
    return _run_kernels(executor, plan, inputs, out, lse, dout, dlse)


def _check_results(
    plan: Plan, inputs: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> None:
    """Check forward's results and their gradients, which the kernels take as they come."""
    rows = (plan.out_shape, inputs.q.dtype)
    statistics = (plan.lse_shape, torch.float32)
    given = (("dout", dout, rows), ("out", out, rows), ("lse", lse, statistics))
    for name, tensor, (shape, dtype) in given:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            have = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"{name} is {have}; expected {dtype} of shape {shape}")
        if tensor.device != inputs.q.device:
            raise ValueError(f"{name} is on {tensor.device}, q is on {inputs.q.device}")
    if dlse is not None and tuple(dlse.shape) != plan.lse_shape:
        raise ValueError(f"dlse has shape {tuple(dlse.shape)}; expected {plan.lse_shape}")


def _run_kernels(
    executor: Executor,
    plan: Plan,
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
) -> Gradients:
    instances = plan.backward_instances(inputs.q, inputs.v)
    given = (("q", inputs.q), ("k", inputs.k), ("v", inputs.v))
    q, k, v = (memory.addressable(name, x) for name, x in given)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    nothing = q.numel() * k.numel() * v.numel() == 0 or inputs.sequences == 0
    # Rows of no sequence, which no kernel writes.
    if nothing or inputs.queries.given:
        dq.zero_()
    if nothing or inputs.keys.given:
        dk.zero_()
        dv.zero_()
    if nothing:
        return Gradients(dq, dk, dv, _sink_gradient_without_keys(inputs, lse, dlse))
    # A gradient may come with any strides: expanded, transposed.
    dout, out = (memory.made_addressable(*x) for x in (("dout", dout), ("out", out)))
    dlse = None if dlse is None else dlse.float().contiguous()
    workspace = Workspace.like(inputs, instances, plan.options.deterministic)
    rows = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "dq": dq, "dk": dk, "dv": dv}
    lse = as_entry(lse.contiguous(), 3)
    values: dict[str, Value] = {
        **plan.values,
        **inputs._asdict(),
        **{name: as_entry(tensor, 4) for name, tensor in rows.items()},
        "lse": lse,
        "dlse": lse if dlse is None else as_entry(dlse, 3),  # read with `with_dlse` only
        "with_dlse": int(dlse is not None),
        "lse_workspace": workspace.lse,
        "delta_workspace": workspace.delta,
        "dq_semaphore": workspace.dq_semaphore,
        "num_sequences": inputs.sequences,
        "varlen": int(inputs.varlen),
    }

    def blocks_of(rows: int) -> Tensor:
        entries, heads, all_rows, _ = workspace.dq.shape
        return workspace.dq.view(entries, heads, all_rows // rows, -1)

    for instance, dq_workspace in (
        (instances.preprocess, workspace.dq),
        (instances.main, blocks_of(instances.tile_m)),
        (instances.postprocess, blocks_of(instances.post_rows)),
    ):
        launch(executor, instance, {**values, "dq_workspace": dq_workspace})
    dsink = None
    if inputs.learnable_sink is not None:
        exponent = inputs.learnable_sink[None, :, None] * math.log2(math.e) - workspace.lse
        # At most 1, as in the kernels: cute_kernels/backward/scores.py.
        probability = torch.exp2(-exponent.abs())
        dsink = (probability * workspace.delta).sum(dim=(0, 2))
    return Gradients(dq, dk, dv, dsink)


def _sink_gradient_without_keys(inputs: Inputs, lse: Tensor, dlse: Tensor | None) -> Tensor | None:
    """Then a row's LSE is its sink."""
    if inputs.learnable_sink is None:
        return None
    if dlse is None:
        return torch.zeros_like(inputs.learnable_sink)
    lse = as_entry(lse, 3)
    counted = lse != -torch.inf
    if inputs.cu_seqlens_q is not None:  # behind the last sequence lse is undefined
        rows = torch.arange(lse.shape[-1], device=lse.device)
        counted &= rows < inputs.cu_seqlens_q[-1]
    return torch.where(counted, as_entry(dlse, 3), 0.0).float().sum(dim=(0, 2))
