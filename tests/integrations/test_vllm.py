"""vLLM's call: its order of arguments, its `out`, its log-sum-exp, what it refuses."""

from __future__ import annotations

import inspect
from itertools import accumulate

import pytest
import torch
from support.judge import check_packed

import hopper_attention
from hopper_attention import simulator
from hopper_attention.integrations.vllm import flash_attn_varlen_func

VLLM = [
    *("q", "k", "v", "max_seqlen_q", "cu_seqlens_q", "max_seqlen_k", "cu_seqlens_k"),
    *("seqused_k", "q_v", "dropout_p", "softmax_scale", "causal", "window_size", "softcap"),
    *("alibi_slopes", "deterministic", "return_attn_probs", "block_table"),
    *("return_softmax_lse", "out", "scheduler_metadata", "q_descale", "k_descale", "v_descale"),
    *("num_splits", "fa_version", "s_aux", "cp_world_size", "cp_rank", "cp_tot_seqused_k"),
]
LENGTHS = ((5, 9), (1, 12), (0, 3), (7, 7))
HEADS, HEADS_KV, DIM = 4, 2, 64


def starts(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def problem():
    generator = torch.Generator().manual_seed(0)

    def normal(rows, heads):
        return torch.randn(rows, heads, DIM, generator=generator).to(torch.bfloat16)

    queries, keys = zip(*LENGTHS)
    q, k, v = normal(sum(queries), HEADS), normal(sum(keys), HEADS_KV), normal(sum(keys), HEADS_KV)
    return q, k, v, max(queries), starts(queries), max(keys), starts(keys)


def test_signature_is_vllms():
    parameters = inspect.signature(flash_attn_varlen_func).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == VLLM


@pytest.mark.parametrize(
    ("vllm", "ours"),
    [
        ({}, {}),
        ({"causal": True}, {"causal": True}),
        ({"window_size": [3, 1]}, {"window_size": (3, 1)}),
        ({"causal": True, "window_size": [2, -1]}, {"causal": True, "window_size": (2, 0)}),
        ({"softcap": 5.0, "softmax_scale": 0.3}, {"softcap": 5.0, "softmax_scale": 0.3}),
        (
            {"s_aux": torch.tensor([0.0, 1.0, 2.0, -1.0])},
            {"learnable_sink": torch.tensor([0.0, 1.0, 2.0, -1.0])},
        ),
    ],
    ids=lambda a: "-".join(a) or "plain",
)
def test_results_match_fp64(vllm, ours):
    q, k, v, *rest = problem()
    out, lse = flash_attn_varlen_func(q, k, v, *rest, **vllm, return_softmax_lse=True)
    assert lse.shape == (HEADS, q.shape[0]) and lse.dtype == torch.float32
    check_packed(q, k, v, out, lse, LENGTHS, **ours)
    assert torch.equal(flash_attn_varlen_func(q, k, v, *rest, **vllm), out)


def test_out_is_written_in_place():
    q, k, v, *rest = problem()
    expected, lse = flash_attn_varlen_func(q, k, v, *rest, return_softmax_lse=True)
    wide = torch.full((q.shape[0], HEADS, 2 * DIM), 7.0, dtype=q.dtype)
    out = wide[..., :DIM]  # strided: a slice of vLLM's output buffer
    result = flash_attn_varlen_func(q, k, v, *rest, out=out)
    assert result is out and torch.equal(out, expected)
    assert (wide[..., DIM:] == 7.0).all()
    result, result_lse = flash_attn_varlen_func(q, k, v, *rest, out=out, return_softmax_lse=True)
    assert result is out and torch.equal(result_lse, lse)


def test_seqused_k_takes_rows_of_a_batch():
    q, k, v, max_q, starts_q, max_k, _ = problem()
    used = torch.tensor([keys for _, keys in LENGTHS], dtype=torch.int32)
    rows = [
        torch.full((len(LENGTHS), max_k + 2, HEADS_KV, DIM), torch.nan).to(q.dtype) for _ in "kv"
    ]
    for i, (part_k, part_v) in enumerate(zip(k.split(used.tolist()), v.split(used.tolist()))):
        rows[0][i, : used[i]], rows[1][i, : used[i]] = part_k, part_v
    out, lse = flash_attn_varlen_func(
        q, *rows, max_q, starts_q, max_k, seqused_k=used, causal=True, return_softmax_lse=True
    )
    check_packed(q, k, v, out, lse, LENGTHS, causal=True)


def test_what_only_says_how_changes_nothing():
    q, k, v, *rest = problem()
    how = {
        "scheduler_metadata": torch.zeros(8, dtype=torch.int32),
        "num_splits": 16,
        "fa_version": 2,
        "q_descale": torch.ones(4, HEADS_KV),
        "k_descale": torch.ones(4, HEADS_KV),
        "v_descale": torch.ones(4, HEADS_KV),
        "cp_rank": 0,
        "mask_mod": None,
    }
    plain, told = (flash_attn_varlen_func(q, k, v, *rest, **more) for more in ({}, how))
    assert torch.equal(plain, told)


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ({"block_table": torch.zeros(4, 1, dtype=torch.int32)}, ValueError),
        ({"dropout_p": 0.1}, NotImplementedError),
        ({"alibi_slopes": torch.zeros(HEADS)}, NotImplementedError),
        ({"return_attn_probs": True}, NotImplementedError),
        ({"cp_world_size": 2}, NotImplementedError),
        ({"cp_tot_seqused_k": torch.zeros(4)}, NotImplementedError),
        ({"q_v": torch.zeros(1)}, NotImplementedError),
        ({"mask_mod": print}, NotImplementedError),
        ({"cu_seqlens_k": None}, ValueError),
        ({"seqused_k": torch.ones(4, dtype=torch.int32)}, ValueError),
        ({"cu_seqlens_k": torch.tensor([0, 1], dtype=torch.int32)}, ValueError),
        ({"num_splits": -1}, ValueError),
        ({"window_size": [1, 2, 3]}, ValueError),
        ({"s_aux": torch.zeros(3)}, ValueError),
        ({"softmax_scale": "1"}, TypeError),
    ],
    ids=lambda a: next(iter(a)) if isinstance(a, dict) else "",
)
def test_bad_calls_leave_out_alone(argument, error):
    name = next(iter(argument))
    said = {"cu_seqlens_k": "cu_seqlens|sequences", "s_aux": "learnable_sink"}.get(name, name)
    if "block_table" in argument:  # with keys by page, as vLLM gives it
        argument = {**argument, "cu_seqlens_k": None, "seqused_k": torch.ones(4).int()}
        error = NotImplementedError
    q, k, v, max_q, starts_q, max_k, starts_k = problem()
    out = torch.full_like(q, 7.0)
    call = {"cu_seqlens_k": starts_k, "out": out, **argument}
    with pytest.raises(error, match=said):
        flash_attn_varlen_func(q, k, v, max_q, starts_q, max_k, **call)
    assert (out == 7.0).all()


