"""Every FP8 instance on the simulator, against an FP64 model that rounds P as the kernel does."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math

import pytest
import torch
from support.fp8 import (
    DENSE_INSTANCES,
    LENGTHS,
    LSE_ERROR,
    PACKED,
    SHAPES,
    Case,
    PackedCase,
    check,
    check_packed,
    exact,
    outliers,
    quantized,
    unscaled,
)
from support.problems import Shape, arguments_for, offsets, random_inputs, window
from torch.testing._internal.two_tensor import TwoTensor

from hopper_attention import (
    attention_fp8,
    flash_attn_func,
    flash_attn_varlen_func,
    reference,
    simulator,
)
from hopper_attention.dispatch import target
from hopper_attention.launch import runtime
from hopper_attention.problem.values import Mask
from hopper_attention.quantize import Quantized, Recipe
from hopper_attention.reference.error import Error
from hopper_attention.reference.quantize import INTERLEAVED

pytestmark = pytest.mark.simulator


def dense_cases():
    """Every instance has half of the shapes."""
    for number, instance in enumerate(DENSE_INSTANCES):
        shapes = SHAPES[number % 2 :: 2]
        yield [Case.of(instance, shape, number + i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("cases", list(dense_cases()), ids=lambda cases: cases[0].instance)
def test_matches_model(cases):
    for case in cases:
        print(case)
        tensors = case.inputs()
        results = []
        for seed in (0, 1):
            with simulator.enabled(seed=seed):
                results.append(attention_fp8(*tensors, return_lse=True, **case.call))
        assert all(map(torch.equal, *results))
        operands = quantized(*tensors, case.recipe, codes=case.codes)
        check(case.instance, operands, *results[0], **case.arguments)


PACKED_CASES = [PackedCase.of(name, n, bounded=n % 2 == 1) for n, name in enumerate(PACKED)]


@pytest.mark.parametrize("case", PACKED_CASES, ids=str)
def test_packed_sequences_match_model(case):
    """NaN lies behind the last sequence; an upper bound of the lengths is given in every second."""
    tensors, queries, keys = case.inputs()
    starts = {"cu_seqlens_q": queries.cu_seqlens, "cu_seqlens_k": keys.cu_seqlens}
    results = []
    for seed in (0, 1):
        with simulator.enabled(seed=seed):
            results.append(attention_fp8(*tensors, return_lse=True, **starts, **case.call))
    assert all(map(torch.equal, *results))
    operands = quantized(*tensors, case.recipe, queries=queries, keys=keys, codes=case.codes)
    check_packed(case.instance, operands, LENGTHS, *results[0], **case.arguments)


def test_several_tiles_a_block(monkeypatch):
    """More tiles than blocks, GQA, sinks, fp16 in and out."""
    monkeypatch.setattr(target, "SIMULATED_SMS", 3)
    q, k, v = outliers(*random_inputs(Shape(2, 300, 200, 4, 2), 128, torch.float16))
    sink = torch.randn(4)
    with simulator.enabled(seed=2):
        out, lse = attention_fp8(q, k, v, causal=True, learnable_sink=sink, return_lse=True)
    assert out.dtype == torch.float16
    instance = "fwd_e4m3_d128_causal_two_level"
    operands = quantized(q, k, v, Recipe.BLOCK64)
    check(instance, operands, out, lse, sink=sink, causal=True)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("key", [3, 20, 150, 170])
def test_nan_in_a_key_reaches_just_the_queries_that_see_it(key, code):
    """A key has NaN of either sign, in either block; exponentials in halves know no NaN."""
    inputs = random_inputs(Shape(1, 200, 200, 2, 2), 64, torch.bfloat16)
    q, k, v = (x.to(torch.float8_e4m3fn) for x in inputs)
    k.view(torch.uint8)[:, key] = code
    with simulator.enabled(seed=0):
        out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert out[:, key:].isnan().all() and lse[..., key:].isnan().all()
    assert out[:, :key].isfinite().all() and lse[..., :key].isfinite().all()


@pytest.mark.parametrize("two_level", [False, True])
def test_negative_scores(two_level):
    """All of them, and the later a key block comes the greater: a stale maximum would saturate."""
    q, k, v = random_inputs(Shape(1, 70, 512, 2, 2), 128, torch.bfloat16, scale=4.0)
    q, k = q.abs(), -k.abs()
    for block in range(4):
        k[:, 128 * block : 128 * (block + 1)] *= 0.1 * (block + 1)
    with simulator.enabled(seed=0):
        out, lse = attention_fp8(q, k, v, two_level=two_level, return_lse=True)
    assert lse.max() < 0
    name = "fwd_e4m3_d128" + ("_two_level" if two_level else "")
    check(name, quantized(q, k, v, Recipe.BLOCK64), out, lse)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_blocks_of_small_values(head_dim):
    """Keys count in full, however little their V is beside another block's; one is all 0."""
    q, k, v = random_inputs(Shape(1, 70, 320, 2, 2), head_dim, torch.bfloat16)
    for block, scale in enumerate((2.0**-8, 0.0, 1.0, 2.0**-14, 2.0**-30)):
        v[:, 64 * block : 64 * (block + 1)] *= scale
    exact, exact_lse = flash_attn_func(q, k, v, return_lse=True)
    for two_level in {False, head_dim <= 128}:
        with simulator.enabled(seed=0):
            out, lse = attention_fp8(q, k, v, two_level=two_level, return_lse=True)
        assert (lse - exact_lse).abs().max() < 0.05, "what quantising Q and K does"
        assert Error.of(out, exact.double()).rms < 0.1 * exact.square().mean().sqrt()


