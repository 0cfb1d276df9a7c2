"""The plain statement of FP8 quantisation: errors, scales, layouts; rotation and centring."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_cases import padding

from hopper_attention.quantize import (
    LEAST,
    Recipe,
    block_rows,
    hadamard_matrix,
    quantize,
    rotated,
    signs,
    spread,
)

FORMATS = {torch.float8_e4m3fn: (448.0, 3, -6), torch.float8_e5m2: (57344.0, 2, -14)}
"""Greatest number, bits of the mantissa, least normal exponent."""
HEAD_DIMS = (8, 40, 64, 80, 96, 128, 192, 256)


@st.composite
def tensors(draw) -> torch.Tensor:
    """(batch, seqlen, heads, head_dim) with rows of very different sizes."""
    shape = [draw(st.integers(1, n)) for n in (3, 150, 4)]
    head_dim = 8 * draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    sizes = torch.randn((*shape, 1), generator=generator).mul(3).exp()
    return torch.randn((*shape, head_dim), generator=generator) * sizes


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(tensors(), st.sampled_from(Recipe), st.sampled_from(list(FORMATS)))
def test_error_is_half_a_step(x, recipe, dtype):
    largest, mantissa, least = FORMATS[dtype]
    values, descale = quantize(x, recipe, dtype=dtype)
    factor = spread(descale, x).double()
    scaled = x.double() / factor
    step = scaled.abs().clamp(min=2.0**least).log2().floor().exp2() / 2**mantissa
    assert ((values.double() - scaled).abs() <= step / 2 * (1 + 1e-6)).all()
    assert scaled.abs().max() <= largest * (1 + 1e-6)


@settings(max_examples=20, deadline=None)
@given(tensors(), st.sampled_from(Recipe))
def test_scales_are_the_largest_that_do_not_saturate(x, recipe):
    values, descale = quantize(x, recipe)
    full = (values.float().abs() == 448).any(dim=3)
    if recipe is Recipe.PER_TENSOR:
        reached = full.any().reshape(1)
    elif recipe is Recipe.PER_HEAD:
        reached = full.any(dim=1)
    else:
        blocks = full.split(recipe.rows, dim=1)
        reached = torch.stack([block.any(dim=1) for block in blocks], dim=2)
    assert reached.shape == descale.shape and reached.all()


@pytest.mark.parametrize(
    ("recipe", "heads_kv", "shape"),
    [
        (Recipe.PER_TENSOR, None, (1,)),
        (Recipe.PER_HEAD, None, (2, 6)),
        (Recipe.PER_HEAD, 3, (2, 3)),
        (Recipe.PER_HEAD, 1, (2, 1)),
        (Recipe.BLOCK64, None, (2, 6, 3)),
        (Recipe.BLOCK128, 3, (2, 6, 2)),
        ("block128", None, (2, 6, 2)),
    ],
)
def test_descale_shapes(recipe, heads_kv, shape):
    x = some(2, 130, 6, 64)
    values, descale = quantize(x, recipe, heads_kv=heads_kv)
    assert descale.shape == shape and descale.dtype == torch.float32 and descale.is_contiguous()
    assert values.shape == x.shape and values.is_contiguous()
    assert spread(descale, x).broadcast_to(x.shape).shape == x.shape


def test_heads_of_a_group_share_the_greatest():
    x = some(1, 10, 4, 16)
    descale = quantize(x, Recipe.PER_HEAD, heads_kv=2).descale
    tops = x.abs().amax(dim=(1, 3))
    expected = torch.stack([tops[:, :2].amax(dim=1), tops[:, 2:].amax(dim=1)], dim=1) / 448
    assert torch.equal(descale, expected)


@pytest.mark.parametrize("seqlen", [1, 64, 65, 128, 129, 300])
def test_blocks_tell_their_rows(seqlen):
    x = some(1, seqlen, 1, 8)
    for recipe in (Recipe.BLOCK64, Recipe.BLOCK128):
        blocks = quantize(x, recipe).descale.shape[2]
        assert -(-seqlen // block_rows(blocks, seqlen)) == blocks
    with pytest.raises(ValueError, match="7 blocks for 65 rows"):
        block_rows(7, 65)


@pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 100])
def test_transposed(seqlen):
    x = some(2, seqlen, 3, 24)
    values, descale = quantize(x, Recipe.BLOCK64, transposed=True)
    plain = quantize(x, Recipe.BLOCK64)
    room = -(-seqlen // 16) * 16
    assert values.stride() == (3 * 24 * room, 1, 24 * room, room)
    assert torch.equal(values.float(), plain.values.float())
    assert torch.equal(descale, plain.descale)
    assert padding(values).shape[3] == room - seqlen and not padding(values).any()


def test_zeros():
    values, descale = quantize(torch.zeros(1, 70, 1, 8), Recipe.BLOCK64)
    assert not values.float().any() and (descale == torch.tensor(LEAST)).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_all_that_shares_its_scale(value):
    x = some(1, 128, 2, 8)
    x[0, 3, 1, 2] = value
    values, descale = quantize(x, Recipe.BLOCK64)
    lost = (values.float() * spread(descale, x)).isnan()
    assert lost[0, :64, 1].all() and lost.sum() == 64 * 8


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_keeps_scores(head_dim):
    q, k = some(1, 9, 1, head_dim).double(), some(1, 11, 1, head_dim, seed=1).double()
    scores = q[0, :, 0] @ k[0, :, 0].T
    torch.testing.assert_close(rotated(q)[0, :, 0] @ rotated(k)[0, :, 0].T, scores)


@pytest.mark.parametrize("n", [1, 2, 8, 64, 256])
def test_hadamard_matrix(n):
    matrix = hadamard_matrix(n)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, n**-0.5))


def test_signs_are_always_the_same_and_of_both_kinds():
    assert torch.equal(signs(128), signs.__wrapped__(128))
    assert 40 < int((signs(128) > 0).sum()) < 88


def test_rotation_spreads_outliers():
    """One channel a hundred times the others."""
    x = some(1, 256, 1, 128)
    x[..., 17] *= 100
    plain, hadamard = (quantize(x, Recipe.BLOCK128, hadamard=h).descale for h in (False, True))
    assert hadamard.max() * 4 < plain.min()


def rotated_back(x: torch.Tensor) -> torch.Tensor:
    head_dim = x.shape[-1]
    n = head_dim & -head_dim
    parts = x.unflatten(-1, (-1, n)) @ hadamard_matrix(n).T
    return parts.flatten(-2) * signs(head_dim)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_can_be_taken_back(head_dim):
    x = some(1, 5, 2, head_dim).double()
    torch.testing.assert_close(rotated_back(rotated(x)), x)


def test_centring_keeps_softmax():
    q, k = some(2, 20, 3, 64), some(2, 50, 3, 64, seed=1) + 5 * some(2, 1, 3, 64, seed=2)

    def probabilities(keys: torch.Tensor) -> torch.Tensor:
        return (torch.einsum("bihd,bjhd->bhij", q, keys) / 8).softmax(dim=3)

    values, descale = quantize(k, Recipe.PER_HEAD, centered=True)
    restored = values.float() * spread(descale, k)
    centred = k - k.mean(dim=1, keepdim=True)
    torch.testing.assert_close(probabilities(centred), probabilities(k), atol=1e-5, rtol=1e-3)
    plain = quantize(k, Recipe.PER_HEAD)
    worse = plain.values.float() * spread(plain.descale, k)
    exact = probabilities(k)
    assert (probabilities(restored) - exact).norm() < 0.6 * (probabilities(worse) - exact).norm()


def test_refusals():
    x = some(1, 4, 6, 8)
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor, got list"):
        quantize([1.0], Recipe.PER_HEAD)
    for arguments, message in (
        ((x[0], Recipe.PER_HEAD), r"x has shape \(4, 6, 8\); expected \(batch, seqlen"),
        ((x.int(), Recipe.PER_HEAD), "x has dtype torch.int32; expected a float"),
        ((x.to_sparse(), Recipe.PER_HEAD), "x: expected a plain tensor"),
        ((x, "block32"), "recipe 'block32' is none of per_tensor, per_head, block64, block128"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(*arguments)
    for heads_kv in (0, 4, -1):
        with pytest.raises(ValueError, match=f"6 heads, not a multiple of heads_kv = {heads_kv}"):
            quantize(x, Recipe.PER_HEAD, heads_kv=heads_kv)
    with pytest.raises(NotImplementedError, match=r"dtype torch.int8: supported: torch.float8_e4"):
        quantize(x, Recipe.PER_HEAD, dtype=torch.int8)
    with pytest.raises(NotImplementedError, match="x is on meta; supported: a Hopper or Ampere GPU"):
        quantize(x.to("meta"), Recipe.PER_HEAD)


def test_table_of_signs():
    from hopper_attention.quantize import _scaled_signs

    for head_dim in HEAD_DIMS:
        expected = signs(head_dim) / math.sqrt(head_dim & -head_dim)
        assert torch.equal(_scaled_signs(torch.device("cpu"), head_dim), expected.float())