@pytest.mark.parametrize(
    "change", [lambda o: o[1:], lambda o: o.float(), lambda o: [o], lambda o: o.requires_grad_()]
)
def test_an_out_that_does_not_fit_is_refused(change):
    q, k, v, *rest = problem()
    with pytest.raises((ValueError, TypeError), match="out"):
        flash_attn_varlen_func(q, k, v, *rest, out=change(torch.empty_like(q)))


@pytest.mark.simulator
def test_on_the_kernels():
    q, k, v, *rest = problem()
    sinks, out = torch.tensor([0.0, 1.0, 2.0, -1.0]), torch.empty_like(q)
    with simulator.enabled(seed=1):
        out, lse = flash_attn_varlen_func(
            q, k, v, *rest, causal=True, s_aux=sinks, out=out, return_softmax_lse=True
        )
    check_packed(q, k, v, out, lse, LENGTHS, causal=True, learnable_sink=sinks)


@pytest.mark.simulator
def test_fp8_on_the_kernels():
    """Descales other than 1, expanded over the heads of keys as vLLM does."""
    q, k, v, *rest = problem()
    q, k, v = (x.to(torch.float8_e4m3fn) for x in (q, k, v))
    descales = torch.tensor([[0.5], [2.0], [1.0], [0.25]]).expand(len(LENGTHS), HEADS_KV)
    descales = {"q_descale": descales, "k_descale": 1.5 * descales, "v_descale": 0.75 * descales}
    with simulator.enabled(seed=1):
        out, lse = flash_attn_varlen_func(
            q, k, v, *rest, **descales, causal=True, return_softmax_lse=True
        )
    max_q, starts_q, max_k, starts_k = rest
    exact, exact_lse = hopper_attention.flash_attn_varlen_func(  # the reference
        q, k, v, starts_q, starts_k, max_q, max_k, **descales, causal=True, return_lse=True
    )
    assert out.dtype == torch.bfloat16
    error = (out.float() - exact.float()).norm() / exact.float().norm()
    assert error < 0.05, "P is rounded to e4m3"
    assert torch.allclose(lse, exact_lse, atol=1e-2)