def test_a_single_key_has_all_the_weight():
    """Also where its exponential is computed in halves: powers of two are exact there."""
    inputs = random_inputs(Shape(1, 40, 40, 1, 1), 128, torch.bfloat16)
    q, k, v = (x.to(torch.float8_e4m3fn) for x in inputs)
    with simulator.enabled(seed=0):
        out = flash_attn_func(q, k, v, window_size=(0, 0))
    assert torch.equal(out, v.to(out.dtype))


@pytest.mark.parametrize("accumulate_every", [2, 8])
def test_several_key_blocks_summed_at_once(accumulate_every):
    """Maxima that grow on the way, so that what is not flushed is rescaled; three key blocks."""
    q, k, v = random_inputs(Shape(1, 70, 384, 2, 2), 128, torch.bfloat16)
    k[:, 128:] *= 0.6
    k[:, 256:] *= 0.5
    with simulator.enabled(seed=0):
        out, lse = attention_fp8(
            q, k, v, two_level=True, accumulate_every=accumulate_every, return_lse=True
        )
    check("fwd_e4m3_d128_two_level", quantized(q, k, v, Recipe.BLOCK64), out, lse)


def test_more_blocks_at_once_lose_more_bits():
    """The sums of so many key blocks have 14 bits."""
    q, k = torch.randn(1, 64, 1, 64).bfloat16() * 0.1, torch.randn(1, 2048, 1, 64).bfloat16()
    v = (torch.rand(1, 2048, 1, 64) + 0.5).bfloat16()
    exactly = attention_fp8(q, k, v)
    errors = []
    for every in (1, 4, 16):
        with simulator.enabled(fp8_accumulator_bits=14):
            out = attention_fp8(q, k, v, two_level=True, accumulate_every=every)
        errors.append(Error.of(out, exactly.double()).rms)
    assert errors[0] < errors[1] < errors[2], errors


def test_scales_behind_a_sequence_do_not_count():
    """Whatever stands there: no infinity becomes NaN, no V is scaled by it."""
    q, k, v = (torch.randn(s, 1, 64).to(torch.float8_e4m3fn) for s in (90, 150, 150))
    index = offsets([50, 40]), offsets([20, 130]), 50, 130
    scales = {"k_descale": torch.rand(2, 1, 3) + 0.5, "v_descale": torch.rand(2, 1, 3) + 0.5}
    with simulator.enabled(seed=0):
        expected = flash_attn_varlen_func(q, k, v, *index, **scales)
        for scale in scales.values():
            scale[0, :, 1:] = 1e30
        assert torch.equal(flash_attn_varlen_func(q, k, v, *index, **scales), expected)


def test_negated_views():
    """Whose memory has the other sign."""
    q = torch.randn(1, 70, 2, 64)
    values, negated = q.to(torch.float8_e4m3fn), torch._neg_view(-torch.ones(1))
    sink = torch._neg_view(-torch.randn(2))
    with simulator.enabled(seed=0):
        expected = flash_attn_func(values, values, values, learnable_sink=sink.resolve_neg())
        out = flash_attn_func(values, values, values, learnable_sink=sink, v_descale=negated)
    assert torch.equal(out, expected)


