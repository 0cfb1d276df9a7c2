"""Every FP8 instance on hardware: against the FP64 model, and beside the simulator."""

from __future__ import annotations

import pytest
import torch
from support.fp8 import (
    DENSE_INSTANCES,
    INSTANCES,
    LENGTHS,
    PACKED,
    RECIPES,
    SHAPES,
    arguments_for,
    check,
    check_packed,
    inputs_for,
    packed_inputs,
    quantized,
)
from support.problems import Shape

from hopper_attention import attention_fp8, simulator

pytestmark = pytest.mark.gpu

LARGE = (Shape(2, 1024, 2048, 4, 2), Shape(1, 1023, 4097, 4, 4))
"""Their models have several FP64 scores for every pair: more do not fit beside other workers'."""


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
@pytest.mark.parametrize("instance", DENSE_INSTANCES)
def test_matches_model(instance, shape):
    config = INSTANCES[instance].config
    number = (SHAPES + LARGE).index(shape)
    recipe = RECIPES[number % len(RECIPES)]
    q, k, v = (x.cuda() for x in inputs_for(config, shape))
    arguments = arguments_for(config, number)
    options = {"recipe": recipe, "two_level": config["two_level"], **arguments}
    out, lse = attention_fp8(q, k, v, return_lse=True, **options)
    check(instance, quantized(q, k, v, recipe), out, lse, **arguments)
    again, lse_again = attention_fp8(q, k, v, return_lse=True, **options)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


@pytest.mark.parametrize("instance", PACKED)
def test_packed_sequences_match_model(instance):
    config = INSTANCES[instance].config
    number = PACKED.index(instance)
    recipe, arguments = RECIPES[number % len(RECIPES)], arguments_for(config, number)
    tensors, queries, keys = packed_inputs(config, "cuda")
    out, lse = attention_fp8(
        *tensors, recipe=recipe, two_level=config["two_level"], return_lse=True,
        cu_seqlens_q=queries.cu_seqlens, cu_seqlens_k=keys.cu_seqlens, **arguments,
    )  # fmt: skip
    operands = quantized(*tensors, recipe, queries=queries, keys=keys)
    check_packed(instance, operands, LENGTHS, out, lse, **arguments)


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
