"""flashinfer's FA3 prefill: one sequence a call."""

from __future__ import annotations

from hopper_attention.benchmarks.peers.common import refuse_if, require, without_support
from torch import Tensor

from hopper_attention.bench.measure.inputs import Inputs
from hopper_attention.bench.measure.runner import Prepared


class FlashInfer:
    name = "flashinfer fa3"

    def prepare(self, inputs: Inputs) -> Prepared:
        problem = inputs.problem
        refuse_if(problem.direction == "backward", "no backward")
        refuse_if(problem.batch != 1 or problem.page_size, "this adapter runs one sequence")
        refuse_if(problem.dtype == "fp8" or problem.sink, "neither FP8 nor sinks here")
        flashinfer = require("flashinfer")
        q, k, v = inputs.q[0], inputs.k[0], inputs.v[0]

        def forward() -> tuple[Tensor]:
            out = flashinfer.single_prefill_with_kv_cache(
                q,
                k,
                v,
                causal=problem.causal,
                kv_layout="NHD",
                window_left=problem.window,
                logits_soft_cap=problem.softcap or None,
                backend="fa3",
            )
            return (out[None],)

        without_support(forward)
        return Prepared(forward)
