"""Ours on FP8 tensors with another precision than the public function has by default."""

from __future__ import annotations

import torch
from hopper_attention.benchmarks.peers.common import refuse_if, without_support

from hopper_attention.bench.measure.inputs import Inputs
from hopper_attention.bench.measure.runner import Prepared
from hopper_attention.dispatch import plan
from hopper_attention.launch import forward_fp8
from hopper_attention.problem import values
from hopper_attention.problem.values import Options, PrecisionOptions
from hopper_attention.quantize import columns_of


class OursFp8:
    """`arranged`: V is given as the kernel reads it, as quantisation here writes it."""

    def __init__(self, name: str, precision: PrecisionOptions, *, arranged: bool = False):
        self.name = name
        self.precision = precision
        self.arranged = arranged

    def prepare(self, inputs: Inputs) -> Prepared:
        problem = inputs.problem
        refuse_if(problem.dtype != "fp8", "FP8 only")
        refuse_if(problem.lengths, "dense batches only")
        window = (problem.window, 0 if problem.causal else None)
        options = Options.of(
            causal=problem.causal,
            window_size=window if problem.window >= 0 else (-1, -1),
            softcap=problem.softcap,
        )
        tensors = values.Inputs(inputs.q, inputs.k, inputs.v)
        call = plan.prepare(tensors, options, self.precision)
        one = torch.ones(1, device=inputs.q.device)
        columns = columns_of(inputs.v) if self.arranged else None
        scaling = forward_fp8.Scaling(
            one, one, one, problem.seqlen_q, problem.seqlen, columns=columns
        )

        def forward() -> tuple[torch.Tensor]:
            return (forward_fp8.run(call, tensors, scaling)[0],)

        without_support(forward)
        return Prepared(forward, call.instance)
