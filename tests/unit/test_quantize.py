"""The plain statement of FP8 quantisation: errors, scales, layouts; rotation and centring."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quantize import exists, lengths_of, poisoned
from torch._subclasses.fake_tensor import FakeTensorMode

from hopper_attention.launch import quantize as kernels
from hopper_attention.problem.values import DENSE, Lengths
from hopper_attention.quantize import (
    LEAST,
    Recipe,
    Rotary,
    block_rows,
    columns_of,
    narrowed,
    quantize,
    rotated,
    signs,
    spread,
)
from hopper_attention.reference.quantize import embedded, hadamard_matrix

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


@pytest.mark.parametrize("recipe", Recipe)
@pytest.mark.parametrize("packed", [False, True])
def test_sequences_are_quantised_as_if_alone(recipe, packed):
    """Blocks count from each one's start; means are of its own rows; those of none do not count."""
    sizes, used = [70, 0, 129, 1], [70, 0, 65, 1]
    lengths = lengths_of(sizes if packed else None, used)
    x = some(230, 4, 16) if packed else some(4, 130, 4, 16)
    x = poisoned(x, lengths)
    longest = 100
    arguments = {"heads_kv": 2, "centered": True, "octaves": True}
    values, descale = quantize(x, recipe, lengths=lengths, max_seqlen=longest, **arguments)
    whole = spread(descale, x, lengths, longest)
    assert values.shape == x.shape and descale.isfinite().all()
    assert (whole.expand(*x.shape[:-1], 1).squeeze(-1)[~exists(x, lengths)] == 1).all() or (
        recipe is Recipe.PER_TENSOR
    )
    if recipe.rows:
        assert descale.shape == (4, 4, -(-longest // recipe.rows))
    offset, tops = 0, []
    for i, (size, rows) in enumerate(zip(sizes, used)):
        here = slice(offset, offset + rows)
        own = x[None, here] if packed else x[i : i + 1, :rows]
        alone = quantize(own, recipe, **arguments)
        tops.append(float(alone.descale.max()) if rows else 0)
        factor = whole if whole.numel() == 1 else (whole[here] if packed else whole[i, :rows])
        restored = (values[here] if packed else values[i, :rows]).float() * factor
        if recipe is not Recipe.PER_TENSOR:
            blocks = None if recipe.rows is None else alone.descale.shape[2]
            assert torch.equal(descale[i : i + 1, ..., :blocks], alone.descale)
            assert torch.equal(restored[None], alone.values.float() * spread(alone.descale, own))
        offset += size
    if recipe is Recipe.PER_TENSOR:
        assert float(descale) == max(tops)


def test_octaves():
    magnitudes = torch.tensor([1.0, 5.0, 0.3, 40.0, 0.01]).repeat_interleave(64)[:300]
    x = some(1, 300, 2, 16) * magnitudes.view(1, 300, 1, 1)
    descale = quantize(x, Recipe.BLOCK64, octaves=True).descale
    plain = quantize(x, Recipe.BLOCK64).descale
    largest = plain.amax(dim=2, keepdim=True)
    steps = (largest / descale).log2()
    assert torch.equal(steps, steps.round()) and (steps > 0).any()
    assert ((descale >= plain) & (descale < 2 * plain)).all()


def test_arranged():
    v = some(2, 100, 3, 32)
    arguments = {"recipe": Recipe.BLOCK64, "octaves": True}
    values, descale = quantize(v, arranged=True, **arguments)
    plain = quantize(v, **arguments)
    assert torch.equal(descale, plain.descale)
    assert torch.equal(values.view(torch.uint8), columns_of(plain.values).view(torch.uint8))
    with pytest.raises(NotImplementedError, match=r"head_dim 24 of x .*nearest: 32"):
        quantize(v[..., :24], Recipe.BLOCK64, arranged=True)


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
    assert torch.equal(signs(128), signs(128))
    assert 40 < int((signs(128) > 0).sum()) < 88


@pytest.mark.parametrize("first", ["inference", "meta", "fake"])
def test_the_first_rotation_says_nothing_of_later_ones(first, monkeypatch):
    """Constants do not remain what the first call's modes made of them."""
    monkeypatch.setattr(kernels, "_scaled", {})
    expected = signs(64)
    contexts = {
        "inference": torch.inference_mode,
        "meta": lambda: torch.device("meta"),
        "fake": FakeTensorMode,
    }
    with contexts[first](), contextlib.suppress(Exception):  # a fake tensor has no data
        rotated(torch.zeros(1, 64, 1, 64, device="cpu"))
    with contexts[first](), contextlib.suppress(Exception):
        kernels._scaled_signs(torch.device("cpu"), 64)
    x = some(1, 64, 1, 64).requires_grad_()
    rotated(x).sum().backward()
    assert type(x.grad) is torch.Tensor
    table = kernels._scaled_signs(torch.device("cpu"), 64)
    assert type(table) is torch.Tensor
    assert torch.equal(table, (expected / 8).float())


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
    with pytest.raises(
        NotImplementedError, match="x is on meta; supported: a Hopper or Ampere GPU"
    ):
        quantize(x.to("meta"), Recipe.PER_HEAD)


def test_table_of_signs():
    for head_dim in HEAD_DIMS:
        expected = signs(head_dim) / math.sqrt(head_dim & -head_dim)
        assert torch.equal(kernels._scaled_signs(torch.device("cpu"), head_dim), expected.float())


NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2)
"""All of e5m2."""


@pytest.mark.parametrize("greatest", range(-16, 16))
def test_narrowed_is_exact_or_within_its_bound(greatest):
    """All numbers below 2^(greatest + 1); and twice, so that they are not alone in a block."""
    numbers = NUMBERS[NUMBERS.float().abs() < 2.0 ** (greatest + 1)]  # false for NaN
    x = numbers.repeat(-(-256 // numbers.numel()))[:256].view(1, 16, 1, 16)
    values, descale = narrowed(x, torch.tensor([3.0]))
    assert descale.shape == (1, 1, 1)
    error = (values.double() * float(descale) / 3 - x.double()).abs()
    assert error.max() <= 2.0 ** (greatest - 18)
    assert not error[x.double().abs() >= 2.0 ** (greatest - 15)].any()
    assert error.any() == (greatest > 1)
    assert values.float().abs().max() <= 448


@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (3, 4), (3, 4, 3), (3, 4, 2)])
@pytest.mark.parametrize("packed", [False, True])
def test_narrowed_keeps_what_was_meant(shape, packed):
    x = some(390, 4, 16) if packed else some(3, 130, 4, 16)
    x = (x * 2).to(torch.float8_e5m2)
    lengths = lengths_of([130, 130, 130], None) if packed else DENSE
    of_x = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.1
    values, descale = narrowed(x, of_x, lengths=lengths, max_seqlen=130)
    assert descale.shape == (3, 4, 3)
    whole = x.view(3, 130, 4, 16)
    meant = whole.float() * spread(of_x, whole)
    assert torch.equal(values.float() * spread(descale, x, lengths, 130), meant.view(x.shape))
    if len(shape) < 3:
        steps = (descale / descale.amax(dim=2, keepdim=True)).log2()
        assert torch.equal(steps, steps.round())


def angles(positions: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequency = 100.0 ** -(torch.arange(dim // 2) / (dim // 2))
    angle = torch.arange(positions).view(-1, 1) * frequency
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "offset"), [(16, 0), (32, 5), (48, 0)])
def test_rotary(interleaved, dim, offset):
    """Pairs are complex numbers that are multiplied; scores depend on distances only."""
    q, k = some(1, 20, 2, 48), some(1, 20, 2, 48, seed=1)
    cos, sin = angles(40, dim)
    q_turned, k_turned = (embedded(x, Rotary(cos, sin, interleaved, offset)) for x in (q, k))
    a, b = (
        (slice(0, dim, 2), slice(1, dim, 2))
        if interleaved
        else (slice(dim // 2), slice(dim // 2, dim))
    )
    turned = (
        torch.complex(q[..., a], q[..., b]) * torch.complex(cos, sin)[offset : offset + 20, None]
    )
    torch.testing.assert_close(q_turned[..., a], turned.real)
    torch.testing.assert_close(q_turned[..., b], turned.imag)
    assert torch.equal(q_turned[..., dim:], q[..., dim:])
    later = embedded(q, Rotary(cos, sin, interleaved, offset + 7))
    later_k = embedded(k, Rotary(cos, sin, interleaved, offset + 7))
    scores = torch.einsum("bihd,bjhd->bhij", q_turned, k_turned)
    torch.testing.assert_close(
        torch.einsum("bihd,bjhd->bhij", later, later_k), scores, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("packed", [False, True])
def test_rotary_is_what_is_quantised(packed):
    """Each sequence's positions start at its offset; before the mean is taken off."""
    cos, sin = angles(80, 16)
    x, offsets = some(3, 30, 2, 32), torch.tensor([0, 50, 3], dtype=torch.int32)
    lengths = lengths_of([30, 30, 30], None) if packed else DENSE
    rows = x.flatten(0, 1) if packed else x
    arguments = {"centered": True, "lengths": lengths, "max_seqlen": 30}
    got = quantize(rows, Recipe.BLOCK64, rotary=Rotary(cos, sin, False, offsets), **arguments)
    for i, offset in enumerate(offsets.tolist()):
        alone = embedded(x[i : i + 1], Rotary(cos, sin, False, offset))
        expected = quantize(alone, Recipe.BLOCK64, centered=True)
        assert torch.equal(got.values.view(x.shape)[i].float(), expected.values[0].float())
        assert torch.equal(got.descale[i], expected.descale[0])


def test_refusals_of_rotary():
    x, (cos, sin) = some(2, 20, 3, 32), angles(20, 16)
    index = torch.tensor([0, 1], dtype=torch.int32)
    for rotary, error, message in (
        (cos, TypeError, r"rotary: expected \(cos, sin\) or a Rotary, got Tensor"),
        ((cos, 1.0), TypeError, "rotary: expected a torch.Tensor as sin, got float"),
        ((cos.double(), sin), ValueError, "rotary: cos has dtype torch.float64"),
        ((cos, sin[:-1]), ValueError, r"rotary: sin has shape \(19, 8\)"),
        ((cos, sin.to("meta")), ValueError, "rotary: sin is on meta, x is on cpu"),
        (angles(20, 24), NotImplementedError, "rotary: rotary_dim 24; .* up to head_dim 32"),
        (angles(20, 48), NotImplementedError, "rotary: rotary_dim 48; .* up to head_dim 32"),
        (angles(19, 16), ValueError, "rotary: cos and sin have 19 positions; needed: 20"),
        ((cos, sin, False, 1), ValueError, "rotary: cos and sin have 20 positions; needed: 21"),
        ((cos, sin, False, index), ValueError, "rotary: cos and sin have 20 positions; needed: 21"),
        ((cos, sin, False, -index), ValueError, "rotary: offsets must not be negative"),
        ((cos, sin, False, -1), ValueError, "rotary: offsets must be from 0, got -1"),
        ((cos, sin, False, index[:1]), ValueError, r"rotary: offsets has shape \(1,\)"),
        ((cos, sin, 1), TypeError, "rotary: interleaved: expected True or False"),
    ):
        with pytest.raises(error, match=message):
            quantize(x, Recipe.BLOCK64, rotary=rotary)


def test_refusals_of_narrowed():
    x, one = some(1, 70, 4, 16).to(torch.float8_e5m2), torch.ones(1)
    for bad, descale, error, message in (
        (x.to(torch.float8_e4m3fn), one, NotImplementedError, "x has dtype torch.float8_e4m3fn"),
        (x[..., :8], one, NotImplementedError, r"head_dim 8 of x .*nearest: 16"),
        (x, 1.0, TypeError, "descale: expected a torch.Tensor, got float"),
        (x, one.double(), ValueError, "descale has dtype torch.float64"),
        (x, one.to("meta"), ValueError, "descale is on meta, x is on cpu"),
        (
            x,
            torch.ones(1, 3),
            ValueError,
            r"descale has shape \(1, 3\); expected \(1,\), .* of 4\)",
        ),
        (x, torch.ones(1, 4, 3), ValueError, r"descale has shape .* with 2 or 1 blocks"),
    ):
        with pytest.raises(error, match=message):
            narrowed(bad, descale)


def test_columns_have_keys_interleaved():
    """Every 16 keys are stored as pairs 0, 4, 1, 5, 2, 6, 3, 7; zeros follow the last key."""
    v = some(2, 37, 3, 16).to(torch.float8_e4m3fn)
    columns = columns_of(v)
    assert columns.shape == (2, 3, 16, 48)
    for place in range(48):
        key = place // 16 * 16 + (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)[place % 16]
        expected = v[:, key].float() if key < 37 else torch.zeros(2, 3, 16)
        assert torch.equal(columns[..., place].float(), expected)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=6))
def test_columns_of_packed_sequences_do_not_overlap(sizes):
    """Each is what it is alone, where its number and its first row say, zeros up to 128."""
    total = sum(sizes)
    v = (torch.arange(total) % 100 + 1).view(-1, 1, 1).expand(total, 1, 16).contiguous()
    v = v.to(torch.uint8).view(torch.float8_e4m3fn)
    columns = columns_of(v, lengths_of(sizes, None)).view(torch.uint8)
    assert columns.shape == (1, 1, 16, (total // 128 + len(sizes)) * 128)
    end, offset = 0, 0
    for i, size in enumerate(sizes):
        start = (offset // 128 + i) * 128
        assert start >= end
        end = start + -(-size // 128) * 128
        alone = columns_of(v[None, offset : offset + size]).view(torch.uint8)
        assert torch.equal(columns[..., start : start + alone.shape[3]], alone)
        assert not columns[..., start + size + -size % 16 : end].any()
        offset += size
    assert end <= columns.shape[3]


def test_refusals_of_columns():
    v = some(2, 8, 3, 16).to(torch.float8_e4m3fn)
    packed = v.flatten(0, 1)
    for lengths, arguments, error, message in (
        (None, {"v": v.half()}, NotImplementedError, "v has dtype torch.float16; supported"),
        (None, {"v": v[..., :8]}, NotImplementedError, r"head_dim 8 of v .*nearest: 16"),
        (None, {"v": packed}, ValueError, r"v has shape \(16, 3, 16\); expected \(batch"),
        (None, {"max_seqlen": 7}, ValueError, "max_seqlen 7: without lengths all 8 rows"),
        (([8, 8], None), {}, ValueError, r"v has shape \(2, 8, 3, 16\); expected \(total"),
        ((None, [8, 9]), {}, ValueError, "seqused must be between 0 and"),
        ((None, [8]), {}, ValueError, r"seqused has shape \(1,\); expected a vector of 2"),
        (([8, 9], None), {"v": packed}, ValueError, "cu_seqlens must ascend from 0 to at most 16"),
        (([8, 8], None), {"v": packed, "max_seqlen": 7}, ValueError, "max_seqlen 7 is less than"),
        (
            ([8, 8], None),
            {"v": packed, "max_seqlen": 8.0},
            TypeError,
            "max_seqlen: expected an int",
        ),
    ):
        given = {"v": v, **arguments} | ({"lengths": lengths_of(*lengths)} if lengths else {})
        with pytest.raises(error, match=message):
            columns_of(**given)
    for lengths, error, message in (
        ([0, 8], TypeError, "lengths: expected hopper_attention.quantize.Lengths, got list"),
        (Lengths(cu_seqlens=[0, 8]), TypeError, "cu_seqlens: expected a torch.Tensor, got list"),
        (Lengths(cu_seqlens=torch.tensor([0, 8])), ValueError, "cu_seqlens has dtype torch.int64"),
    ):
        with pytest.raises(error, match=message):
            columns_of(packed, lengths)
