"""Every FP8 instance on hardware: against the FP64 model, and beside the simulator."""

from __future__ import annotations

import pytest
import torch
from support.fp8 import (
    DENSE_INSTANCES,
    LENGTHS,
    PACKED,
    SHAPES,
    Case,
    PackedCase,
    check,
    check_packed,
    quantized,
)
from support.problems import Shape

from hopper_attention import attention_fp8, simulator

pytestmark = pytest.mark.gpu

LARGE = (Shape(2, 1024, 2048, 4, 2), Shape(1, 1023, 4097, 4, 4))
"""Their models have several FP64 scores for every pair: more do not fit beside other workers'."""


DENSE_CASES = [
    Case.of(instance, shape, number)
    for instance in DENSE_INSTANCES
    for number, shape in enumerate(SHAPES + LARGE)
]


@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
def test_matches_model(case):
    q, k, v = (x.cuda() for x in case.inputs())
    out, lse = attention_fp8(q, k, v, return_lse=True, **case.call)
    check(
        case.instance, quantized(q, k, v, case.recipe, codes=case.codes), out, lse, **case.arguments
    )
    again, lse_again = attention_fp8(q, k, v, return_lse=True, **case.call)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


@pytest.mark.parametrize(
    "case", [PackedCase.of(name, number) for number, name in enumerate(PACKED)], ids=str
)
def test_packed_sequences_match_model(case):
    tensors, queries, keys = case.inputs("cuda")
    out, lse = attention_fp8(
        *tensors, return_lse=True, cu_seqlens_q=queries.cu_seqlens,
        cu_seqlens_k=keys.cu_seqlens, **case.call,
    )  # fmt: skip
    operands = quantized(*tensors, case.recipe, queries=queries, keys=keys, codes=case.codes)
    check_packed(case.instance, operands, LENGTHS, out, lse, **case.arguments)


@pytest.mark.parametrize("two_level", [False, True])
def test_accumulators_beside_the_simulator(two_level):
    """How many bits of sums a GPU keeps: its error is nearer to that of 14 than of all."""
    q, k = torch.randn(1, 64, 1, 64).bfloat16() * 0.1, torch.randn(1, 4096, 1, 64).bfloat16()
    v = (torch.rand(1, 4096, 1, 64) + 0.5).bfloat16()
    hardware = attention_fp8(q.cuda(), k.cuda(), v.cuda(), two_level=two_level).cpu().double()
    distances = []
    for bits in (14, None):
        with simulator.enabled(fp8_accumulator_bits=bits):
            simulated = attention_fp8(q, k, v, two_level=two_level).double()
        distances.append((hardware - simulated).square().mean().sqrt().item())
    assert distances[0] <= distances[1], distances