def test_partly_used_sequences(monkeypatch):
    """NaN lies behind the last row of every sequence.  One block has all sequences."""
    monkeypatch.setattr(target, "SIMULATED_SMS", 1)
    used_q, used_k = (torch.tensor(n, dtype=torch.int32) for n in ([70, 0, 3], [129, 40, 0]))
    q, k, v = random_inputs(Shape(3, 80, 200, 2, 1), 64, torch.bfloat16)
    for tensors, used in (((q,), used_q), ((k, v), used_k)):
        for x, (entry, rows) in itertools.product(tensors, enumerate(used.tolist())):
            x[entry, rows:] = torch.nan
    with simulator.enabled(seed=0):
        out, lse = attention_fp8(
            q, k, v, seqused_q=used_q, seqused_k=used_k, causal=True, return_lse=True
        )
    for b, (m, n) in enumerate(zip(used_q.tolist(), used_k.tolist(), strict=True)):
        assert (out[b, m:] == 0).all() and (lse[b, :, m:] == -torch.inf).all()
        one = [x[b : b + 1, :rows] for x, rows in ((q, m), (k, n), (v, n), (out, m))]
        if m * n:
            operands = quantized(*one[:3], Recipe.BLOCK64)
            name = "fwd_e4m3_d64_causal_varlen_two_level"
            check(name, operands, one[3], lse[b : b + 1, :, :m], causal=True)


