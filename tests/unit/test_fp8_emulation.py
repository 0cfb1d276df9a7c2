"""The emulation of FP8 attention: exact where it is told to be, else as slow scalar models say."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hopper_attention import reference
from hopper_attention.problem.values import CAUSAL, FULL, Mask
from hopper_attention.quantize import Quantized, Recipe, quantize, stated
from hopper_attention.reference.fp8 import (
    CODES,
    EXACT,
    HOPPER,
    PLAIN,
    Arithmetic,
    Cut,
    attention,
    coded,
    cut,
    dequantized,
    exactly,
    gemm,
)
from hopper_attention.simulator.hardware import tensor_core

NO_ROUNDING = replace(EXACT, p_dtype=None)
MASKS = {"full": FULL, "causal": CAUSAL, "window": Mask(left=70, right=10), "chunk": Mask(chunk=96)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On small tiles more are slower wherever something else computes as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(seqlen_q, seqlen_k, heads=2, heads_kv=1, head_dim=64, batch=1):
    return (
        random(batch, seqlen_q, heads, head_dim, seed=1),
        random(batch, seqlen_k, heads_kv, head_dim, seed=2),
        random(batch, seqlen_k, heads_kv, head_dim, seed=3),
    )


def quantized(q, k, v, recipe, **rotation):
    return (
        quantize(q, recipe, heads_kv=k.shape[2], **rotation),
        quantize(k, recipe, **rotation),
        quantize(v, recipe),
    )


def exact(q, k, v, scale, mask=FULL):
    return reference.attention(q, k, v, softmax_scale=scale, mask=mask, compute_dtype=torch.float64)


def assert_close(ours, theirs, tolerance=2e-6):
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------- exact arithmetic


@settings(max_examples=25, deadline=None)
@given(
    seqlens=st.tuples(st.integers(1, 300), st.integers(0, 300)),
    groups=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    mask=st.sampled_from(sorted(MASKS)),
    two_level=st.booleans(),
)
def test_without_rounding_it_is_attention(seqlens, groups, mask, two_level):
    q, k, v = qkv(*seqlens, *groups, head_dim=40, batch=2)
    arithmetic = replace(NO_ROUNDING, two_level=two_level)
    out, lse = attention(
        exactly(q), exactly(k), exactly(v), softmax_scale=0.3, mask=MASKS[mask],
        arithmetic=arithmetic,
    )  # fmt: skip
    expected = exact(q, k, v, 0.3, MASKS[mask])
    assert_close(out, expected[0])
    assert_close(lse, expected[1])


@pytest.mark.parametrize("two_level", [True, False])
@pytest.mark.parametrize("recipe", Recipe)
def test_descales_meet_the_right_rows(recipe, two_level):
    q, k, v = qkv(200, 330, heads=4, heads_kv=2, batch=2)
    for x in (q, k, v):  # scales that differ by batch, head and block, and matter
        x *= torch.linspace(0.05, 0.8, x.shape[1])[:, None, None]
        x[1] *= 2
        x[:, :, -1] *= 3
    operands = quantized(q, k, v, recipe, hadamard=True)
    arithmetic = replace(NO_ROUNDING, two_level=two_level)
    out, lse = attention(*operands, softmax_scale=0.1, mask=CAUSAL, arithmetic=arithmetic)
    expected = exact(*(dequantized(x) for x in operands), 0.1, CAUSAL)
    assert_close(out, expected[0], 1e-5)
    assert_close(lse, expected[1], 1e-5)


def test_queries_without_keys():
    q, k, v = qkv(8, 5)
    for arithmetic in (HOPPER, PLAIN, EXACT):
        out, lse = attention(
            *quantized(q, k, v, Recipe.BLOCK64), softmax_scale=1.0, mask=CAUSAL,
            arithmetic=arithmetic,
        )  # fmt: skip
        assert (out[:, :3] == 0).all() and (lse[..., :3] == -torch.inf).all()
        assert out[:, 3:].isfinite().all() and lse[..., 3:].isfinite().all()


def test_blocks_of_queries_do_not_matter(monkeypatch):
    operands = quantized(*qkv(100, 200), Recipe.BLOCK128)
    whole = attention(*operands, softmax_scale=0.1, mask=CAUSAL)
    monkeypatch.setattr("hopper_attention.reference.fp8.ELEMENTS", 2 * 128 * 16)
    assert_close(attention(*operands, softmax_scale=0.1, mask=CAUSAL)[0], whole[0], 0)


# ---------------------------------------------------------------------------------- the accumulator


@settings(max_examples=200, deadline=None)
@given(x=st.floats(width=32, allow_nan=False, allow_infinity=False), bits=st.integers(2, 24))
def test_cut(x, bits):
    once = cut(torch.tensor([x]), bits)
    assert torch.equal(cut(once.clone(), bits), once)
    assert torch.equal(cut(torch.tensor([-x]), bits), -once)
    kept = once.item()
    assert abs(kept) <= abs(x)
    if abs(x) >= 2.0**-126:  # normal
        assert abs(x) - abs(kept) < abs(x) * 2.0 ** (1 - bits)
        assert float(kept * 2.0 ** (bits - math.frexp(kept)[1])).is_integer()


def cut_scalar(x, bits):
    mantissa, exponent = math.frexp(x)
    return math.ldexp(math.trunc(math.ldexp(mantissa, bits)), exponent - bits)


def sum_scalar(pairs, total, bits, where):
    """total + sum of the products, of at most 32 pairs of numbers."""
    products = [a * b for a, b in pairs]
    if where is Cut.SUMS:
        return cut_scalar(total + math.fsum(products), bits)
    terms = [*products, total]
    exponent = max(math.frexp(term)[1] for term in terms if term) if any(terms) else 0
    last = math.ldexp(1, exponent - bits)
    return cut_scalar(sum(math.trunc(term / last) for term in terms) * last, bits)


def coarse(*shape, seed):
    """e4m3 numbers whose sums of products float32 holds."""
    return (random(*shape, seed=seed) * 16).round().div(16).to(torch.float8_e4m3fn).float()


@pytest.mark.parametrize("where", Cut)
@pytest.mark.parametrize("bits", [4, 9, 14])
@pytest.mark.parametrize("k", [32, 80, 256])
def test_gemm_is_the_scalar_model(where, bits, k):
    a, b = coarse(5, k, seed=k), coarse(k, 7, seed=bits)
    start = cut(random(5, 7, seed=5), bits)
    found = gemm(a, b, start.clone(), Arithmetic(bits=bits, cut=where))
    for i, j in itertools.product(range(5), range(7)):
        total = start[i, j].item()
        for step in range(0, k, 32):
            pairs = zip(a[i, step : step + 32].tolist(), b[step : step + 32, j].tolist())
            total = sum_scalar(pairs, total, bits, where)
        assert found[i, j].item() == total


def test_gemm_splits_rows_without_a_trace(monkeypatch):
    a, b = coarse(2, 9, 64, seed=1), coarse(2, 64, 5, seed=2)
    arithmetic = Arithmetic(bits=6, cut=Cut.PRODUCTS)
    whole = gemm(a, b, None, arithmetic)
    monkeypatch.setattr("hopper_attention.reference.fp8.PRODUCTS", 2 * b.numel())
    assert torch.equal(gemm(a, b, None, arithmetic), whole)


def test_sums_are_cut_as_the_simulator_does():
    a, b = coarse(64, 128, seed=1), coarse(128, 16, seed=2)
    item = type("Shape", (), {"kinds": ("e4m3", "e4m3"), "half": False})
    registers = np.zeros((8, 128), np.uint32)
    for start in range(0, 128, 32):
        product = tensor_core.multiply(
            a[:, start : start + 32].numpy(), b[start : start + 32].numpy()
        )
        registers = tensor_core.accumulate(registers, tensor_core.fragment_d(product), True, item)
        registers &= np.uint32(0xFFFFFFFF << (24 - 14) & 0xFFFFFFFF)
    ours = gemm(a, b, None, HOPPER)
    assert np.array_equal(tensor_core.fragment_d(ours.numpy()), registers.view(np.float32))


# ------------------------------------------------------------------------------ the whole, slowly


def round_p(x):
    return torch.tensor(x).to(torch.float8_e4m3fn).item()


def row_scalar(q, k, v, unit, arithmetic, seen):
    """(out, lse) of one query, number by number; q and k stand for themselves, v for v * unit."""
    row_max, row_sum, main, partial = -math.inf, 0.0, [0.0] * len(v[0]), [0.0] * len(v[0])
    largest, bits = max(unit), arithmetic.bits
    tiles = -(-len(k) // 128)
    for tile in reversed(range(tiles)):
        keys = list(range(tile * 128, min(tile * 128 + 128, len(k))))
        scores = {}
        for j in keys:
            total = 0.0
            for step in range(0, len(q), 32):
                pairs = zip(q[step : step + 32], k[j][step : step + 32])
                total = sum_scalar(pairs, total, bits, Cut.SUMS)
            scores[j] = total * math.log2(math.e) if seen(j) else -math.inf
        new_max = max(row_max, *scores.values())
        alpha = 2 ** (row_max - new_max)
        p = {j: 2 ** (scores[j] - new_max + 8) for j in keys}
        row_sum, row_max = row_sum * alpha + sum(p.values()), new_max
        main, partial = [x * alpha for x in main], [x * alpha for x in partial]
        for column, start in itertools.product(range(len(main)), range(0, len(keys), 32)):
            ours = keys[start : start + 32]
            pairs = [(round_p(p[j] * unit[j // 64] / largest), v[j][column]) for j in ours]
            partial[column] = sum_scalar(pairs, partial[column], bits, Cut.SUMS)
        if arithmetic.two_level and tile % arithmetic.accumulate_every == 0:
            main = [m + x for m, x in zip(main, partial)]
            partial = [0.0] * len(main)
    main = [(m + x) * largest for m, x in zip(main, partial)]
    return [m / row_sum for m in main], (row_max - 8) * math.log(2) + math.log(row_sum)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("blocks", [False, True], ids=["one_scale", "block_scales"])
@pytest.mark.parametrize(
    "arithmetic",
    [
        Arithmetic(bits=7, two_level=False),
        Arithmetic(bits=7),
        Arithmetic(bits=7, accumulate_every=2),
    ],
    ids=["plain", "two_level", "every_2"],
)
def test_attention_is_the_scalar_model(arithmetic, blocks, causal):
    rows, keys, dv = 3, 470, 2
    q, k, v = (
        coarse(1, rows, 1, 48, seed=1),
        coarse(1, keys, 1, 48, seed=2),
        coarse(1, keys, 1, dv, seed=3),
    )
    v = v + 1  # sums that grow, so that cutting them shows
    v = v.to(torch.float8_e4m3fn).float()
    unit = torch.tensor([0.5, 2.0, 0.25, 1.0, 3.0, 0.7, 1.5, 1.0]) if blocks else torch.ones(8)
    values = Quantized(v, unit[None, None] if blocks else torch.ones(1))
    out, lse = attention(
        exactly(q), exactly(k), values, softmax_scale=1.0, mask=CAUSAL if causal else FULL,
        arithmetic=arithmetic,
    )  # fmt: skip
    for i in range(rows):
        expected, expected_lse = row_scalar(
            q[0, i, 0].tolist(), k[0, :, 0].tolist(), v[0, :, 0].tolist(), unit.tolist(),
            arithmetic, lambda j, i=i: not causal or j <= i + keys - rows,
        )  # fmt: skip
        assert_close(out[0, i, 0], torch.tensor(expected), 1e-5)
        assert lse[0, 0, i].item() == pytest.approx(expected_lse, rel=1e-6)


# --------------------------------------------------------------------------------------- properties


@settings(max_examples=20, deadline=None)
@given(
    seqlen_k=st.integers(1, 400),
    sharpness=st.floats(0.01, 3),
    arithmetic=st.sampled_from([HOPPER, PLAIN, EXACT]),
    recipe=st.sampled_from(Recipe),
)
def test_outputs_are_means_of_values(seqlen_k, sharpness, arithmetic, recipe):
    """Rounded P may exceed 1 in sum, by at most half a unit of its last place."""
    operands = quantized(*qkv(20, seqlen_k), recipe)
    out, _ = attention(*operands, softmax_scale=sharpness, arithmetic=arithmetic)
    values = dequantized(operands[2])
    assert (out.abs() <= values.abs().amax() * (1 + 2.0**-4)).all()
    assert out.isfinite().all()


@settings(max_examples=10, deadline=None)
@given(power=st.integers(-6, 6), arithmetic=st.sampled_from([HOPPER, PLAIN]))
def test_powers_of_two_go_through(power, arithmetic):
    q, k, v = quantized(*qkv(30, 300), Recipe.BLOCK64)
    plain, lse = attention(q, k, v, softmax_scale=0.1, arithmetic=arithmetic)
    scaled, scaled_lse = attention(
        q, k, v._replace(descale=v.descale * 2.0**power), softmax_scale=0.1, arithmetic=arithmetic
    )
    assert torch.equal(scaled, plain * 2.0**power)
    assert torch.equal(scaled_lse, lse)


def test_p_is_cast_to_e4m3_below_its_greatest():
    """One key: P is 256 exactly.  Two: 2^-1 less is exact too, and 1/3 of it is rounded."""
    q, v = torch.ones(1, 1, 1, 32), torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    for ratio, expected in ((1 / 2, 1 / 2), (1 / 3, 0.34375), (2.0**-17, 2.0**-17), (2.0**-19, 0)):
        k = torch.tensor([math.log(ratio), 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 32) / 32
        out, _ = attention(exactly(q), exactly(k), exactly(v), softmax_scale=1.0, arithmetic=EXACT)
        assert out.item() * (1 + ratio) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "bad", [{"bits": 1}, {"bits": 25}, {"tile_n": 100}, {"accumulate_every": 0}]
)
def test_arithmetic_that_cannot_be(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Arithmetic(**bad)


def test_codes_are_e4m3_numbers_near_the_exponential():
    """Exact at powers of two, within 7.4 % between them, 0 below the format; -inf is 0."""
    exponents = torch.arange(-6, 8, 1 / 64)
    p = coded(exponents)
    assert torch.equal(p, p.to(torch.float8_e4m3fn).float())
    error = p / exponents.exp2() - 1
    assert error.abs().max() < 0.074 and error.mean().abs() < 2e-3
    assert (error[::64] == 0).all()
    assert (coded(torch.tensor([-torch.inf, -8.0])) == 0).all()


@pytest.mark.parametrize("two_level", [False, True])
def test_codes_cost_little_where_weights_are_alike(two_level):
    """Their errors cancel in O / l; the LSE is off by as much as their mean error at most."""
    q, k, v = torch.randn(3, 1, 256, 2, 64)
    operands = stated(q, Recipe.PER_HEAD), stated(k, Recipe.PER_HEAD), stated(v, Recipe.PER_HEAD)
    exact, _ = reference.attention(q, k, v, softmax_scale=0.125, mask=FULL)
    (out, lse), (coded_out, coded_lse) = (
        attention(
            *operands, softmax_scale=0.125, arithmetic=Arithmetic(codes=c, two_level=two_level)
        )
        for c in (False, True)
    )
    error, with_codes = ((x - exact).square().mean().sqrt() for x in (out, coded_out))
    assert with_codes < 1.15 * error
    assert (coded_lse - lse).abs().max() < 0.02


def test_codes_keep_nan_and_refuse_block_scales():
    q, k, v = torch.randn(3, 1, 128, 1, 64)
    q[0, 3] = torch.nan
    operands = stated(q, Recipe.BLOCK64), stated(k, Recipe.BLOCK64), stated(v, Recipe.PER_HEAD)
    out, _ = attention(*operands, softmax_scale=0.125, arithmetic=CODES)
    assert out[0, :64].isnan().all() and not out[0, 64:].isnan().any()
    scaled = stated(v * torch.linspace(0.1, 4, 128)[:, None, None], Recipe.BLOCK64)
    with pytest.raises(ValueError, match="one scale a head"):
        attention(*operands[:2], scaled, softmax_scale=0.125, arithmetic=CODES)
    with pytest.raises(ValueError, match="codes are e4m3"):
        Arithmetic(codes=True, p_dtype=None)
