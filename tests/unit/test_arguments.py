"""Bad input to the public functions: a clear error that names the argument, nothing launched."""

from __future__ import annotations

import pytest
import torch

from hopper_attention import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    reference,
    simulator,
)
from hopper_attention.dispatch import target
from hopper_attention.launch import runtime


def tensors(batch=1, seqlen=16, heads=4, heads_kv=2, head_dim=64, dtype=torch.bfloat16):
    return (
        torch.randn(batch, seqlen, heads, head_dim).to(dtype),
        torch.randn(batch, seqlen, heads_kv, head_dim).to(dtype),
        torch.randn(batch, seqlen, heads_kv, head_dim).to(dtype),
    )


Q, K, V = tensors()


@pytest.fixture(autouse=True, params=["reference", "simulator"])
def nothing_runs(request, monkeypatch):
    """On either backend: computing anything fails the test."""

    def refuse(*_, **__):
        pytest.fail("the call was not refused before it ran")

    monkeypatch.setattr(reference, "attention", refuse)
    monkeypatch.setattr(runtime, "launch", refuse)
    if request.param == "simulator":
        with simulator.enabled():
            yield
    else:
        yield


def misaligned(x):
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)


def odd_stride(x):
    return torch.empty(*x.shape[:-1], x.shape[-1] + 1, dtype=x.dtype)[..., :-1]


WRONG_TENSORS = {
    "not a tensor": (TypeError, "^k: ", (Q, [1.0], V)),
    "dtype of v": (ValueError, "^v has dtype", (Q, K, V.half())),
    "device of k": (ValueError, "^k is on meta", (Q, K.to("meta"), V)),
    "rank of q": (ValueError, "^q has shape", (Q[0], K, V)),
    "batch of k": (ValueError, "^k has batch 2", (Q, K.repeat(2, 1, 1, 1), V)),
    "head_dim of k": (ValueError, "^k has head_dim 32", (Q, K[..., :32], V)),
    "seqlen of v": (ValueError, "^v has seqlen 15", (Q, K, V[:, :15])),
    "heads of v": (ValueError, "^v has heads 1", (Q, K, V[:, :, :1])),
    "heads do not divide": (ValueError, "^q has 3 heads", (Q[:, :, :3], K, V)),
    "no key heads": (ValueError, "heads", (Q, K[:, :, :0], V[:, :, :0])),
    "last dimension": (ValueError, "^v: the last dimension", (Q, K, V.mT.contiguous().mT)),
    "misaligned pointer": (ValueError, "^q: the data pointer", (misaligned(Q), K, V)),
    "odd row stride": (ValueError, "^k: stride", (Q, odd_stride(K), V)),
    "float32": (NotImplementedError, "^q has dtype", (Q.float(), K.float(), V.float())),
    "head_dim 76": (NotImplementedError, "^head_dim 76 of q.*nearest: 80", tensors(head_dim=76)),
    "head_dim 512": (NotImplementedError, "^head_dim 512.*nearest: 256", tensors(head_dim=512)),
    "head_dim 0": (NotImplementedError, "^head_dim 0 ", tensors(head_dim=0)),
    "head_dim_v 60": (NotImplementedError, "^head_dim 60 of v", (Q, K, V[..., :60])),
    "too long": (
        ValueError,
        "^k has shape",
        (Q, *(x[:, :1].expand(1, 2**30, 2, 64) for x in (K, V))),
    ),
    "sparse": (ValueError, "^k: expected a plain", (Q, K.to_sparse(), V)),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors(case):
    error, message, arguments = WRONG_TENSORS[case]
    with pytest.raises(error, match=message):
        flash_attn_func(*arguments)


WRONG_OUT = {
    "not a tensor": (TypeError, "^out: expected", [1.0]),
    "shape": (ValueError, "^out has shape", Q[:, :5].clone()),
    "dtype": (ValueError, "^out has dtype", Q.float()),
    "device": (ValueError, "^out is on meta", Q.to("meta")),
    "requires grad": (ValueError, "^out requires grad", Q.clone().requires_grad_()),
    "expanded": (ValueError, "^out overlaps itself", Q[:, :1].clone().expand(-1, 16, -1, -1)),
    "folded": (
        ValueError,
        "^out overlaps itself",
        torch.ones(9000).bfloat16().as_strided((1, 16, 4, 64), (4096, 256, 56, 1)),
    ),
    "q": (ValueError, "^out overlaps q", Q),
    "part of k": (ValueError, "^out overlaps k", None),
    "odd row stride": (ValueError, "^out: stride", odd_stride(Q).zero_()),
    "last dimension": (ValueError, "^out: the last dimension", Q.mT.contiguous().mT),
}


@pytest.mark.parametrize("case", WRONG_OUT)
def test_wrong_out(case):
    error, message, out = WRONG_OUT[case]
    k = K
    if case == "part of k":
        room = torch.ones(3 * K.numel()).bfloat16()
        k, out = room[: K.numel()].view(K.shape), room[8 : 8 + Q.numel()].view(Q.shape)
    before = out.detach().clone() if isinstance(out, torch.Tensor) else out
    with pytest.raises(error, match=message):
        flash_attn_func(Q, k, V, out=out)
    if isinstance(out, torch.Tensor) and out.is_cpu:
        assert torch.equal(out, before)


def test_out_beside_its_inputs(monkeypatch):
    """Columns of the same rows are memory of their own; shared ones are not."""
    monkeypatch.undo()  # this one runs
    wide = torch.randn(2, 16, 12, 64).bfloat16()
    q, k, v, out = wide[:, :, :4], wide[:, :, 4:6], wide[:, :, 6:8], wide[:, :, 8:]
    expected = flash_attn_func(q, k, v)
    assert torch.equal(flash_attn_func(q, k, v, out=out), expected)
    with pytest.raises(ValueError, match=r"^out overlaps v"):
        flash_attn_func(q, k, v, out=wide[:, :, 7:11])


def test_out_has_no_gradient():
    q = Q.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=r"^out: not differentiable"):
        flash_attn_func(q, K, V, out=torch.empty_like(Q))


