"""FlexAttention: masks and score functions as Python, compiled by torch.compile."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from hopper_attention.benchmarks.peers.common import (
    refuse_if,
    require,
    with_backward,
    without_support,
)
from torch import Tensor

from hopper_attention.bench.data.workloads import Problem
from hopper_attention.bench.measure.inputs import Inputs
from hopper_attention.bench.measure.runner import Prepared


class FlexAttention:
    name = "FlexAttention"

    def prepare(self, inputs: Inputs) -> Prepared:
        problem = inputs.problem
        refuse_if(problem.dtype == "fp8", "no FP8")
        refuse_if(problem.lengths, "dense batches only")
        refuse_if(problem.page_size or problem.sink, "no paged cache and no sinks")
        flex = require("torch.nn.attention.flex_attention")
        require("triton")
        attention = torch.compile(flex.flex_attention)
        mask = _block_mask(flex, problem, inputs.q.device)
        cap = problem.softcap

        def softcap(score: Tensor, *_indices: Tensor) -> Tensor:
            return cap * torch.tanh(score / cap)

        def forward() -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
            out = attention(
                q,
                k,
                v,
                score_mod=softcap if cap else None,
                block_mask=mask,
                enable_gqa=problem.heads != problem.heads_kv,
            )
            return out.transpose(1, 2)

        without_support(forward)
        return Prepared(with_backward(inputs, forward))


def _block_mask(flex: ModuleType, problem: Problem, device: torch.device) -> Any:
    """Aligned to the bottom right; None without a mask."""
    if not problem.causal and problem.window < 0:
        return None
    shift = problem.seqlen - problem.seqlen_q

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        last = query + shift
        mask = key <= last if problem.causal else key >= 0
        return mask & (key >= last - problem.window) if problem.window >= 0 else mask

    return flex.create_block_mask(
        visible, None, None, problem.seqlen_q, problem.seqlen, device=device
    )
