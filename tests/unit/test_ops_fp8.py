"""The FP8 operators as PyTorch's compilers and modes see them, on CPU tensors."""

from __future__ import annotations

import pytest
import torch
from support.problems import offsets
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from hopper_attention import attention_fp8, flash_attn_func, flash_attn_varlen_func
from hopper_attention.problem.quantization import Fp8Options
from hopper_attention.problem.values import (
    Descales,
    Inputs,
    Options,
    PrecisionOptions,
    SequenceBounds,
)
from hopper_attention.torch_ops import fp8

ATTENTION = torch.ops.hopper_attention.attention_fp8.default
FORWARD = torch.ops.hopper_attention.forward_fp8.default
PLAIN = Options.of(causal=True)
TREATMENT = Fp8Options("block64", True, None, 1, True, None, None)


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()


def leaves(packed=False):
    """GQA, V of another head dim, more keys than queries."""
    shapes = ((2, 17, 4, 64), (2, 70, 2, 64), (2, 70, 2, 48))
    shapes = [(b * s, *rest) if packed else (b, s, *rest) for b, s, *rest in shapes]
    return [torch.randn(*shape).bfloat16().requires_grad_() for shape in shapes]


def narrow(*tensors):
    return [x.detach().to(torch.float8_e4m3fn) for x in tensors]


def test_lse_is_corrected_only_if_it_is_asked_for(monkeypatch):
    """That costs a pass over q."""
    q, k, v = torch.randn(3, 1, 64, 2, 64).bfloat16()
    expected = attention_fp8(q, k, v, smooth_k=True, return_lse=True)[0]
    monkeypatch.setattr(fp8, "_scores_of", lambda *_: pytest.fail("lse was corrected"))
    assert torch.equal(attention_fp8(q, k, v, smooth_k=True), expected)


def test_opcheck():
    """Schema, fake strides, autograd registration, AOT dispatch with dynamic shapes."""
    opcheck(ATTENTION, (*leaves(), *[None] * 5, *PLAIN, *TREATMENT))


def test_opcheck_of_packed_sequences():
    index = (offsets((3, 0, 31)), offsets((70, 5, 65)), None, None)
    treatment = TREATMENT._replace(bound_q=31, bound_k=70)
    opcheck(ATTENTION, (*leaves(packed=True), None, *index, *PLAIN, *treatment))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float8_e4m3fn])
def test_opcheck_of_quantised_tensors(dtype):
    descales = (torch.rand(2, 2), torch.rand(2, 2, 2), torch.rand(1))
    last = torch.rand(1) if dtype == torch.float8_e4m3fn else None
    options = PLAIN._replace(out_dtype=dtype)
    tensors = narrow(*leaves())
    bounds, precision = SequenceBounds(), PrecisionOptions()
    arguments = (*tensors, *[None] * 5, *descales, last, *options, *bounds, *precision)
    # The others compare tensors, which PyTorch cannot in FP8.
    opcheck(FORWARD, arguments, test_utils=("test_autograd_registration", "test_faketensor"))


def test_schemas_are_the_tuples():
    names = [argument.name for argument in ATTENTION._schema.arguments]
    assert tuple(names) == Inputs._fields + Options._fields + Fp8Options._fields
    names = [argument.name for argument in FORWARD._schema.arguments]
    groups = (Inputs, Descales, Options, SequenceBounds, PrecisionOptions)
    assert names == [name for group in groups for name in group._fields]


def trained(q, k, v):
    out, lse = attention_fp8(
        q * 1.0, k, v, recipe="per_head", hadamard=True, smooth_k=True, causal=True, return_lse=True
    )
    return out.float().sin().sum() + lse.cos().sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training_compiles_without_graph_breaks(backend):
    qkv = leaves()
    expected = trained(*qkv)
    actual = torch.compile(trained, fullgraph=True, backend=backend)(*qkv)
    # Inductor takes the mean off K without rounding in between.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    gradients, others = (torch.autograd.grad(loss, qkv) for loss in (actual, expected))
    torch.testing.assert_close(gradients, others, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("exact_softmax", [True, False])
def test_quantised_tensors_compile(exact_softmax, monkeypatch):
    q, k, v = narrow(*leaves())
    scale, seen = torch.tensor([0.5]), []
    run_it = fp8.descale_and_attend

    def recording(*arguments):
        seen.extend(x for x in arguments if isinstance(x, PrecisionOptions))
        return run_it(*arguments)

    monkeypatch.setattr(fp8, "descale_and_attend", recording)

    def run(q, k, v):
        return flash_attn_func(
            q, k, v, causal=True, q_descale=scale, v_descale=scale, exact_softmax=exact_softmax
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), run(q, k, v))
    assert seen and all(one.exact_softmax is exact_softmax for one in seen)


def test_operators_check_precision():
    tensors = (*narrow(*leaves()), *[None] * 5, *[None] * 4, *PLAIN, None, None)
    for precision, message in (((None, 3, True), "power of two"), ((False, 2, True), "flushed")):
        with pytest.raises(ValueError, match=message):
            FORWARD(*tensors, *precision)


def test_packed_sequences_compile_for_all_totals():
    def run(q, k, v, cu_seqlens, longest):
        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for stance, lengths in (("default", (5, 8)), ("fail_on_recompile", (3, 0, 9, 4))):
        tensors = narrow(*(torch.randn(sum(lengths), 2, 64) for _ in "qkv"))
        with torch.compiler.set_stance(stance):
            out = compiled(*tensors, offsets(lengths), max(lengths))
        assert torch.equal(out, run(*tensors, offsets(lengths), max(lengths)))


