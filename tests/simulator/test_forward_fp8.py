"""Every FP8 instance on the simulator, against an FP64 model that rounds P as the kernel does."""

from __future__ import annotations

import contextlib
import math
from itertools import product

import pytest
import torch
from cases import WINDOWS, Shape, random_inputs

from hopper_attention import (
    attention_fp8,
    flash_attn_func,
    fp8,
    manifest,
    reference,
    simulator,
)
from hopper_attention.arguments import Mask, Options, resolve_mask
from hopper_attention.numerics import Error, pytorch_attention
from hopper_attention.quantize import Quantized, Recipe, quantize, spread, stated

pytestmark = pytest.mark.simulator

INSTANCES = {n: i for n, i in manifest.instances().items() if i.family == "forward_fp8"}
SHAPES = (
    Shape(2, 97, 131, 4, 1),
    Shape(1, 203, 113, 2, 2),  # causal: rows without keys
    Shape(1, 1, 509, 2, 1),
    Shape(1, 256, 384, 2, 2),  # every block full
)
RECIPES = tuple(Recipe)
HEADROOM = 8


def arguments_for(config, number):
    arguments = {"softcap": 15.0} if config["softcap"] else {}
    if config["mask"] == "causal":
        arguments["causal"] = True
    if config["mask"] == "local":
        arguments |= WINDOWS[number % len(WINDOWS)]
    return arguments


def options(causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, **_):
    return Options.of(
        None, causal, window_size, attention_chunk, softcap, None, None, None, 0, False
    )


def outliers(q, k, v):
    """Rows of other magnitudes, so that scales of blocks differ from each other."""
    for x in (q, k, v):
        x[:, 1::64] *= 8
    v[:, 70:] *= 0.05
    return q, k, v


def quantized(q, k, v, recipe, **how):
    return fp8.Operands(
        quantize(q, recipe, heads_kv=k.shape[2], **how),
        quantize(k, recipe, **how),
        quantize(v, recipe, octaves=True),
    )


def exact(operands):
    return [x.values.double() * spread(x.descale, x.values).double() for x in operands]


