"""The operation that autograd sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hopper_attention.arguments import Lengths

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Attention(torch.autograd.Function):
    """(out, lse) of q, k, v and the sinks, all of them differentiable, lse included.

    `forward` and `backward` compute: functions of the tensors and lengths.  The ctx form costs half
    of the form with `setup_context` a call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[..., tuple[Tensor, Tensor]],
        differentiate: Callable[..., Gradients],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        queries: Lengths,
        keys: Lengths,
        batch: int,
    ) -> tuple[Tensor, Tensor]:
        out, lse = compute(q, k, v, sink, queries, keys, batch)
        index = (queries.cu_seqlens, queries.seqused, keys.cu_seqlens, keys.seqused)
        ctx.save_for_backward(q, k, v, out, lse, sink, *index)
        ctx.differentiate, ctx.batch = differentiate, batch
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sink, *index = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 9
        if dout is None:
            dout = torch.zeros_like(out)
        queries, keys = Lengths(*index[:2]), Lengths(*index[2:])
        gradients = ctx.differentiate(q, k, v, out, lse, sink, queries, keys, ctx.batch, dout, dlse)
        needed = ctx.needs_input_grad[2:6]
        kept = (g if need else None for g, need in zip(gradients, needed, strict=True))
        return (None, None, *kept, None, None, None)