def test_packed_keys_without_their_mean_compile():
    qkv, index = leaves(packed=True), (offsets((3, 0, 31)), offsets((70, 5, 65)))

    def run(q, k, v, at_q, at_k):
        return attention_fp8(
            q, k, v, smooth_k=True, cu_seqlens_q=at_q, cu_seqlens_k=at_k, return_lse=True
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*qkv, *index), run(*qkv, *index), strict=True):
        torch.testing.assert_close(actual, expected)


def test_derivatives_of_quantised_tensors_are_refused():
    q, k, v = narrow(*leaves())
    for name in ("learnable_sink", "q_descale"):
        value = torch.ones(4 if name == "learnable_sink" else 1)
        with pytest.raises(NotImplementedError, match=f"^{name} requires grad"):
            flash_attn_func(q, k, v, **{name: value.requires_grad_()})
        with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
            torch.func.jvp(
                lambda x, name=name: flash_attn_func(q, k, v, **{name: x}).float(),
                (value.detach(),), (value.detach(),),
            )  # fmt: skip


META_REFUSED = [
    (ValueError, "q has 3 heads", {"q": (2, 17, 3, 64)}),
    (NotImplementedError, "head_dim 24", {"q": (2, 17, 4, 24), "k": (2, 70, 2, 24)}),
    (NotImplementedError, "out_dtype=torch.float64", {"out_dtype": torch.float64}),
]


@pytest.mark.parametrize(("error", "message", "changes"), META_REFUSED)
def test_tensors_without_data_are_checked(error, message, changes):
    shapes = {"q": (2, 17, 4, 64), "k": (2, 70, 2, 64), "v": (2, 70, 2, 48)}
    out_dtype = changes.get("out_dtype")
    tensors = [
        torch.empty(changes.get(name, shape), device="meta").to(torch.float8_e4m3fn)
        for name, shape in shapes.items()
    ]
    with pytest.raises(error, match=message):
        flash_attn_func(*tensors, out_dtype=out_dtype)


def test_flops():
    qkv = leaves()
    with FlopCounterMode(display=False) as plain, torch.no_grad():
        flash_attn_func(*qkv)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        attention_fp8(*qkv)
        flash_attn_func(*narrow(*qkv))
    assert counter.get_total_flops() == 2 * plain.get_total_flops() > 0


@pytest.mark.parametrize("quantised", [False, True], ids=["bf16", "e4m3"])
def test_a_given_out_compiles(quantised):
    tensors = [x.detach() for x in leaves()]
    tensors = narrow(*tensors) if quantised else tensors

    def run(q, k, v, out):
        return flash_attn_func(q, k, v, out=out)

    out = torch.empty(2, 17, 4, 48).bfloat16()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    compiled(*tensors, out)
    assert torch.equal(out, flash_attn_func(*tensors))


def test_autocast():
    q, k, v = (x.detach().float() for x in leaves())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention_fp8(q, k, v)
    assert torch.equal(out, attention_fp8(*(x.bfloat16() for x in (q, k, v))))


def test_the_operator_has_qs_dtype():
    options = PLAIN._replace(out_dtype=torch.float32)
    with pytest.raises(NotImplementedError, match=r"^out_dtype: attention_fp8's is q's"):
        ATTENTION(*leaves(), *[None] * 5, *options, *TREATMENT)


BLOCKS = torch.ones(2, 2, 2)
NO_EXPONENTIALS_REFUSED = {
    "windows": (NotImplementedError, "windows, chunks or softcap", {"window_size": (5, 0)}),
    "softcap": (NotImplementedError, "windows, chunks or softcap", {"softcap": 30.0}),
    "no_flag": (TypeError, "exact_softmax", {"exact_softmax": 0}),
    "blocks": (NotImplementedError, "v_descale has 2 blocks", {"v_descale": BLOCKS}),
    "head_dim": (NotImplementedError, "no forward_fp8 kernel.*nearest: 128/128", {"dim": 192}),
    "e5m2": (NotImplementedError, "v is float8_e5m2", {"v": torch.float8_e5m2}),
    "bf16": (NotImplementedError, "only of FP8 tensors", {"all": torch.bfloat16}),
}


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    list(NO_EXPONENTIALS_REFUSED.values()),
    ids=list(NO_EXPONENTIALS_REFUSED),
)
def test_what_has_no_kernel_without_exponentials_is_refused(error, message, changes):
    """Nothing is written, and the message says what to use instead."""
    call = {"exact_softmax": False, **changes}
    dim, dtype = call.pop("dim", 64), call.pop("all", torch.float8_e4m3fn)
    q, k, v = (torch.randn(2, 70, 2, dim).to(dtype) for _ in "qkv")
    v = v.to(torch.bfloat16).to(call.pop("v", dtype))
    out = torch.full((2, 70, 2, dim), 7.0).bfloat16()
    with pytest.raises(error, match=message):
        flash_attn_func(q, k, v, out=out, **call)
    assert (out == 7).all()


def test_without_exponentials_v_has_one_scale_a_head():
    """Whatever the recipe is for q and k: blocks of V cannot be taken from P."""
    assert (
        Fp8Options.of("block64", False, None, 1, False, None, None).recipe_of_values == "per_head"
    )
    assert TREATMENT.recipe_of_values == "block64"
    per_tensor = Fp8Options.of("per_tensor", False, None, 1, False, None, None)
    assert per_tensor.recipe_of_values == "per_tensor"
    q, k, v = (x.detach() for x in leaves())
    assert attention_fp8(q, k, v, exact_softmax=False).isfinite().all()  # the reference
    with pytest.raises(TypeError, match="exact_softmax"):
        attention_fp8(q, k, v, exact_softmax=None)