OPTIONS = [
    (ValueError, {"softmax_scale": 0.0}),
    (ValueError, {"softmax_scale": -1.0}),
    (ValueError, {"softmax_scale": float("nan")}),
    (TypeError, {"softmax_scale": "1"}),
    (ValueError, {"window_size": 3}),
    (ValueError, {"window_size": (1, 2, 3)}),
    (TypeError, {"window_size": ("a", 2)}),
    (ValueError, {"attention_chunk": -1}),
    (TypeError, {"attention_chunk": 2.5}),
    (TypeError, {"attention_chunk": True}),
    (TypeError, {"attention_chunk": torch.tensor(8)}),
    (TypeError, {"causal": "no"}),
    (TypeError, {"causal": torch.tensor([True, False])}),
    (TypeError, {"deterministic": "x"}),
    (TypeError, {"return_attn_probs": torch.ones(2)}),
    (TypeError, {"return_lse": 1.0}),
    (ValueError, {"window_size": (-5, 3)}),
    (TypeError, {"window_size": (2.7, 3)}),
    (TypeError, {"window_size": (True, 3)}),
    (TypeError, {"window_size": (float("inf"), 0)}),
    (ValueError, {"window_size": "12"}),
    (ValueError, {"window_size": torch.tensor([3, 4])}),
    (ValueError, {"softmax_scale": 1e-46}),
    (ValueError, {"softmax_scale": 10**400}),
    (TypeError, {"softmax_scale": True}),
    (TypeError, {"softcap": ""}),
    (TypeError, {"softcap": torch.ones(2)}),
    (ValueError, {"softcap": 1e6}),
    (ValueError, {"learnable_sink": torch.full((4,), torch.inf)}),
    (ValueError, {"learnable_sink": torch.full((4,), -2e38)}),
    (ValueError, {"learnable_sink": torch.ones(4).to_sparse()}),
    (ValueError, {"softcap": -1.0}),
    (ValueError, {"softcap": float("inf")}),
    (TypeError, {"softcap": "30"}),
    (TypeError, {"learnable_sink": [0.0] * 4}),
    (ValueError, {"learnable_sink": torch.ones(3)}),
    (ValueError, {"learnable_sink": torch.ones(4, dtype=torch.int32)}),
    (ValueError, {"learnable_sink": torch.ones(4, device="meta")}),
    (NotImplementedError, {"qv": Q}),
    (NotImplementedError, {"q_descale": torch.ones(1)}),
    (NotImplementedError, {"k_descale": torch.ones(1)}),
    (NotImplementedError, {"v_descale": torch.ones(1)}),
    (NotImplementedError, {"num_splits": 2}),
    (NotImplementedError, {"out_dtype": torch.float16}),
    (NotImplementedError, {"out_dtype": torch.float64}),
    (TypeError, {"out_dtype": "float32"}),
    (ValueError, {"sm_margin": -1}),
    (ValueError, {"sm_margin": 101}),
    (TypeError, {"sm_margin": 1.5}),
    (TypeError, {"sm_margin": None}),
    (TypeError, {"num_splits": "1"}),
    (TypeError, {"pack_gqa": "yes"}),
]


@pytest.mark.parametrize(
    ("error", "arguments"), OPTIONS, ids=lambda x: getattr(x, "__name__", None)
)
def test_wrong_or_unsupported_options(error, arguments):
    cu_seqlens = torch.tensor([0, 16], dtype=torch.int32)
    packed = (Q[0], K[0], V[0], cu_seqlens, cu_seqlens, 16, 16)
    for function, inputs in ((flash_attn_func, (Q, K, V)), (flash_attn_varlen_func, packed)):
        with pytest.raises(error, match=next(iter(arguments))):
            function(*inputs, **arguments)