@pytest.mark.parametrize("simulated", [False, True], ids=["reference", "simulator"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_lse_has_the_mean_that_was_taken_off(packed, simulated):
    """Keys have a mean; queries in no sequence are NaN."""
    q, k, v = random_inputs(Shape(1, 90, 140, 2, 1), 64, torch.bfloat16)
    k += 3 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    index, call = {}, {"smooth_k": True, "return_lse": True}
    if packed:
        q, k, v = (x[0] for x in (q, k, v))
        q[80:] = torch.nan
        index = {"cu_seqlens_q": offsets([30, 0, 50]), "cu_seqlens_k": offsets([100, 10, 30])}
    with simulator.enabled(seed=0) if simulated else contextlib.nullcontext():
        _, lse = attention_fp8(q, k, v, **index, **call)
    if packed:
        _, true = flash_attn_varlen_func(q, k, v, *index.values(), 50, 100, return_lse=True)
        assert (lse[:, 80:] == -torch.inf).all()
        lse, true = lse[:, :80], true[:, :80]
    else:
        _, true = flash_attn_func(q, k, v, return_lse=True)
    assert (lse - true).abs().max() < 0.02 * true.abs().max()
    assert true.std() > 1  # far beyond what quantisation does


def test_unused_keys_are_not_read():
    """Head dims and lengths that fill no tile: what lies beside them is not a number."""
    q, k, v = (x[..., :80] for x in random_inputs(Shape(1, 70, 90, 2, 1), 96, torch.bfloat16))
    with simulator.enabled(seed=0):
        out, lse = attention_fp8(q, k, v, return_lse=True)
    check("fwd_e4m3_d96_two_level", quantized(q, k, v, Recipe.BLOCK64), out, lse)


@pytest.mark.parametrize(("two_level", "worst"), [(False, math.inf), (True, 1.3)])
def test_accumulators_of_14_bits(two_level, worst):
    """Two-level accumulation of many keys is nearly exact, plain is not."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 64, 1, 64).bfloat16() * 0.1, torch.randn(1, 4096, 1, 64).bfloat16()
    v = (torch.rand(1, 4096, 1, 64) + 0.5).bfloat16()
    errors = []
    for bits in (None, 14):
        with simulator.enabled(fp8_accumulator_bits=bits):
            out = attention_fp8(q, k, v, two_level=two_level)
        true, _ = reference.attention(*exact(quantized(q, k, v, Recipe.BLOCK64)),
                                      softmax_scale=0.125, compute_dtype=torch.float64)  # fmt: skip
        errors.append(Error.of(out, true).rms)
    exactly, narrow = errors
    if two_level:
        assert narrow <= worst * exactly
    else:
        assert narrow > 1.5 * exactly


SHORT = ("fwd_e4m3_d64_local_softcap", "fwd_e4m3_d128_causal_two_level")


@pytest.mark.parametrize("instance", SHORT)
def test_short_sums(instance):
    """The simulator with as few bits as a GPU passes what results on a GPU are held against."""
    for number, shape in enumerate(SHAPES):
        case = Case.of(instance, shape, number)
        print(case)
        tensors = case.inputs()
        with simulator.enabled(fp8_accumulator_bits=14):
            results = attention_fp8(*tensors, return_lse=True, **case.call)
        operands = quantized(*tensors, case.recipe)
        check(instance, operands, *results, short_sums=True, **case.arguments)


ONE_KEY = window(5)
"""The hardest case."""
SHORT_PACKED = [
    PackedCase(name, Recipe.BLOCK64, arguments_for(name, ONE_KEY))
    for name in ("fwd_e4m3_d64_varlen", "fwd_e4m3_d128_local_varlen")
]


@pytest.mark.parametrize("case", SHORT_PACKED, ids=str)
def test_short_sums_of_packed_sequences(case):
    tensors, queries, keys = case.inputs()
    with simulator.enabled(fp8_accumulator_bits=14):
        out, lse = attention_fp8(
            *tensors, return_lse=True, cu_seqlens_q=queries.cu_seqlens,
            cu_seqlens_k=keys.cu_seqlens, **case.call,
        )  # fmt: skip
    operands = quantized(*tensors, case.recipe, queries=queries, keys=keys, codes=case.codes)
    check_packed(case.instance, operands, LENGTHS, out, lse, short_sums=True, **case.arguments)


def test_gradients_where_keys_have_a_mean():
    """Rows of dS do not quite sum to 0: dQ would have what is missing times the mean."""
    q, k, v = random_inputs(Shape(1, 100, 160, 2, 1), 64, torch.bfloat16)
    k += 2 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    weight = torch.randn(1, 100, 2, 64, generator=torch.Generator().manual_seed(1))
    problem = {"softmax_scale": 0.125, "compute_dtype": torch.float64}
    *true, _ = reference.gradients(
        *(x.detach().double() for x in inputs), weight.double(), torch.ones(1, 2, 100).double(),
        **problem,
    )  # fmt: skip
    with simulator.enabled(seed=0):
        out, lse = attention_fp8(*inputs, smooth_k=True, return_lse=True)
        found = torch.autograd.grad((out.float() * weight).sum() + lse.sum(), inputs)
    for gradient, expected in zip(found, true, strict=True):
        assert Error.of(gradient, expected).rms < 0.03 * expected.square().mean().sqrt()


def test_gradients_are_those_of_the_unquantised():
    q, k, v = (
        x.requires_grad_() for x in random_inputs(Shape(1, 70, 90, 2, 1), 64, torch.bfloat16)
    )
    with simulator.enabled(seed=0):
        out = attention_fp8(q, k, v, causal=True, hadamard=True, smooth_k=True)
        gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    exact_q, exact_k, exact_v = (x.detach().double() for x in (q, k, v))
    true = reference.gradients(
        exact_q, exact_k, exact_v, 2 * out.detach().double(), softmax_scale=0.125,
        mask=Mask(right=0), compute_dtype=torch.float64,
    )  # fmt: skip
    for gradient, expected in zip(gradients, true, strict=False):
        assert Error.of(gradient, expected).rms < 0.05 * expected.square().mean().sqrt()


@pytest.mark.parametrize("simulated", [False, True], ids=["reference", "simulator"])
@pytest.mark.parametrize("recipe", Recipe)
def test_quantised_tensors(simulated, recipe):
    """A descale's shape says what shares it; V's rows or its columns lie together."""
    tensors = outliers(*random_inputs(Shape(2, 70, 200, 4, 2), 64, torch.bfloat16))
    q, k, v = quantized(*tensors, recipe)
    names = ("q_descale", "k_descale", "v_descale")
    descales = dict(zip(names, (x.descale for x in (q, k, v)), strict=True))
    columns = v.values.transpose(1, 3).contiguous().transpose(1, 3)
    assert columns.stride(1) == 1
    with simulator.enabled(seed=1) if simulated else contextlib.nullcontext():
        expected, lse = attention_fp8(*tensors, recipe=recipe, causal=True, return_lse=True)
        for values in (v.values, columns):
            out, other = flash_attn_func(
                q.values, k.values, values, causal=True, return_lse=True, **descales
            )
            assert torch.equal(out, expected)
            assert torch.equal(other, lse)
        wide = flash_attn_func(
            q.values, k.values, v.values, causal=True, out_dtype=torch.float32, **descales
        )
        written = torch.empty_like(expected)
        flash_attn_func(q.values, k.values, v.values, causal=True, out=written, **descales)
    assert torch.equal(wide.bfloat16(), expected)
    assert torch.equal(written, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e4m3fn])
def test_output_types(dtype, packed):
    """Each is the same float32 result, rounded once."""
    operands = quantized(
        *outliers(*random_inputs(Shape(1, 70, 200, 4, 2), 64, torch.bfloat16)), Recipe.BLOCK64
    )
    names = ("q_descale", "k_descale", "v_descale")
    descales = dict(zip(names, (x.descale for x in operands), strict=True))
    values = [x.values for x in operands]
    run = flash_attn_func
    if packed:
        values = [x[0] for x in values]
        cu_seqlens = {"cu_seqlens_q": offsets([70]), "cu_seqlens_k": offsets([200])}
        bounds = {"max_seqlen_q": 70, "max_seqlen_k": 200}
        run = functools.partial(flash_attn_varlen_func, **cu_seqlens, **bounds)
    with simulator.enabled(seed=1):
        wide = run(*values, causal=True, out_dtype=torch.float32, **descales)
        out = run(*values, causal=True, out_dtype=dtype, **descales)
        if dtype == torch.float8_e4m3fn:
            unit = torch.tensor([0.013])
            scaled = run(*values, causal=True, out_dtype=dtype, out_descale=unit, **descales)
            exact_quotient = (wide / unit).clamp(-448, 448)
            # The division is part of the normalisation: a step of the format at most.
            step = exact_quotient.abs().clamp(min=2.0**-6).log2().floor().exp2() / 8
            assert ((scaled.float() - exact_quotient).abs() <= 0.51 * step).all()
    assert torch.equal(out.float(), wide.to(dtype).float())


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("recipe", [Recipe.PER_HEAD, Recipe.BLOCK128])
def test_keys_and_values_of_two_bits(recipe, packed):
    """e5m2; what is e4m3 after it is the same to the kernel as if it had been."""
    tensors = outliers(*random_inputs(Shape(1, 70, 200, 2, 1), 64, torch.bfloat16))
    q, k, v = quantized(*tensors, recipe)
    wide = [(x.values.float() * 4).to(torch.float8_e5m2) for x in (k, v)]
    names = ("q_descale", "k_descale", "v_descale")
    descales = dict(zip(names, (x.descale for x in (q, k, v)), strict=True))
    values, run = [q.values, *wide], flash_attn_func
    if packed:
        values, index = [x[0] for x in values], (offsets([70]), offsets([200]), 70, 200)
        run = functools.partial(_packed_call, index)
    operands = [q, *(Quantized(x, y.descale) for x, y in zip(wide, (k, v), strict=True))]
    true, true_lse = reference.attention(*exact(operands), softmax_scale=0.125)
    for simulated in (False, True):
        with simulator.enabled(seed=1) if simulated else contextlib.nullcontext():
            out, lse = run(*values, return_lse=True, **descales)
        out, lse = (out[None], lse[None]) if packed else (out, lse)
        rounding = 0.03 if simulated else 0.004  # of P in e4m3, of out in bf16
        atol = LSE_ERROR if simulated else 1e-5
        torch.testing.assert_close(lse, true_lse.float(), rtol=1e-5, atol=atol)
        assert Error.of(out, true).rms <= rounding * true.square().mean().sqrt()


def _packed_call(index, *tensors, **arguments):
    return flash_attn_varlen_func(*tensors, *index, **arguments)


def test_blocks_without_scale():
    """Zeros are quantised with a descale of 0 by some; and the first row is alone in its tensor."""
    q, k, v = quantized(*random_inputs(Shape(1, 70, 200, 2, 1), 64, torch.bfloat16), Recipe.BLOCK64)
    descales = [x.descale.clone() for x in (q, k, v)]
    for descale in descales:
        descale[:, :, 1] = 0
    values = [x.values for x in (q, k, v)]
    names = ("q_descale", "k_descale", "v_descale")
    arguments = dict(zip(names, descales, strict=True)) | {"causal": True}
    with simulator.enabled(seed=1):
        out, lse = flash_attn_func(*values, return_lse=True, **arguments)
        nothing = flash_attn_func(*values, v_descale=torch.zeros(1))
    expected, expected_lse = flash_attn_func(*values, return_lse=True, **arguments)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=LSE_ERROR)
    # P is rounded here, not in the reference.
    assert Error.of(out, expected.double()).rms <= 0.03 * expected.double().square().mean().sqrt()
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_order_of_keys():
    """V's columns are written as P lies in registers."""
    fragments = pytest.importorskip("hopper_attention.cute_kernels.primitives.fragments")
    assert [fragments.interleaved(place) for place in range(16)] == INTERLEAVED


def test_strided_values_and_no_descales():
    """Rows that TMA cannot address are copied."""
    values = torch.randn(2, 40, 3, 2, 72).to(torch.float8_e4m3fn)[..., :64]
    q, k, v = values.unbind(2)
    with simulator.enabled(seed=0):
        out = flash_attn_func(q, k, v)
        assert torch.equal(out, flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous()))
    check("fwd_e4m3_d64_two_level", unscaled(q, k, v), out)


E4M3 = torch.zeros(1, 130, 2, 64).to(torch.float8_e4m3fn)
REFUSED_VALUES = [
    (NotImplementedError, "^k has dtype torch.bfloat16", {"k": E4M3.bfloat16()}),
    (NotImplementedError, "^q has dtype torch.float8_e5m2", {"q": E4M3.to(torch.float8_e5m2)}),
    (NotImplementedError, "^head_dim 56 of q", {"q": E4M3[..., :56], "k": E4M3[..., :56]}),
    (ValueError, "^q_descale has shape", {"q_descale": torch.ones(2)}),
    (ValueError, "^k_descale has shape", {"k_descale": torch.ones(1, 2, 5)}),
    (ValueError, "^v_descale has dtype", {"v_descale": torch.ones(1).half()}),
    (ValueError, "^v_descale is on meta", {"v_descale": torch.ones(1, device="meta")}),
    (TypeError, "^k_descale: expected", {"k_descale": 1.0}),
    (ValueError, "^k_descale must be finite", {"k_descale": torch.tensor([-1.0])}),
    (ValueError, "^q_descale must be finite", {"q_descale": torch.tensor([torch.nan])}),
    (NotImplementedError, "^q is a TwoTensor", {"q": TwoTensor(E4M3, E4M3)}),
    (NotImplementedError, "^out_dtype=torch.float64", {"out_dtype": torch.float64}),
    (
        NotImplementedError,
        "^q_descale requires grad",
        {"q_descale": torch.ones(1).requires_grad_()},
    ),
    (ValueError, "^out_descale: only with", {"out_descale": torch.ones(1)}),
    (ValueError, "^k_descale must be 0 or at least 1e-12", {"k_descale": torch.tensor([1e-13])}),
    (ValueError, "^q_descale: expected a plain", {"q_descale": torch.ones(1).to_sparse()}),
    (NotImplementedError, "^pack_gqa", {"pack_gqa": True}),
    (ValueError, "^out: ", {"out": torch.empty(1, 130, 2, 65).bfloat16()[..., :64]}),
    (
        ValueError,
        "^out_descale must be positive",
        {"out_dtype": torch.float8_e4m3fn, "out_descale": torch.zeros(1)},
    ),
    (
        ValueError,
        "^out_descale has shape",
        {"out_dtype": torch.float8_e4m3fn, "out_descale": torch.ones(2)},
    ),
]


@pytest.fixture(params=[False, True], ids=["reference", "simulator"])
def unlaunched(request, monkeypatch):
    """Nothing may be launched, by either way."""
    monkeypatch.setattr(runtime, "launch", lambda *_, **__: pytest.fail("launched"))
    with simulator.enabled() if request.param else contextlib.nullcontext():
        yield


@pytest.mark.parametrize(("error", "message", "arguments"), REFUSED_VALUES)
def test_refused_values(unlaunched, error, message, arguments):
    with pytest.raises(error, match=message):
        flash_attn_func(**({"q": E4M3, "k": E4M3, "v": E4M3} | arguments))


def test_refused_bounds():
    """Scales are looked up by them."""
    q, index = E4M3[0], offsets([70, 60])
    for bounds in ((69, 70), (70, 69)):
        with pytest.raises(ValueError, match=r"^max_seqlen_. is 69, less than a sequence of 70"):
            flash_attn_varlen_func(q, q, q, index, index, *bounds)


def test_descales_of_16_bits_are_refused():
    q = E4M3.bfloat16()
    with pytest.raises(NotImplementedError, match=r"^q_descale: only of FP8"):
        flash_attn_func(q, q, q, q_descale=torch.ones(1))


REFUSED = [
    (ValueError, "recipe must be one of", {"recipe": "block32"}),
    (NotImplementedError, "smooth_k", {"smooth_k": True, "softcap": 5.0}),
    (NotImplementedError, "smooth_k", {"smooth_k": True, "learnable_sink": torch.zeros(2)}),
    (TypeError, "hadamard", {"hadamard": 1}),
    (TypeError, "two_level", {"two_level": "yes"}),
    (ValueError, "accumulate_every must be a power of two; got 6, use 4", {"accumulate_every": 6}),
    (ValueError, "accumulate_every=2", {"accumulate_every": 2, "two_level": False}),
    (TypeError, "max_seqlen_q", {"max_seqlen_q": 1.5}),
    (ValueError, "^k: the last dimension", {"k": torch.zeros(1, 8, 1, 128).bfloat16()[..., ::2]}),
    (
        NotImplementedError,
        "^q has dtype torch.float8",
        {"q": torch.zeros(1, 8, 2, 64).to(torch.float8_e4m3fn)},
    ),
]


@pytest.mark.parametrize(("error", "message", "arguments"), REFUSED)
def test_refused(unlaunched, error, message, arguments):
    tensors = random_inputs(Shape(1, 8, 8, 2, 1), 64, torch.bfloat16)
    with pytest.raises(error, match=message):
        attention_fp8(**dict(zip("qkv", tensors, strict=True)) | arguments)


@pytest.mark.parametrize("simulated", [False, True], ids=["reference", "simulator"])
@pytest.mark.parametrize("recipe", Recipe)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(9, 0), (0, 9), (0, 0)])
def test_nothing_to_attend(simulated, recipe, seqlen_q, seqlen_k):
    q, k, v = random_inputs(Shape(2, seqlen_q, seqlen_k, 2, 1), 64, torch.bfloat16)
    with simulator.enabled() if simulated else contextlib.nullcontext():
        out, lse = attention_fp8(q, k, v, recipe=recipe, smooth_k=True, return_lse=True)
    assert torch.equal(out, torch.zeros(2, seqlen_q, 2, 64).bfloat16())
    assert torch.equal(lse, torch.full((2, 2, seqlen_q), -torch.inf))


