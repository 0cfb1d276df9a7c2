"""PyTorch's scaled_dot_product_attention, by backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from hopper_attention.benchmarks.peers.common import refuse_if, with_backward, without_support
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hopper_attention.bench.measure.inputs import Inputs
from hopper_attention.bench.measure.runner import Prepared


@dataclass(frozen=True)
class Sdpa:
    name: str
    backend: str

    def prepare(self, inputs: Inputs) -> Prepared:
        problem = inputs.problem
        refuse_if(problem.dtype == "fp8", "no FP8")
        refuse_if(problem.lengths, "dense batches only")
        refuse_if(problem.page_size, "no paged cache")
        refuse_if(problem.window >= 0 or problem.softcap or problem.sink, "plain masks only")
        refuse_if(
            problem.causal and problem.seqlen_q != problem.seqlen, "causal masks are top-left"
        )
        backend = getattr(SDPBackend, self.backend)

        def forward() -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
            grouped = problem.heads != problem.heads_kv
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=problem.causal, enable_gqa=grouped
                )
            return out.transpose(1, 2)

        without_support(forward, RuntimeError)  # "No available kernel"
        return Prepared(with_backward(inputs, forward))
