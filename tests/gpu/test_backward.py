"""Every backward instance on hardware: against FP64, and bitwise repeatable on request."""

from __future__ import annotations

import pytest
import torch
from support import ampere
from support.judge import check_backward, check_packed_backward
from support.problems import (
    SHAPES,
    Case,
    PackedCase,
    Shape,
    arguments_for,
    backward_instances,
    dense_cases,
    offsets,
    window,
)

from hopper_attention import backend, flash_attn_func, flash_attn_varlen_func

pytestmark = pytest.mark.gpu

LARGE = (Shape(2, 2048, 2048, 8, 2), Shape(1, 1023, 4097, 4, 4), Shape(1, 4097, 1023, 4, 1))
PACKED = ((0, 0), (700, 1500), (0, 5), (1500, 400), (7, 0), (1, 1), (128, 128), (0, 0))
RUNS = 1000
REPEATED = (
    Case("bwd_bf16_d128_causal", Shape(2, 2048, 2048, 8, 2), {"causal": True}),
    Case("bwd_bf16_d64_local", Shape(1, 4096, 4096, 4, 4), {"window_size": (500, 100)}),
    Case("bwd_bf16_d256", Shape(1, 1024, 2048, 4, 1), {}),
)


def differentiate(function, q, k, v, **arguments):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*inputs, **arguments)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    return dout, torch.autograd.grad(out, inputs, dout)


@pytest.mark.parametrize(
    "case", dense_cases(backward_instances(varlen=False), SHAPES + LARGE), ids=str
)
def test_matches_fp64(case):
    q, k, v = case.inputs("cuda")
    dout, gradients = differentiate(flash_attn_func, q, k, v, **case.arguments)
    check_backward(q, k, v, dout, gradients, **case.arguments)


def packed_case(instance):
    return PackedCase(instance, PACKED, arguments_for(instance, window(1)), heads=4, heads_kv=2)


@pytest.mark.parametrize("case", list(map(packed_case, backward_instances(varlen=True))), ids=str)
def test_packed_sequences_match_fp64(case):
    q, k, v = case.inputs("cuda")
    cu_seqlens_q, cu_seqlens_k = (offsets(side, "cuda") for side in zip(*case.lengths))

    def function(*inputs, **options):
        return flash_attn_varlen_func(*inputs, cu_seqlens_q, cu_seqlens_k, None, None, **options)

    dout, gradients = differentiate(function, q, k, v, **case.arguments)
    check_packed_backward(q, k, v, dout, gradients, case.lengths, **case.arguments)


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_deterministic_over_a_thousand_runs(case):
    q, k, v = case.inputs("cuda")
    _, first = differentiate(flash_attn_func, q, k, v, deterministic=True, **case.arguments)
    for _ in range(RUNS - 1):
        _, again = differentiate(flash_attn_func, q, k, v, deterministic=True, **case.arguments)
        assert all(map(torch.equal, first, again))


def ampere_cases():
    """Variants and windows take turns over the shapes of every instance."""
    for instance in ampere.instances("ampere_backward", "sm_90"):
        cases = []
        for number, shape in enumerate(SHAPES + LARGE):
            variant = ampere.VARIANTS[number % len(ampere.VARIANTS)]
            cases.append(Case(instance, shape, ampere.arguments_for(variant, window(number))))
        yield pytest.param(cases, id=instance)


@pytest.mark.gpu("ampere")
@pytest.mark.parametrize("cases", list(ampere_cases()))
def test_ampere_kernels_match_fp64(cases):
    """Ampere's kernels are a second opinion on Hopper's."""
    for case in cases:
        print(case)
        q, k, v = case.inputs("cuda")
        with backend("ampere"):
            dout, gradients = differentiate(flash_attn_func, q, k, v, **case.arguments)
        check_backward(q, k, v, dout, gradients, **case.arguments)


@pytest.mark.gpu("ampere")
@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_ampere_kernels_are_deterministic(case):
    """Ampere's kernels run the problems of the instances that a case names."""
    q, k, v = case.inputs("cuda")
    with backend("ampere"):
        _, first = differentiate(flash_attn_func, q, k, v, deterministic=True, **case.arguments)
        for _ in range(RUNS - 1):
            _, again = differentiate(flash_attn_func, q, k, v, deterministic=True, **case.arguments)
            assert all(map(torch.equal, first, again))


def test_packed_deterministic_over_a_thousand_runs():
    q, k, v = packed_case("bwd_bf16_d128_causal_varlen").inputs("cuda")
    lengths = (*(offsets(side, "cuda") for side in zip(*PACKED)), None, None)

    def function(*inputs):
        return flash_attn_varlen_func(*inputs, *lengths, causal=True, deterministic=True)

    _, first = differentiate(function, q, k, v)
    for _ in range(RUNS - 1):
        _, again = differentiate(function, q, k, v)
        assert all(map(torch.equal, first, again))