def test_refused_head_dim():
    q, k, v = random_inputs(Shape(1, 8, 8, 2, 1), 72, torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"head_dim 72 of q and k.*nearest: 80"):
        attention_fp8(q, k, v)


def test_nothing_packed():
    """Sequences without keys, and no sequences."""
    q, k, v = (x[0] for x in random_inputs(Shape(1, 8, 8, 2, 1), 64, torch.bfloat16))
    none = torch.zeros(1, dtype=torch.int32)
    for index in (
        {"cu_seqlens_q": none, "cu_seqlens_k": none},
        {"cu_seqlens_q": offsets([8]), "cu_seqlens_k": offsets([0]), "max_seqlen_k": 0},
    ):
        for simulated in (False, True):
            with simulator.enabled() if simulated else contextlib.nullcontext():
                out, lse = attention_fp8(q, k, v, smooth_k=True, return_lse=True, **index)
            assert (out == 0).all() and (lse == -torch.inf).all()


def test_refused_two_level_of_wide_heads():
    q, k, v = random_inputs(Shape(1, 8, 8, 2, 1), 256, torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"^accumulate_every=4: head dims 256"):
        attention_fp8(q, k, v, accumulate_every=4)
    with pytest.raises(NotImplementedError, match=r"two_level=True.*have up to one of"):
        attention_fp8(q, k, v, two_level=True)


