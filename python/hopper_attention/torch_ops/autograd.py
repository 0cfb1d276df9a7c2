"""Plain calls as autograd sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hopper_attention.dispatch import target
from hopper_attention.dispatch.plan import Plan
from hopper_attention.launch import backward
from hopper_attention.problem.values import Inputs, Lengths
from hopper_attention.torch_ops.eager import needs_dispatcher


class Attention(torch.autograd.Function):
    """(out, lse) of q, k, v and the sinks, all of them differentiable, lse included.

    `run` computes them; gradients are those of the attention that the plan describes.  The ctx form
    costs half of the form with `setup_context` a call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        run: Callable[[Plan, Inputs], tuple[Tensor, Tensor]],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        queries: Lengths,
        keys: Lengths,
    ) -> tuple[Tensor, Tensor]:
        inputs = Inputs(q, k, v, sink, queries, keys)
        out, lse = run(plan, inputs)
        ctx.save_for_backward(out, lse, *inputs.flat)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * 8
        out, lse, *flat = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        inputs = Inputs.of(flat)
        # create_graph: only the operator refuses second derivatives.
        if torch.is_grad_enabled() or needs_dispatcher(inputs):
            with target.restored(ctx.plan.target.kernels):
                gradients = torch.ops.hopper_attention.backward(
                    dout, dlse, out, lse, *flat, *ctx.plan.options
                )
        else:
            gradients = backward.run(ctx.plan, inputs, out, lse, dout, dlse)
        needed = ctx.needs_input_grad[2:6]
        kept = (g if need else None for g, need in zip(gradients, needed, strict=True))
        return (None, None, *kept, None, None)
