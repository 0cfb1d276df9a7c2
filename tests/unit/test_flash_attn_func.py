"""The public functions on CPU tensors: the reference behind them, results, equal calls."""

from __future__ import annotations

import inspect

import pytest
import torch
from support.judge import check_forward, check_packed
from support.problems import PACKED, SHAPES, WINDOWS, Shape, offsets, random_inputs

from hopper_attention import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func

OPTIONS = ("window_size", "attention_chunk", "softcap")
DESCALES = ("q_descale", "k_descale", "v_descale")
FLASH_ATTN_3 = {
    flash_attn_func: [
        *("q", "k", "v", "softmax_scale", "causal", "qv", *DESCALES, *OPTIONS),
        *("num_splits", "pack_gqa", "deterministic", "sm_margin", "return_attn_probs"),
    ],
    flash_attn_varlen_func: [
        *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
        *("seqused_q", "seqused_k", "softmax_scale", "causal", "qv", *DESCALES, *OPTIONS),
        *("num_splits", "pack_gqa", "deterministic", "sm_margin", "return_attn_probs"),
    ],
    flash_attn_qkvpacked_func: [
        *("qkv", "softmax_scale", "causal", *DESCALES, *OPTIONS),
        *("deterministic", "num_heads_q", "sm_margin", "return_attn_probs"),
    ],
}


@pytest.mark.parametrize("function", FLASH_ATTN_3, ids=lambda f: f.__name__)
def test_signature_is_flash_attn_3s(function):
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == FLASH_ATTN_3[function]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("arguments", [{}, {"causal": True}, *WINDOWS[:5]], ids=str)
def test_reference_matches_fp64(shape, arguments):
    q, k, v = random_inputs(shape, 64, torch.bfloat16)
    out, lse = flash_attn_func(q, k, v, **arguments, return_lse=True)
    check_forward(q, k, v, out, lse, **arguments)


@pytest.mark.parametrize("lengths", PACKED, ids=["edges", "many"])
@pytest.mark.parametrize("arguments", [{"causal": True}, {"softcap": 9.0}, WINDOWS[1]], ids=str)
def test_packed_reference_matches_fp64(lengths, arguments):
    lengths_q, lengths_k = zip(*lengths)
    shape = Shape(1, sum(lengths_q), sum(lengths_k), 2, 1)
    q, k, v = (x[0] for x in random_inputs(shape, 64, torch.bfloat16))
    out, lse = flash_attn_varlen_func(
        q, k, v, offsets(lengths_q), offsets(lengths_k), None, None, return_lse=True, **arguments
    )
    check_packed(q, k, v, out, lse, lengths, **arguments)


@pytest.fixture
def inputs():
    return random_inputs(Shape(1, 113, 203, 2, 1), 64, torch.bfloat16)


@pytest.mark.parametrize(
    ("arguments", "causal"),
    [
        ({"window_size": (-1, -1)}, False),
        ({"window_size": (None, None)}, False),
        ({"window_size": (1000, 1000)}, False),
        ({"window_size": (-1, 0)}, True),
        ({"window_size": (1000, 0)}, True),
        ({"window_size": (-1, 7), "causal": True}, True),
        ({"num_splits": 0, "pack_gqa": False, "deterministic": True}, False),
    ],
    ids=str,
)
def test_arguments_that_mean_the_same(inputs, arguments, causal):
    expected = flash_attn_func(*inputs, causal=causal)
    assert torch.equal(flash_attn_func(*inputs, **arguments), expected)


def test_either_flag_returns_lse(inputs):
    assert isinstance(flash_attn_func(*inputs), torch.Tensor)
    for flag in ("return_lse", "return_attn_probs"):
        out, lse = flash_attn_func(*inputs, **{flag: True})
        assert lse.shape == (out.shape[0], out.shape[2], out.shape[1])


def test_no_grad_context_allows_leaves_that_require_grad(inputs):
    q, k, v = inputs
    with torch.no_grad():
        out = flash_attn_func(q.clone().requires_grad_(), k, v)
    assert torch.equal(out, flash_attn_func(q, k, v)) and not out.requires_grad


@pytest.mark.parametrize("heads_kv", [4, 2, 1])
def test_packed_qkv_is_its_parts(heads_kv):
    q, k, v = random_inputs(Shape(2, 30, 30, 4, heads_kv), 64, torch.bfloat16)
    expected = flash_attn_func(q, k, v, causal=True, softmax_scale=0.2)
    qkv = torch.cat((q, k, v), dim=2)
    out = flash_attn_qkvpacked_func(qkv, 0.2, True, num_heads_q=4)
    assert torch.equal(out, expected)
    if heads_kv == 4:
        stacked = torch.stack((q, k, v), dim=2)
        assert torch.equal(flash_attn_qkvpacked_func(stacked, 0.2, True), expected)