def model(operands, call: Options, tile_n: int, sink=None):
    """(out, lse) in FP64, but for P: of each key block, last to first, rounded to e4m3.

    P is taken relative to the largest score so far, times 2^8 and V's descale over the largest of
    its head.
    """
    q, k, v = exact(operands)
    group = q.shape[2] // k.shape[2]
    mask = resolve_mask(call, q.shape[1], k.shape[1])
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    rows = slice(0, q.shape[1])
    seen = reference.visible(mask, q.shape[1], k.shape[1], rows, q.device)
    scores = scores.masked_fill(~seen, -torch.inf)
    descale = spread(operands.v.descale, operands.v.values).double()
    descale = descale.expand(*operands.v.values.shape[:3], 1)
    relative = descale / descale.amax(dim=1, keepdim=True)
    relative = relative.repeat_interleave(group, dim=2)[..., 0].permute(0, 2, 1)[:, :, None]
    top = torch.full_like(scores[..., 0], -torch.inf)
    out, total = torch.zeros_like(q[..., :1].expand(*q.shape[:3], v.shape[-1])), top.exp()
    for start in range((k.shape[1] - 1) // tile_n * tile_n, -1, -tile_n):
        keys = slice(start, min(start + tile_n, k.shape[1]))
        new = torch.maximum(top, scores[..., keys].amax(dim=-1))
        finite = torch.where(new == -torch.inf, 0.0, new)
        shrink = torch.exp(top - finite)
        p = torch.exp(scores[..., keys] - finite[..., None])
        wide = (p * 2**HEADROOM * relative[..., keys]).float().to(torch.float8_e4m3fn).double()
        weights = wide / 2**HEADROOM / relative[..., keys]
        out = out * shrink.transpose(1, 2)[..., None] + torch.einsum(
            "bhqk,bkhd->bqhd", weights, v[:, keys]
        )
        total, top = total * shrink + p.sum(dim=-1), new
    if sink is not None:
        joined = torch.maximum(top, sink.double()[:, None])
        shrink = torch.exp(top - joined)
        total = total * shrink + torch.exp(sink.double()[:, None] - joined)
        out, top = out * shrink.transpose(1, 2)[..., None], joined
    inverse = torch.where(total == 0, 0.0, 1 / total)
    return out * inverse.transpose(1, 2)[..., None], top + total.log()


def check(instance, q, k, v, out, lse, recipe, sink=None, **arguments):
    """Beside PyTorch's error in bf16 on the same quantised values; recipe None: q, k, v are."""
    config = manifest.instances()[instance].config
    operands = fp8.Operands(*(Quantized(x, torch.ones(1)) for x in (q, k, v)))
    if recipe is not None:
        operands = quantized(q, k, v, recipe)
    call = options(**arguments)
    expected, expected_lse = model(operands, call, config["tile_n"], sink)
    values = exact(operands)
    problem = {
        "softmax_scale": 1 / math.sqrt(q.shape[-1]),
        "mask": resolve_mask(call, q.shape[1], k.shape[1]),
        "softcap": call.softcap or None,
        "sink": sink,
    }
    torch_error = Error.of(
        pytorch_attention(*(x.to(q.dtype) for x in values), **problem),
        pytorch_attention(*(x.to(q.dtype).double() for x in values), **problem),
    )
    error = Error.of(out, expected)
    # Some P lie so near the middle of two e4m3 numbers that the kernel rounds them the other way.
    rounding = expected.square().mean().sqrt().item() * torch.finfo(q.dtype).eps / 2
    assert error.rms <= 2 * torch_error.rms + rounding, (error, torch_error, rounding)
    assert error.maximum <= values[2].abs().max().item() / 16, error
    if lse is not None:
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("instance", INSTANCES)
def test_matches_model(monkeypatch, instance):
    config = INSTANCES[instance].config
    number = list(INSTANCES).index(instance)
    for i, shape in enumerate(SHAPES[number % 2 :: 2]):
        recipe = RECIPES[(number + i) % len(RECIPES)]
        q, k, v = outliers(
            *random_inputs(
                shape, config["head_dim"], torch.bfloat16, head_dim_v=config["head_dim_v"]
            )
        )
        arguments = arguments_for(config, number + i)
        results = []
        for seed in (0, 1):
            with simulator.enabled(seed=seed):
                results.append(
                    attention_fp8(
                        q, k, v, recipe=recipe, two_level=config["two_level"], return_lse=True,
                        **arguments,
                    )
                )  # fmt: skip
        assert all(map(torch.equal, *results))
        check(instance, q, k, v, *results[0], recipe, **arguments)


def test_several_tiles_a_block(monkeypatch):
    """More tiles than blocks, GQA, sinks, fp16 in and out."""
    from hopper_attention import runtime

    monkeypatch.setattr(runtime, "SIMULATED_SMS", 3)
    q, k, v = outliers(*random_inputs(Shape(2, 300, 200, 4, 2), 128, torch.float16))
    sink = torch.randn(4)
    with simulator.enabled(seed=2):
        out, lse = attention_fp8(q, k, v, causal=True, learnable_sink=sink, return_lse=True)
    assert out.dtype == torch.float16
    instance = "fwd_e4m3_d128_causal_two_level"
    check(instance, q, k, v, out, lse, Recipe.BLOCK64, sink, causal=True)


def test_unused_keys_are_not_read():
    """Head dims and lengths that fill no tile: what lies beside them is not a number."""
    q, k, v = (x[..., :80] for x in random_inputs(Shape(1, 70, 90, 2, 1), 96, torch.bfloat16))
    with simulator.enabled(seed=0):
        out, lse = attention_fp8(q, k, v, return_lse=True)
    check("fwd_e4m3_d96_two_level", q, k, v, out, lse, Recipe.BLOCK64)


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
    columns = stated(tensors[2], recipe, octaves=True, transposed=True).values
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


def test_order_of_keys():
    """V's columns are written as P lies in registers."""
    fragments = pytest.importorskip("hopper_attention.cute_kernels.fragments")
    assert [fragments.interleaved(place) for place in range(16)] == fp8.INTERLEAVED


def test_strided_values_and_no_descales():
    """Rows that TMA cannot address are copied."""
    values = torch.randn(2, 40, 3, 2, 72).to(torch.float8_e4m3fn)[..., :64]
    q, k, v = values.unbind(2)
    with simulator.enabled(seed=0):
        out = flash_attn_func(q, k, v)
        assert torch.equal(out, flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous()))
    check("fwd_e4m3_d64_two_level", *(x.bfloat16() for x in (q, k, v)), out, None, None)


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
    (NotImplementedError, "^out_dtype=torch.float64", {"out_dtype": torch.float64}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), REFUSED_VALUES)
def test_refused_values(error, message, arguments):
    with pytest.raises(error, match=message):
        flash_attn_func(**({"q": E4M3, "k": E4M3, "v": E4M3} | arguments))


def test_descales_of_16_bits_are_refused():
    q = E4M3.bfloat16()
    with pytest.raises(NotImplementedError, match=r"^q_descale: only of dense float8_e4m3fn"):
        flash_attn_func(q, q, q, q_descale=torch.ones(1))


REFUSED = [
    (ValueError, "recipe must be one of", {"recipe": "block32"}),
    (NotImplementedError, "smooth_k", {"smooth_k": True, "softcap": 5.0}),
    (NotImplementedError, "smooth_k", {"smooth_k": True, "learnable_sink": torch.zeros(2)}),
    (TypeError, "hadamard", {"hadamard": 1}),
    (TypeError, "two_level", {"two_level": "yes"}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), REFUSED)
def test_refused(error, message, arguments):
    q, k, v = random_inputs(Shape(1, 8, 8, 2, 1), 64, torch.bfloat16)
    with pytest.raises(error, match=message):
        attention_fp8(q, k, v, **arguments)


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


def test_refused_two_level_of_wide_heads():
    q, k, v = random_inputs(Shape(1, 8, 8, 2, 1), 256, torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"two_level=True.*have up to one of"):
        attention_fp8(q, k, v, two_level=True)


def test_recipes_and_masks_are_all_run():
    """The numbering above leaves no recipe out."""
    used = {RECIPES[(n + i) % len(RECIPES)] for n, i in product(range(len(INSTANCES)), range(2))}
    assert used == set(Recipe)