def test_recipes_are_all_run():
    """The numbering above leaves none out."""
    assert {case.recipe for cases in dense_cases() for case in cases} == set(Recipe)


NO_EXPONENTIALS = {"exact_softmax": False}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("head_dim", "code"), [(48, 0x7F), (128, 0xFF)])
def test_codes_keep_nan(head_dim, code, causal):
    """Codes know none: of keys and queries with NaN, and of scores whose maximum is infinite."""
    inputs = random_inputs(Shape(1, 200, 200, 2, 2), head_dim, torch.bfloat16)
    q, k, v = (x.to(torch.float8_e4m3fn) for x in inputs)
    k.view(torch.uint8)[:, 150] = code
    q.view(torch.uint8)[:, 20] = code
    call = {"causal": causal, "return_lse": True, **NO_EXPONENTIALS}
    huge = torch.full((1,), 1e30)
    with simulator.enabled(seed=0):
        out, lse = flash_attn_func(q, k, v, **call)
        infinite, _ = flash_attn_func(q.abs(), v.abs(), v, q_descale=huge, k_descale=huge, **call)
    rows = torch.arange(200)
    lost = (rows >= 150) | (rows == 20) if causal else rows >= 0
    assert out[:, lost].isnan().all() and lse[..., lost].isnan().all()
    assert out[:, ~lost].isfinite().all() and lse[..., ~lost].isfinite().all()
    assert infinite[:, rows != 20].isnan().all()


