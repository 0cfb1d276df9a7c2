"""xFormers' calls, with stand-ins for its biases: classes of the same names and attributes.

What is right is a softmax in FP64 over the pairs that each bias's definition lets through.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch

from hopper_attention import simulator
from hopper_attention.integrations import xformers
from hopper_attention.integrations.xformers import (
    memory_efficient_attention,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
)

# ---------------------------------------------------------------------------- stand-ins for biases


class AttentionBias:
    def materialize(self):
        raise NotImplementedError


class LowerTriangularMask(torch.Tensor, AttentionBias):
    """A tensor without values, on which no operator works, as xFormers' own."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, [])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return NotImplemented

    def __repr__(self):
        return type(self).__name__


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    def materialize(self):
        raise NotImplementedError


class LowerTriangularFromBottomRightMask(AttentionBias):
    pass


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    _window_size: int


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    window_left: int
    window_right: int


@dataclass
class SeqLenInfo:
    seqstart: torch.Tensor
    max_seqlen: int
    seqstart_py: list[int]


@dataclass
class PaddedSeqLenInfo(SeqLenInfo):
    seqlen: torch.Tensor
    seqlen_py: list[int]


@dataclass
class BlockDiagonalMask(AttentionBias):
    q_seqinfo: Any
    k_seqinfo: Any


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    pass


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    pass


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    _window_size: int


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    _window_size: int


@dataclass
class BlockDiagonalPaddedKeysMask(AttentionBias):
    q_seqinfo: Any
    k_seqinfo: Any


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    causal_diagonal: Any = None


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    window_left: int
    window_right: int


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    _window_size: int


@dataclass
class BlockDiagonalGappyKeysMask(AttentionBias):
    q_seqinfo: Any
    k_seqinfo: Any


@dataclass
class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    pass


@dataclass
class PagedBlockDiagonalPaddedKeysMask(AttentionBias):
    q_seqinfo: Any
    k_seqinfo: Any


def seqinfo(lengths):
    places = [0, *accumulate(lengths)]
    return SeqLenInfo(torch.tensor(places, dtype=torch.int32), max(lengths), places)


def padded(places, lengths):
    return PaddedSeqLenInfo(
        torch.tensor(places, dtype=torch.int32), max(lengths), list(places),
        torch.tensor(lengths, dtype=torch.int32), list(lengths),
    )  # fmt: skip


# --------------------------------------------------------------------------- what each lets through


def everything(q, k, queries, keys):
    return torch.ones_like(q + k, dtype=torch.bool)


def top_left(q, k, queries, keys):
    return k <= q


def bottom_right(q, k, queries, keys):
    return k - keys <= q - queries


def local(left, right):
    def seen(q, k, queries, keys):
        distance = (k - keys) - (q - queries)
        return (-left <= distance) & (distance <= right)

    return seen


def top_left_local(window):
    return lambda q, k, queries, keys: (k <= q) & (k > q - window)


def pairs(seen, queries, keys):
    return seen(torch.arange(queries)[:, None], torch.arange(keys)[None], queries, keys)


def blocks(seen, lengths_q, starts_k, lengths_k, total_k):
    result = torch.zeros(sum(lengths_q), total_k, dtype=torch.bool)
    for start, q, start_k, k in zip(accumulate((0, *lengths_q)), lengths_q, starts_k, lengths_k):
        result[start : start + q, start_k : start_k + k] = pairs(seen, q, k)
    return result


def exact(q, k, v, seen, scale=None):
    """(batch, M, heads, K) in FP64; heads may be grouped.  Rows without keys: 0 and -inf."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT) * (scale or q.shape[-1] ** -0.5)
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return (weights @ v).transpose(1, 2), scores.logsumexp(-1)


def normal(*shape, dtype=torch.bfloat16):
    torch.manual_seed(sum(shape))
    return torch.randn(*shape).to(dtype)


def assert_right(result, q, k, v, seen):
    """Twice the error of the same steps in q's dtype, and a rounding."""
    out, lse = result
    expected, expected_lse = exact(q, k, v, seen)
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    peer = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen)
    peer_error = (peer.transpose(1, 2).nan_to_num(0.0).double() - expected).abs().max()
    assert (out.double() - expected).abs().max() <= 2 * peer_error + 1e-3
    assert lse.shape == expected_lse.shape and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-3, atol=1e-3)


