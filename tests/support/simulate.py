"""The public functions on the simulator, forward and backward, dense and packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hopper_attention import flash_attn_func, flash_attn_varlen_func, simulator
from support.problems import offsets


def simulate(
    q: Tensor, k: Tensor, v: Tensor, seed: int = 0, pack_gqa: bool | None = False, **arguments: Any
) -> Any:
    """(out, lse)"""
    with simulator.enabled(seed=seed):
        return flash_attn_func(q, k, v, pack_gqa=pack_gqa, return_lse=True, **arguments)


def simulate_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[tuple[int, int]],
    seed: int = 0,
    bounded: bool = True,
    **arguments: Any,
) -> Any:
    """(out, lse); `bounded`: the greatest lengths are given."""
    sides = list(zip(*lengths))
    bounds = [max(side) if bounded else None for side in sides]
    with simulator.enabled(seed=seed):
        return flash_attn_varlen_func(
            q, k, v, *(offsets(side) for side in sides), *bounds, return_lse=True, **arguments
        )


def packed(lengths: Sequence[tuple[int, int]]) -> Callable[..., Any]:
    """`flash_attn_varlen_func` of packed sequences of these lengths."""
    cu_seqlens_q, cu_seqlens_k = (offsets(side) for side in zip(*lengths))
    return partial(
        flash_attn_varlen_func,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=None,
        max_seqlen_k=None,
    )


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def like(out: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)


def differentiate(
    function: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: int = 0,
    dlse: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(dout, gradients) of a dout of its own; sinks are differentiated if there are any."""
    inputs = leaves((q, k, v))
    if "learnable_sink" in arguments:
        sink = arguments["learnable_sink"].detach().requires_grad_()
        inputs, arguments = [*inputs, sink], {**arguments, "learnable_sink": sink}
    with simulator.enabled(seed=seed):
        out, lse = function(*inputs[:3], return_lse=True, **arguments)
        dout = like(out)
        outputs, grads = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
        return dout, torch.autograd.grad(outputs, inputs, grads)
