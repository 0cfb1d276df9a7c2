"""The library's operators for PyTorch: `torch.ops.hopper_attention.forward` and `.backward`.

Compilers, dispatch modes, tensor subclasses and function transforms see these two, with fake
implementations, autograd and FLOP formulas (sharding rules: dtensor.py).  A plain call goes past
PyTorch's dispatcher: 10 us in place of 27, with gradients 18 in place of 157 (docs/pytorch.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from hopper_attention.dispatch import target
from hopper_attention.dispatch.plan import prepare
from hopper_attention.launch import backward, forward
from hopper_attention.problem import checks, memory, values
from hopper_attention.problem.checks import check_shapes_of
from hopper_attention.problem.values import Gradients, Inputs, Lengths, Options, result_shapes
from hopper_attention.torch_ops import autograd, dtensor
from hopper_attention.torch_ops.eager import needs_dispatcher
from hopper_attention.torch_ops.schema import BACKWARD, FORWARD

KERNELS = "CompositeExplicitAutograd"  # CUDA and CPU alike: forward.run and backward.run choose
library = torch.library.Library("hopper_attention", "DEF")
library.define(f"forward({FORWARD}) -> (Tensor out, Tensor lse)")
library.define(f"backward({BACKWARD}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink)")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learnable_sink: Tensor | None,
    queries: Lengths,
    keys: Lengths,
    options: Options,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a public function's arguments, differentiable if anything requires grad."""
    checks.check_tensors(q, k, v)
    if not (q.dtype is k.dtype is v.dtype and q.dtype in values.DTYPES):
        q, k, v = checks.autocast(q, k, v)
    sink = checks.resolve_sink(learnable_sink, q)
    inputs = Inputs.of(q, k, v, sink, queries, keys)
    needed = q.requires_grad or k.requires_grad or v.requires_grad
    needed = (needed or (sink is not None and sink.requires_grad)) and torch.is_grad_enabled()
    if out is not None:
        memory.check_out(out, q, k, v, options.out_dtype)
        if needed:
            raise NotImplementedError("out: not differentiable; omit it or use torch.no_grad()")
    if needs_dispatcher(inputs):
        refuse_tangents(q, k, v, sink)
        dtensor.register()
        result, lse = torch.ops.hopper_attention.forward(*inputs, *options)
        return (result if out is None else out.copy_(result)), lse
    plan = prepare(inputs, options)
    if not needed:
        if out is not None:
            torch.autograd.graph.increment_version(out)  # kernels write it behind autograd's back
        return forward.run(plan, inputs, out)
    checks.check_differentiable(plan.out_dtype, q.dtype)
    if plan.executor_for(q) is not target.Executor.REFERENCE:
        plan.backward_instances(q, v)  # refuses what has no backward before anything is launched
    return autograd.Attention.apply(plan, forward.run, *inputs)


def refuse_tangents(*tensors: Tensor | None) -> None:
    """The operator would drop them without a word where nothing requires grad."""
    if forward_ad._current_level >= 0:
        for tensor in tensors:
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError("forward-mode derivatives of attention are not supported")


def checked(inputs: Inputs) -> Inputs:
    """Return an operator's tensors, with everything checked that the functions check before."""
    checks.check_tensors(inputs.q, inputs.k, inputs.v)
    sink = checks.resolve_sink(inputs.learnable_sink, inputs.q)
    return inputs._replace(learnable_sink=sink)


@torch.library.impl(library, "forward", KERNELS)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, options = FORWARD.groups_of(arguments)
    inputs = checked(inputs)
    return forward.run(prepare(inputs, options.checked()), inputs)


@torch.library.impl(library, "backward", KERNELS)
def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (dout, dlse, out, lse), inputs, options = BACKWARD.groups_of(arguments)
    inputs = checked(inputs)
    plan = prepare(inputs, options.checked())
    dq, dk, dv, dsink = backward.run(plan, inputs, out, lse, dout, dlse)
    return dq, dk, dv, _or_nothing(dsink, inputs.q)


def _or_nothing(dsink: Tensor | None, q: Tensor) -> Tensor:
    """A schema has no optional results."""
    return q.new_empty(0, dtype=torch.float32) if dsink is None else dsink


