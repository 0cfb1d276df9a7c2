"""Bad input to the public functions: a clear error that names the argument, nothing launched."""

from __future__ import annotations

import pytest
import torch

from hopper_attention import flash_attn_func, reference, runtime, simulator


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
    "head_dim of v": (ValueError, "^v has head_dim 32", (Q, K, V[..., :32])),
    "seqlen of v": (ValueError, "^v has seqlen 15", (Q, K, V[:, :15])),
    "heads of v": (ValueError, "^v has heads 1", (Q, K, V[:, :, :1])),
    "heads do not divide": (ValueError, "^q has 3 heads", (Q[:, :, :3], K, V)),
    "no key heads": (ValueError, "heads", (Q, K[:, :, :0], V[:, :, :0])),
    "last dimension": (ValueError, "^v: the last dimension", (Q, K, V.mT.contiguous().mT)),
    "misaligned pointer": (ValueError, "^q: the data pointer", (misaligned(Q), K, V)),
    "odd row stride": (ValueError, "^k: stride", (Q, odd_stride(K), V)),
    "float32": (NotImplementedError, "^q has dtype", (Q.float(), K.float(), V.float())),
    "head_dim 72": (NotImplementedError, "^head_dim 72.*nearest: 64", tensors(head_dim=72)),
    "head_dim 512": (NotImplementedError, "^head_dim 512.*nearest: 256", tensors(head_dim=512)),
    "requires grad": (NotImplementedError, "^k requires grad", (Q, K.clone().requires_grad_(), V)),
    "meta device": (NotImplementedError, "^q is on meta", [x.to("meta") for x in (Q, K, V)]),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors(case):
    error, message, arguments = WRONG_TENSORS[case]
    with pytest.raises(error, match=message):
        flash_attn_func(*arguments)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (ValueError, {"softmax_scale": 0.0}),
        (ValueError, {"softmax_scale": -1.0}),
        (ValueError, {"softmax_scale": float("nan")}),
        (TypeError, {"softmax_scale": "1"}),
        (ValueError, {"window_size": 3}),
        (ValueError, {"window_size": (1, 2, 3)}),
        (NotImplementedError, {"window_size": (4, 0)}),
        (NotImplementedError, {"window_size": (-1, 3)}),
        (NotImplementedError, {"window_size": (4, -1), "causal": True}),
        (NotImplementedError, {"qv": Q}),
        (NotImplementedError, {"q_descale": torch.ones(1)}),
        (NotImplementedError, {"k_descale": torch.ones(1)}),
        (NotImplementedError, {"v_descale": torch.ones(1)}),
        (NotImplementedError, {"attention_chunk": 64}),
        (NotImplementedError, {"softcap": 30.0}),
        (NotImplementedError, {"learnable_sink": torch.ones(4)}),
        (NotImplementedError, {"num_splits": 2}),
        (NotImplementedError, {"pack_gqa": True}),
        (NotImplementedError, {"sm_margin": 8}),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else value.__name__,
)
def test_wrong_or_unsupported_options(error, arguments):
    with pytest.raises(error, match=next(iter(arguments))):
        flash_attn_func(Q, K, V, **arguments)


def test_gpu_without_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(NotImplementedError, match=r"cuda:7.*A100.*8\.0.*9\.0"):
        runtime.check_gpu(torch.device("cuda", 7))
