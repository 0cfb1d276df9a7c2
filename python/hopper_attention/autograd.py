"""Plain calls as autograd sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hopper_attention import backward, forward
from hopper_attention.arguments import Lengths
from hopper_attention.plan import Inputs, Plan


class Attention(torch.autograd.Function):
    """(out, lse) of q, k, v and the sinks, all of them differentiable, lse included.

    The ctx form costs half of the form with `setup_context` a call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        queries: Lengths,
        keys: Lengths,
    ) -> tuple[Tensor, Tensor]:
        out, lse = forward.run(plan, Inputs(q, k, v, sink, queries, keys))
        index = (queries.cu_seqlens, queries.seqused, keys.cu_seqlens, keys.seqused)
        ctx.save_for_backward(q, k, v, sink, out, lse, *index)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sink, out, lse, *index = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 7
        if dout is None:
            dout = torch.zeros_like(out)
        inputs = Inputs(q, k, v, sink, Lengths(*index[:2]), Lengths(*index[2:]))
        gradients = backward.run(ctx.plan, inputs, out, lse, dout, dlse)
        needed = ctx.needs_input_grad[1:5]
        kept = (g if need else None for g, need in zip(gradients, needed, strict=True))
        return (None, *kept, None, None)
