"""flash_attn_func on CPU tensors: the reference behind it, results and equivalent arguments."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import SHAPES, check_forward, random_inputs

from hopper_attention import flash_attn_func

FLASH_ATTN_3 = [
    *("q", "k", "v", "softmax_scale", "causal", "qv", "q_descale", "k_descale", "v_descale"),
    *("window_size", "attention_chunk", "softcap", "num_splits", "pack_gqa", "deterministic"),
    *("sm_margin", "return_attn_probs"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_reference_matches_fp64(shape, causal):
    q, k, v = random_inputs(shape, 64, torch.bfloat16)
    out, lse = flash_attn_func(q, k, v, causal=causal, return_lse=True)
    check_forward(q, k, v, out, lse, causal=causal)


def test_signature_is_flash_attn_3s():
    parameters = inspect.signature(flash_attn_func).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == FLASH_ATTN_3


@pytest.fixture
def inputs():
    return random_inputs(SHAPES[2], 64, torch.bfloat16)


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
