"""Every backward instance on hardware: against FP64, and bitwise repeatable on request."""

from __future__ import annotations

import pytest
import torch
from support import ampere
from support.judge import check_backward, check_packed_backward
from support.problems import SHAPES, Shape, arguments_for, backward_instances, inputs_for, offsets

from hopper_attention import backend, flash_attn_func, flash_attn_varlen_func

pytestmark = pytest.mark.gpu

LARGE = (Shape(2, 2048, 2048, 8, 2), Shape(1, 1023, 4097, 4, 4), Shape(1, 4097, 1023, 4, 1))
PACKED = ((0, 0), (700, 1500), (0, 5), (1500, 400), (7, 0), (1, 1), (128, 128), (0, 0))
RUNS = 1000
REPEATED = {
    "gqa": (128, Shape(2, 2048, 2048, 8, 2), {"causal": True}),
    "local": (64, Shape(1, 4096, 4096, 4, 4), {"window_size": (500, 100)}),
    "wide": (256, Shape(1, 1024, 2048, 4, 1), {}),
}


def differentiate(function, q, k, v, **arguments):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*inputs, **arguments)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    return dout, torch.autograd.grad(out, inputs, dout)


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
@pytest.mark.parametrize("instance", backward_instances(varlen=False))
def test_matches_fp64(instance, shape):
    q, k, v = inputs_for(instance, shape, device="cuda")
    arguments = arguments_for(instance, (SHAPES + LARGE).index(shape))
    dout, gradients = differentiate(flash_attn_func, q, k, v, **arguments)
    check_backward(q, k, v, dout, gradients, **arguments)


@pytest.mark.parametrize("instance", backward_instances(varlen=True))
def test_packed_sequences_match_fp64(instance):
    total_q, total_k = (sum(side) for side in zip(*PACKED))
    q, k, v = (x[0] for x in inputs_for(instance, Shape(1, total_q, total_k, 4, 2), "cuda"))
    cu_seqlens_q, cu_seqlens_k = (offsets(side, "cuda") for side in zip(*PACKED))
    arguments = arguments_for(instance, 1)

    def function(*inputs, **options):
        return flash_attn_varlen_func(*inputs, cu_seqlens_q, cu_seqlens_k, None, None, **options)

    dout, gradients = differentiate(function, q, k, v, **arguments)
    check_packed_backward(q, k, v, dout, gradients, PACKED, **arguments)


@pytest.mark.parametrize("case", REPEATED)
def test_deterministic_over_a_thousand_runs(case):
    head_dim, shape, arguments = REPEATED[case]
    q, k, v = inputs_for(f"bwd_bf16_d{head_dim}", shape, device="cuda")
    _, first = differentiate(flash_attn_func, q, k, v, deterministic=True, **arguments)
    for _ in range(RUNS - 1):
        _, again = differentiate(flash_attn_func, q, k, v, deterministic=True, **arguments)
        assert all(map(torch.equal, first, again))


@pytest.mark.gpu("ampere")
@pytest.mark.parametrize("instance", ampere.instances("ampere_backward", "sm_90"))
def test_ampere_kernels_match_fp64(instance):
    """The second opinion on Hopper's."""
    for number, shape in enumerate((*SHAPES, *LARGE)):
        q, k, v = inputs_for(instance, shape, device="cuda")
        variant = ampere.VARIANTS[number % len(ampere.VARIANTS)]
        arguments = ampere.arguments_for(variant, number)
        with backend("ampere"):
            dout, gradients = differentiate(flash_attn_func, q, k, v, **arguments)
        check_backward(q, k, v, dout, gradients, **arguments)


@pytest.mark.gpu("ampere")
@pytest.mark.parametrize("case", REPEATED)
def test_ampere_kernels_are_deterministic(case):
    head_dim, shape, arguments = REPEATED[case]
    q, k, v = inputs_for(f"bwd_bf16_d{head_dim}", shape, device="cuda")
    with backend("ampere"):
        _, first = differentiate(flash_attn_func, q, k, v, deterministic=True, **arguments)
        for _ in range(RUNS - 1):
            _, again = differentiate(flash_attn_func, q, k, v, deterministic=True, **arguments)
            assert all(map(torch.equal, first, again))


def test_packed_deterministic_over_a_thousand_runs():
    total_q, total_k = (sum(side) for side in zip(*PACKED))
    shape = Shape(1, total_q, total_k, 4, 2)
    q, k, v = (x[0] for x in inputs_for("bwd_bf16_d128_causal_varlen", shape, device="cuda"))
    lengths = (*(offsets(side, "cuda") for side in zip(*PACKED)), None, None)

    def function(*inputs):
        return flash_attn_varlen_func(*inputs, *lengths, causal=True, deterministic=True)

    _, first = differentiate(function, q, k, v)
    for _ in range(RUNS - 1):
        _, again = differentiate(function, q, k, v)
        assert all(map(torch.equal, first, again))
