"""The reference implementation against hand-computed cases and PyTorch in FP64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from hopper_attention import reference


def attention(q, k, v, **arguments):
    return reference.attention(q, k, v, compute_dtype=torch.float64, **arguments)


def test_two_keys_by_hand():
    """Scores 0 and ln 3: weights 1/4 and 3/4, lse ln 4."""
    q = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    k = torch.tensor([[0.0, 5.0], [math.log(3.0), 7.0]], dtype=torch.float64).view(1, 2, 1, 2)
    v = torch.tensor([[4.0, 0.0], [0.0, 8.0]]).view(1, 2, 1, 2)
    out, lse = attention(q, k, v, softmax_scale=1.0, causal=False)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 6.0], dtype=torch.float64))
    assert lse.item() == pytest.approx(math.log(4.0))


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "seen"),
    [(2, 5, [4, 5]), (5, 2, [0, 0, 0, 1, 2]), (3, 3, [1, 2, 3]), (2, 0, [0, 0])],
)
def test_causal_is_aligned_to_the_bottom_right(seqlen_q, seqlen_k, seen):
    """With equal scores a query averages the keys it sees: out counts them, lse is their log."""
    q = torch.zeros(1, seqlen_q, 1, 8)
    k = torch.ones(1, seqlen_k, 1, 8)
    v = torch.arange(1.0, seqlen_k + 1).view(1, -1, 1, 1).expand(1, seqlen_k, 1, 8)
    out, lse = attention(q, k, v, softmax_scale=1.0, causal=True)
    expected = [(n + 1) / 2 if n else 0.0 for n in seen]
    assert out[0, :, 0, 0].tolist() == pytest.approx(expected)
    assert lse.exp()[0, 0].tolist() == pytest.approx(seen)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_pytorch_in_fp64(causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 37, heads, 16, dtype=torch.float64) for heads in (4, 2, 2))
    out, _ = attention(q, k, v, softmax_scale=0.3, causal=causal)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_query_blocks_do_not_show(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 50, 1, 16) for _ in range(3))
    whole = attention(q, k, v, softmax_scale=0.2, causal=True)
    monkeypatch.setattr(reference, "QUERY_BLOCK", 7)
    blocked = attention(q, k, v, softmax_scale=0.2, causal=True)
    torch.testing.assert_close(blocked, whole)