DENSE = {
    "none": (None, everything),
    "top_left": (LowerTriangularMask(), top_left),
    "bottom_right": (LowerTriangularFromBottomRightMask(), bottom_right),
    "causal_local": (LowerTriangularFromBottomRightLocalAttentionMask(3), local(2, 0)),
    "local": (LocalAttentionFromBottomRightMask(2, 4), local(2, 4)),
}


@pytest.mark.parametrize("lengths", [(9, 9), (5, 12), (12, 5), (1, 7)], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_dense(name, lengths):
    bias, seen = DENSE[name]
    q, k, v = (
        normal(2, lengths[0], 4, 16),
        normal(2, lengths[1], 4, 16),
        normal(2, lengths[1], 4, 24),
    )
    result = memory_efficient_attention_forward_requires_grad(q, k, v, bias)
    assert_right(result, q, k, v, pairs(seen, *lengths))
    for function in (memory_efficient_attention, memory_efficient_attention_forward):
        assert torch.equal(function(q, k, v, bias), result[0])


EQUAL, MORE_KEYS = (4, 1, 7), (6, 1, 9)
BLOCKS = {
    "full": (BlockDiagonalMask, (), everything),
    "top_left": (BlockDiagonalCausalMask, (), top_left),
    "bottom_right": (BlockDiagonalCausalFromBottomRightMask, (), bottom_right),
    "top_left_local": (BlockDiagonalCausalLocalAttentionMask, (3,), top_left_local(3)),
    "causal_local": (BlockDiagonalCausalLocalAttentionFromBottomRightMask, (3,), local(2, 0)),
}


@pytest.mark.parametrize("keys", [EQUAL, MORE_KEYS], ids=["equal", "more keys"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block_masks_show_the_right_keys(name, keys):
    kind, more, seen = BLOCKS[name]
    q, k, v = normal(1, 12, 4, 16), normal(1, sum(keys), 4, 16), normal(1, sum(keys), 4, 16)
    bias = kind(seqinfo(EQUAL), seqinfo(keys), *more)
    result = memory_efficient_attention_forward_requires_grad(q, k, v, bias)
    mask = blocks(seen, EQUAL, accumulate((0, *keys)), keys, sum(keys))
    assert_right(result, q, k, v, mask)


ROOM = {
    "full": (BlockDiagonalPaddedKeysMask, (), everything),
    "causal": (BlockDiagonalCausalWithOffsetPaddedKeysMask, (), bottom_right),
    "local": (BlockDiagonalLocalAttentionPaddedKeysMask, (2, 1), local(2, 1)),
    "causal_local": (BlockDiagonalCausalLocalAttentionPaddedKeysMask, (3,), local(2, 0)),
    "gaps": (BlockDiagonalGappyKeysMask, (), everything),
    "causal_gaps": (BlockDiagonalCausalWithOffsetGappyKeysMask, (), bottom_right),
}


@pytest.mark.parametrize("name", ROOM)
def test_keys_with_room(name):
    """The room behind a block's keys holds NaN."""
    kind, more, seen = ROOM[name]
    places, lengths = (
        ([0, 8, 16, 24], (6, 1, 8)) if "gaps" not in name else ([2, 9, 12, 24], (6, 3, 9))
    )
    q, k, v = normal(1, 12, 4, 16), normal(1, 24, 4, 16), normal(1, 24, 4, 16)
    mask = blocks(seen, EQUAL, places, lengths, 24)
    used = blocks(everything, EQUAL, places, lengths, 24).any(0)
    k_dirty, v_dirty = (x.masked_fill(~used[None, :, None, None], torch.nan) for x in (k, v))
    bias = kind(seqinfo(EQUAL), padded(places, lengths), *more)
    result = memory_efficient_attention_forward_requires_grad(q, k_dirty, v_dirty, bias)
    assert_right(result, q, k, v, mask)


@pytest.mark.parametrize("name", ["top_left", "top_left_local"])
def test_top_left_blocks_with_more_queries_than_keys_are_refused(name):
    kind, more, _ = BLOCKS[name]
    q, k = normal(1, 16, 4, 16), normal(1, 12, 4, 16)
    with pytest.raises(NotImplementedError, match="FromBottomRight"):
        memory_efficient_attention(q, k, k, kind(seqinfo(MORE_KEYS), seqinfo(EQUAL), *more))


@pytest.mark.parametrize("starts", [[0, 4, 2, 12], [0, 3, 8, 12]], ids=["descend", "overlap"])
def test_gaps_that_are_none_are_refused(starts):
    q = normal(1, 12, 4, 16)
    bias = BlockDiagonalGappyKeysMask(seqinfo(EQUAL), padded(starts, (4, 1, 4)))
    with pytest.raises(NotImplementedError, match="overlap or descend"):
        memory_efficient_attention(q, q, q, bias)


@pytest.mark.parametrize("bias", [None, LowerTriangularMask()])
def test_three_dimensions(bias):
    q, k, v = normal(2, 5, 16), normal(2, 5, 16), normal(2, 5, 24)
    out, lse = memory_efficient_attention_forward_requires_grad(q, k, v, bias)
    one = (x.unsqueeze(2) for x in (q, k, v))
    expected, expected_lse = memory_efficient_attention_forward_requires_grad(*one, bias)
    assert torch.equal(out, expected[:, :, 0]) and torch.equal(lse, expected_lse[:, 0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("expanded", [False, True])
def test_five_dimensions(expanded, packed):
    """(batch, M, groups, heads, K): group g's keys are read by its heads."""
    batch = 1 if packed else 2
    q = normal(batch, 12, 2, 3, 16)
    k, v = (normal(batch, 12, 2, 1 if expanded else 3, 16).expand(-1, -1, -1, 3, -1) for _ in "kv")
    bias = BlockDiagonalMask(seqinfo(EQUAL), seqinfo(EQUAL)) if packed else None
    mask = blocks(everything, EQUAL, (0, 4, 5), EQUAL, 12) if packed else pairs(everything, 12, 12)
    out, lse = memory_efficient_attention_forward_requires_grad(q, k, v, bias)
    assert out.shape == q.shape and lse.shape == (batch, 2, 3, 12)
    for group in range(2):
        parts = (x[:, :, group].contiguous() for x in (q, k, v))
        assert_right((out[:, :, group], lse[:, group]), *parts, mask)


def test_grouped_keys_are_not_copied(monkeypatch):
    seen = []
    original = xformers.functional.flash_attn_func

    def spy(q, k, v, **options):
        seen.extend((k, v))
        return original(q, k, v, **options)

    monkeypatch.setattr(xformers.functional, "flash_attn_func", spy)
    k, v = (normal(2, 5, 2, 1, 16) for _ in "kv")
    memory_efficient_attention(
        normal(2, 5, 2, 3, 16), *(x.expand(-1, -1, -1, 3, -1) for x in (k, v))
    )
    assert [x.data_ptr() for x in seen] == [k.data_ptr(), v.data_ptr()]
    assert all(x.shape == (2, 5, 2, 16) for x in seen)


@pytest.mark.parametrize(
    "bias",
    [LowerTriangularMask(), BlockDiagonalCausalMask(seqinfo(EQUAL), seqinfo(MORE_KEYS))],
    ids=["dense", "blocks"],
)
def test_gradients(bias):
    keys = 12 if isinstance(bias, LowerTriangularMask) else sum(MORE_KEYS)
    mask = pairs(top_left, 12, 12)
    if keys != 12:
        mask = blocks(top_left, EQUAL, accumulate((0, *MORE_KEYS)), MORE_KEYS, keys)
    tensors = [normal(1, rows, 4, 16) for rows in (12, keys, keys)]
    dout = normal(1, 12, 4, 16)

    def gradients(attend, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
        attend(*leaves).backward(dout.to(dtype))
        return [x.grad.double() for x in leaves]

    def sdpa(*qkv):
        q, k, v = (x.transpose(1, 2) for x in qkv)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attended.transpose(1, 2)

    right = gradients(lambda *qkv: exact(*qkv, mask)[0], torch.float64)
    peer = gradients(sdpa, torch.bfloat16)
    ours = gradients(lambda *qkv: memory_efficient_attention(*qkv, bias), torch.bfloat16)
    for result, other, expected in zip(ours, peer, right):
        assert (result - expected).norm() <= 2 * (other - expected).norm()


def test_scale_and_dtype():
    q, k, v = (normal(1, 6, 2, 16) for _ in "qkv")
    out = memory_efficient_attention(q, k, v, scale=0.7, output_dtype=torch.float32)
    expected, _ = exact(q, k, v, pairs(everything, 6, 6), scale=0.7)
    torch.testing.assert_close(out.double(), expected, rtol=0.01, atol=0.01)
    assert out.dtype == torch.float32


class Derived(BlockDiagonalMask):
    """Adds nothing that changes the mask."""

    extra = 3


class DerivedWithAnotherMask(BlockDiagonalMask):
    def _create_block_mask(self):
        raise NotImplementedError


@dataclass
class DerivedWithAnotherField(BlockDiagonalMask):
    sliding: int = 3


def test_a_derived_bias_with_the_same_mask():
    q = normal(1, 12, 4, 16)
    results = [
        memory_efficient_attention(q, q, q, kind(seqinfo(EQUAL), seqinfo(EQUAL)))
        for kind in (Derived, BlockDiagonalMask)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "bias",
    [
        torch.zeros(1, 4, 12, 12),
        LowerTriangularMaskWithTensorBias(),
        PagedBlockDiagonalPaddedKeysMask(seqinfo(EQUAL), padded([0, 4, 8, 12], EQUAL[:3])),
        DerivedWithAnotherMask(seqinfo(EQUAL), seqinfo(EQUAL)),
        DerivedWithAnotherField(seqinfo(EQUAL), seqinfo(EQUAL)),
        object(),
    ],
    ids=lambda b: type(b).__name__,
)
def test_other_biases_are_refused(bias):
    q = normal(1, 12, 4, 16)
    with pytest.raises(NotImplementedError, match=r"attn_bias: .*LowerTriangularMask"):
        memory_efficient_attention(q, q, q, bias)


def test_other_arguments_are_refused():
    q = normal(1, 12, 4, 16)
    with pytest.raises(NotImplementedError, match=r"p=0\.1"):
        memory_efficient_attention(q, q, q, p=0.1)
    with pytest.raises(NotImplementedError, match="op"):
        memory_efficient_attention(q, q, q, op=(object, object))
    with pytest.raises(ValueError, match="shapes"):
        memory_efficient_attention(q, q[0], q[0])
    bias = BlockDiagonalMask(seqinfo(MORE_KEYS), seqinfo(EQUAL))
    with pytest.raises(ValueError, match=r"query has \(batch, M\)"):
        memory_efficient_attention(q, q, q, bias)
    five = normal(1, 12, 2, 2, 16)
    with pytest.raises(ValueError, match="groups"):
        memory_efficient_attention(five, five[:, :, :1], five[:, :, :1])


@pytest.mark.simulator
def test_on_the_kernels():
    """Top left with more queries than keys: the window that stands for it."""
    q, k, v = normal(1, 12, 4, 64), normal(1, 5, 4, 64), normal(1, 5, 4, 64)
    with simulator.enabled(seed=1):
        result = memory_efficient_attention_forward_requires_grad(q, k, v, LowerTriangularMask())
    assert_right(result, q, k, v, pairs(top_left, 12, 5))