def test_codes_of_a_single_key():
    """Powers of two are exact, so a row that sees one key is that key's V."""
    inputs = random_inputs(Shape(1, 40, 40, 1, 1), 128, torch.bfloat16)
    q, k, v = (x.to(torch.float8_e4m3fn) for x in inputs)
    with simulator.enabled(seed=0):
        out = flash_attn_func(q, k, v, causal=True, **NO_EXPONENTIALS)
    assert torch.equal(out[:, 0], v[:, 0].to(out.dtype))


def test_codes_over_several_tiles_a_block(monkeypatch):
    """The ones behind V stay; GQA, sinks, rows of no key, V of any scale."""
    monkeypatch.setattr(target, "SIMULATED_SMS", 2)
    q, k, v = outliers(*random_inputs(Shape(2, 300, 200, 4, 2), 128, torch.float16))
    sink = torch.randn(4)
    call = {"causal": True, "learnable_sink": sink, "return_lse": True, **NO_EXPONENTIALS}
    with simulator.enabled(seed=2):
        out, lse = attention_fp8(q, k, v, accumulate_every=2, **call)
    operands = quantized(q, k, v, Recipe.BLOCK64, codes=True)
    instance = "fwd_e4m3_d128_causal_codes_two_level"
    check(instance, operands, out, lse, sink=sink, causal=True)
    with simulator.enabled(seed=0):
        q8, k8, v8 = (x.values for x in operands)
        scales = dict(zip(("q_descale", "k_descale", "v_descale"), (x.descale for x in operands)))
        given, _ = flash_attn_func(q8, k8, v8, out_dtype=torch.float16, **scales, **call)
    check(instance, operands, given, sink=sink, causal=True)