def int32(*values, **options):
    return torch.tensor(values, dtype=torch.int32, **options)


def packed(**changes):
    """A valid call of flash_attn_varlen_func, with some arguments changed."""
    two = int32(0, 7, 16)
    call = {
        "q": Q[0],
        "k": K[0],
        "v": V[0],
        "cu_seqlens_q": two,
        "cu_seqlens_k": two,
        "max_seqlen_q": 16,
        "max_seqlen_k": 16,
    }
    return call | changes


WRONG_SEQUENCES = {
    "q with a batch": (ValueError, "^q has shape", packed(q=Q)),
    "q without cu_seqlens": (ValueError, "^q has shape", packed(cu_seqlens_q=None)),
    "k without cu_seqlens": (ValueError, "^k has shape", packed(cu_seqlens_k=None)),
    "total of v": (ValueError, "^v has total 15", packed(v=V[0, :15])),
    "no list": (TypeError, "^cu_seqlens_q", packed(cu_seqlens_q=[0, 16])),
    "not from 0": (ValueError, "^cu_seqlens_q must", packed(cu_seqlens_q=int32(1, 7, 16))),
    "int64": (ValueError, "^cu_seqlens_k has dtype", packed(cu_seqlens_k=int32(0, 7, 16).long())),
    "rank": (ValueError, "^cu_seqlens_q", packed(cu_seqlens_q=int32(0, 7, 16)[None])),
    "empty": (ValueError, "^cu_seqlens_q", packed(cu_seqlens_q=int32())),
    "batches differ": (ValueError, "^cu_seqlens_k has 1 seq", packed(cu_seqlens_k=int32(0, 16))),
    "strided": (ValueError, "contiguous", packed(cu_seqlens_q=int32(0, 1, 7, 9, 16, 9)[::2])),
    "device": (ValueError, "^cu_seqlens_k is on", packed(cu_seqlens_k=int32(0, 7, 16).to("meta"))),
    "descending": (ValueError, "^cu_seqlens_q must", packed(cu_seqlens_q=int32(0, 9, 7))),
    "negative": (ValueError, "^cu_seqlens_q must", packed(cu_seqlens_q=int32(-1, 7, 16))),
    "beyond the end": (ValueError, "^cu_seqlens_k must", packed(cu_seqlens_k=int32(0, 7, 17))),
    "seqused type": (TypeError, "^seqused_q", packed(seqused_q=[1, 2])),
    "seqused size": (ValueError, "^seqused_k has shape", packed(seqused_k=int32(1, 2, 3))),
    "seqused too long": (ValueError, "^seqused_k must", packed(seqused_k=int32(8, 2))),
    "seqused negative": (ValueError, "^seqused_q must", packed(seqused_q=int32(-1, 2))),
    "max_seqlen": (TypeError, "^max_seqlen_q", packed(max_seqlen_q="16")),
    "negative max_seqlen": (ValueError, "^max_seqlen_k", packed(max_seqlen_k=-5)),
    "max_seqlen tensor": (ValueError, "^max_seqlen_k", packed(max_seqlen_k=torch.ones(3))),
}


@pytest.mark.parametrize("case", WRONG_SEQUENCES)
def test_wrong_sequences(case):
    error, message, call = WRONG_SEQUENCES[case]
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(**call)


@pytest.mark.parametrize(
    ("qkv", "num_heads_q"),
    [
        ([1.0], None),
        (torch.zeros(1, 16, 4, 2, 64, dtype=torch.bfloat16), None),
        (torch.zeros(1, 16, 6, 64, dtype=torch.bfloat16), None),
        (torch.zeros(1, 16, 7, 64, dtype=torch.bfloat16), 4),
        (torch.zeros(1, 16, 4, 64, dtype=torch.bfloat16), 4),
        (torch.zeros(1, 16, 6, 64, dtype=torch.bfloat16), 0),
    ],
    ids=["list", "four", "rank", "odd", "no keys", "no queries"],
)
def test_wrong_packed_qkv(qkv, num_heads_q):
    with pytest.raises((TypeError, ValueError), match=r"^qkv|^num_heads_q"):
        flash_attn_qkvpacked_func(qkv, num_heads_q=num_heads_q)


def test_gpu_without_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(NotImplementedError, match=r"cuda:7.*T4.*7\.5.*9\.0.*reference"):
        target.check_gpu(torch.device("cuda", 7))


def test_equal_calls_are_checked_anew():
    """Nothing that was decided for one call holds for another one with a changed argument."""
    with pytest.raises(pytest.fail.Exception, match="not refused"):
        flash_attn_func(Q, K, V, attention_chunk=4)
    for wrong in (4.0, torch.tensor(4)):
        with pytest.raises(TypeError, match="attention_chunk"):
            flash_attn_func(Q, K, V, attention_chunk=wrong)