@torch.library.register_fake("hopper_attention::forward", lib=library)
def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, options = FORWARD.groups_of(arguments)
    check_shapes_of(inputs)
    return fake_results(inputs, checks.resolve_out_dtype(options.out_dtype, inputs.q.dtype))


def fake_results(inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return out and lse without data."""
    q, (packed, _) = inputs.q, inputs.packed
    out_shape, lse_shape = result_shapes(q.shape, inputs.v.shape, packed)
    return q.new_empty(out_shape, dtype=dtype), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.register_fake("hopper_attention::backward", lib=library)
def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, (q, k, v, sink, *_), _ = BACKWARD.groups_of(arguments)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, _or_nothing(None if sink is None else torch.empty_like(sink), q)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.options = FORWARD.groups_of(inputs)
    checks.check_differentiable(output[0].dtype, tensors.q.dtype)
    ctx.save_for_backward(*output, *tensors)
    ctx.forced = target.forced()
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    with target.restored(ctx.forced):
        found = gradients(ctx.saved_tensors, ctx.options, dout, dlse)
    return FORWARD.gradients(found)


def gradients(
    saved: tuple[Tensor, ...], options: Options, dout: Tensor | None, dlse: Tensor | None
) -> Inputs:
    """Return an `Inputs` of gradients; `saved` are forward's results, then its inputs."""
    out, lse, *tensors = saved
    inputs = Inputs(*tensors)
    if dout is None and dlse is None:
        return Inputs(*(None for _ in tensors))  # type: ignore[arg-type]
    dout = torch.zeros_like(out) if dout is None else dout
    found = torch.ops.hopper_attention.backward(dout, dlse, out, lse, *inputs, *options)
    gradients = Gradients(*found)
    if inputs.learnable_sink is None:
        gradients = gradients._replace(dsink=None)
    return gradients.of_inputs


def _refuse_second_derivatives(ctx: Any, *gradients: Tensor | None) -> None:
    raise NotImplementedError("second derivatives of attention are not supported")


torch.library.register_autograd(
    "hopper_attention::forward", _differentiate, setup_context=_save, lib=library
)
torch.library.register_autograd(
    "hopper_attention::backward", _refuse_second_derivatives, lib=library
)


@register_flop_formula(torch.ops.hopper_attention.forward, get_raw=True)
def _forward_flops(*arguments: Any, out_val: Any = None) -> int:
    inputs, _ = FORWARD.groups_of(arguments)
    return forward_flops(inputs)


def forward_flops(inputs: Inputs) -> int:
    """Count FLOPs as PyTorch does: masks hide nothing, packed sequences see themselves."""
    d, dv = inputs.q.shape[-1], inputs.v.shape[-1]
    return 2 * (d + dv) * inputs.q.shape[-2] * _scores(inputs)


@register_flop_formula(torch.ops.hopper_attention.backward, get_raw=True)
def _backward_flops(*arguments: Any, out_val: Any = None) -> int:
    """Five GEMMs: S again, dP, dV, dQ, dK."""
    _, inputs, _ = BACKWARD.groups_of(arguments)
    d, dv = inputs.q.shape[-1], inputs.v.shape[-1]
    return 2 * (3 * d + 2 * dv) * inputs.q.shape[-2] * _scores(inputs)


def _scores(inputs: Inputs) -> int:
    """Return the number of scores of one head: the sum of seqlen_q * seqlen_k."""
    sides = ((inputs.q, inputs.queries), (inputs.k, inputs.keys))
    queries, keys = (_sequence_lengths(x, lengths) for x, lengths in sides)
    return sum(m * n for m, n in zip(queries, keys, strict=True))


def _sequence_lengths(tensor: Tensor, lengths: Lengths) -> list[int]:
    """Reads them from the device; where they cannot be read, every sequence has all rows."""
    given = lengths.cu_seqlens if lengths.seqused is None else lengths.seqused
    if given is None:
        return [tensor.shape[1]] * tensor.shape[0]
    if type(given) is not Tensor or given.is_meta:
        count = given.shape[0] - (lengths.seqused is None)
        return [tensor.shape[-3]] * count
    return (given.diff() if lengths.seqused is None else given).tolist()