@pytest.mark.parametrize("two_level", [False, True])
def test_codes_of_scores_that_are_negative(two_level):
    """An integer maximum must not fall short: codes end 7 below NaN."""
    q, k, v = random_inputs(Shape(1, 70, 512, 2, 2), 128, torch.bfloat16, scale=4.0)
    q, k = q.abs(), -k.abs()
    for block in range(4):
        k[:, 128 * block : 128 * (block + 1)] *= 0.1 * (block + 1)
    with simulator.enabled(seed=0):
        out, lse = attention_fp8(q, k, v, two_level=two_level, return_lse=True, **NO_EXPONENTIALS)
    name = "fwd_e4m3_d128_codes" + ("_two_level" if two_level else "")
    check(name, quantized(q, k, v, Recipe.BLOCK64, codes=True), out, lse)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_codes_of_several_key_blocks_summed_at_once(head_dim):
    """Causal: the consumers' own last blocks are in different places of what is summed together."""
    q, k, v = random_inputs(Shape(1, 330, 700, 2, 1), head_dim, torch.bfloat16)
    k[:, 300:] *= 0.6
    call = {"causal": True, "return_lse": True, **NO_EXPONENTIALS}
    with simulator.enabled(seed=1):
        out, lse = attention_fp8(q, k, v, accumulate_every=4, **call)
    name = f"fwd_e4m3_d{head_dim}_causal_codes_two_level"
    check(name, quantized(q, k, v, Recipe.BLOCK64, codes=True), out, lse, causal=True)


@pytest.mark.parametrize("scales", ["tensor", "blocks"])
def test_rows_of_no_sequence(scales):
    """Queries lie behind the last sequence, the bound of their lengths is 0: no scale is read."""
    q, k, v = (torch.randn(s, 2, 64).to(torch.float8_e4m3fn) for s in (4, 20, 20))
    index = offsets([0]), offsets([20]), 0, 20
    descale = torch.ones(1) if scales == "tensor" else torch.ones(1, 2, 0)
    out = torch.full((4, 2, 64), 7.0).bfloat16()
    with simulator.enabled(seed=0):
        _, lse = flash_attn_varlen_func(
            q, k, v, *index, q_descale=descale, out=out, return_lse=True
        )
    assert out.shape == (4, 2, 64) and lse.shape == (2, 4)


def test_gradients_without_exponentials():
    """They are as exact where weights are alike: backward takes P from the codes' LSE."""
    q, k, v = (
        x.requires_grad_() for x in random_inputs(Shape(1, 70, 150, 2, 1), 64, torch.bfloat16)
    )
    found = []
    for exact_softmax in (True, False):
        with simulator.enabled(seed=0):
            out = attention_fp8(q, k, v, exact_softmax=exact_softmax, recipe="per_head")
            found.append(torch.autograd.grad(out.float().sin().sum(), (q, k, v)))
    for with_exponentials, without in zip(*found):
        difference = (with_exponentials - without).float().square().mean().sqrt()
        assert 0 < difference < 0.03 * with_exponentials.float().square().mean().sqrt()
