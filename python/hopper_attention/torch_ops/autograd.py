"""Plain calls as autograd sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hopper_attention.dispatch import target
from hopper_attention.dispatch.plan import Plan
from hopper_attention.launch import backward
from hopper_attention.problem.values import Gradients, Inputs
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
        *tensors: Any,
    ) -> tuple[Tensor, Tensor]:
        """`tensors` are the fields of `Inputs`: autograd must see them one by one."""
        inputs = Inputs(*tensors)
        out, lse = run(plan, inputs)
        ctx.save_for_backward(out, lse, *inputs)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        out, lse, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        inputs = Inputs(*tensors)
        # create_graph: only the operator refuses second derivatives.
        if torch.is_grad_enabled() or needs_dispatcher(inputs):
            with target.restored(ctx.plan.target.kernels):
                found = Gradients(
                    *torch.ops.hopper_attention.backward(
                        dout, dlse, out, lse, *inputs, *ctx.plan.options
                    )
                )
        else:
            found = backward.run(ctx.plan, inputs, out, lse, dout, dlse)
        gradients = (None, None, *found.of_inputs)
        needed = zip(gradients, ctx.needs_input_grad, strict=True)
        return tuple(gradient if need else None for gradient, need in needed)
