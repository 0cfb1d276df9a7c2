"""The reference implementation against hand-computed cases and PyTorch in FP64."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import pytest
import torch
import torch.nn.functional as F

from hopper_attention import reference
from hopper_attention.problem.values import CAUSAL, FULL, UNBOUNDED, Lengths, Mask


def attention(q, k, v, **arguments):
    return reference.attention(q, k, v, compute_dtype=torch.float64, **arguments)


def seen_keys(seqlen_q, seqlen_k, mask):
    """Which keys each query sees, read off the output: key j's value is the j-th unit vector."""
    q, k = torch.zeros(1, seqlen_q, 1, 8), torch.ones(1, seqlen_k, 1, 8)
    v = torch.eye(seqlen_k).view(1, seqlen_k, 1, seqlen_k)
    out, lse = attention(q, k, v, softmax_scale=1.0, mask=mask)
    seen = [row.nonzero().flatten().tolist() for row in out[0, :, 0]]
    assert lse.exp()[0, 0].tolist() == pytest.approx([len(keys) for keys in seen])
    return seen


def test_two_keys_by_hand():
    """Scores 0 and ln 3: weights 1/4 and 3/4, lse ln 4."""
    q = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    k = torch.tensor([[0.0, 5.0], [math.log(3.0), 7.0]], dtype=torch.float64).view(1, 2, 1, 2)
    v = torch.tensor([[4.0, 0.0], [0.0, 8.0]]).view(1, 2, 1, 2)
    out, lse = attention(q, k, v, softmax_scale=1.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 6.0], dtype=torch.float64))
    assert lse.item() == pytest.approx(math.log(4.0))


def test_sink_by_hand():
    """Two keys of score 0 and a sink of ln 2: half of the weight goes nowhere."""
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 2, 1, 2)
    v = torch.tensor([4.0, 8.0]).view(1, 2, 1, 1)
    out, lse = attention(q, k, v, softmax_scale=1.0, sink=torch.tensor([math.log(2.0)]))
    assert out.item() == pytest.approx(0.25 * 4 + 0.25 * 8)
    assert lse.item() == pytest.approx(math.log(4.0))


def test_softcap_by_hand():
    """A score of 3 capped at 2 is 2 tanh 1.5."""
    q, k, v = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0), torch.ones(1, 1, 1, 1)
    _, lse = attention(q, k, v, softmax_scale=1.0, softcap=2.0)
    assert lse.item() == pytest.approx(2 * math.tanh(1.5))


@dataclass(frozen=True)
class MaskCase:
    """Keys that each query sees are found by hand."""

    seqlen_q: int
    seqlen_k: int
    mask: Mask
    seen: list[list[int]]

    def __str__(self):
        bounds = {name: n for name, n in asdict(self.mask).items() if n != UNBOUNDED}
        texts = [f"{name}{n}" for name, n in bounds.items()]
        return "-".join([f"q{self.seqlen_q}", f"k{self.seqlen_k}", *texts])


BY_HAND = (
    MaskCase(2, 5, CAUSAL, [[0, 1, 2, 3], [0, 1, 2, 3, 4]]),
    MaskCase(5, 2, CAUSAL, [[], [], [], [0], [0, 1]]),
    MaskCase(3, 3, FULL, [[0, 1, 2]] * 3),
    MaskCase(3, 5, Mask(left=1, right=0), [[1, 2], [2, 3], [3, 4]]),
    MaskCase(5, 3, Mask(left=0, right=1), [[], [0], [0, 1], [1, 2], [2]]),
    MaskCase(4, 4, Mask(left=1), [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3], [2, 3]]),
    MaskCase(5, 5, Mask(chunk=2), [[0, 1], [0, 1], [2, 3], [2, 3], [4]]),
    MaskCase(3, 5, Mask(right=0, chunk=2), [[2], [2, 3], [4]]),
)


@pytest.mark.parametrize("case", BY_HAND, ids=str)
def test_masks_by_hand(case):
    assert seen_keys(case.seqlen_q, case.seqlen_k, case.mask) == case.seen


@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=["full", "causal"])
def test_equals_pytorch_in_fp64(mask):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 37, heads, 16, dtype=torch.float64) for heads in (4, 2, 2))
    out, _ = attention(q, k, v, softmax_scale=0.3, mask=mask)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        is_causal=mask == CAUSAL,
        scale=0.3,
        enable_gqa=True,
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_query_blocks_do_not_show(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 50, 1, 16) for _ in range(3))
    problem = {"softmax_scale": 0.2, "mask": CAUSAL}
    whole = attention(q, k, v, **problem)
    gradients = reference.gradients(q, k, v, q, **problem)
    monkeypatch.setattr("hopper_attention.reference.exact.SCORES", 7 * 50)
    torch.testing.assert_close(attention(q, k, v, **problem), whole)
    torch.testing.assert_close(reference.gradients(q, k, v, q, **problem), gradients)


def test_packed_and_used_sequences_equal_single_ones():
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, heads, 16) for n, heads in ((9, 2), (12, 1), (12, 1)))
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ((0, 4, 4, 9), (0, 5, 8, 12)))
    used_k = torch.tensor((3, 3, 4), dtype=torch.int32)
    out, lse = attention(
        q, k, v, softmax_scale=0.2, mask=CAUSAL, queries=Lengths(cu_q), keys=Lengths(cu_k, used_k)
    )
    assert lse.shape == (2, 9)
    for b in range(3):
        rows = slice(int(cu_q[b]), int(cu_q[b + 1]))
        keys = slice(int(cu_k[b]), int(cu_k[b] + used_k[b]))
        one = attention(q[None, rows], k[None, keys], v[None, keys], softmax_scale=0.2, mask=CAUSAL)
        torch.testing.assert_close((out[None, rows], lse[None, :, rows]), one)
