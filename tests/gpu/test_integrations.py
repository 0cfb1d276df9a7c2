"""Kernels behind PyTorch on hardware: its own attention functions, compiled and captured calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.problems import offsets
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from hopper_attention import enable_sdpa, flash_attn_func, flash_attn_varlen_func
from hopper_attention.launch import forward
from hopper_attention.reference.error import Error

pytestmark = pytest.mark.gpu


@pytest.fixture
def runs(monkeypatch):
    """Counts calls of our forward."""
    count, run = [], forward.run
    monkeypatch.setattr(forward, "run", lambda *args: (count.append(0), run(*args))[1])
    return count


def leaves(*shape, count=3):
    torch.manual_seed(0)
    made = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count))
    return [x.requires_grad_() for x in made]


def judge(ours, theirs, exact):
    for mine, yours, true in zip(ours, theirs, exact, strict=True):
        assert mine.stride() == yours.stride()
        error, other = Error.of(mine, true), Error.of(yours, true)
        assert error.within_twice(other), (error, other)


@pytest.mark.parametrize("causal", [False, True])
def test_sdpa(runs, causal):
    q, k, v = leaves(2, 8, 511, 128)

    def results(*inputs):
        out = F.scaled_dot_product_attention(*inputs, is_causal=causal)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        theirs = results(q, k, v)
    with sdpa_kernel(SDPBackend.MATH):
        exact = results(*(x.detach().double().requires_grad_() for x in (q, k, v)))
    with enable_sdpa():
        ours = results(q, k, v)
        assert len(runs) == 1
        mask = torch.ones(511, 511, dtype=torch.bool, device="cuda")
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        F.scaled_dot_product_attention(q.float(), k.float(), v.float())
        assert len(runs) == 1
    judge(ours, theirs, exact)


def test_varlen_attn(runs):
    lengths = (100, 0, 411)
    q, k, v = leaves(511, 8, 128)
    tensors = (q, k, v, offsets(lengths, "cuda"), offsets(lengths, "cuda"), 411, 411)
    expected = flash_attn_varlen_func(*tensors, causal=True)
    runs.clear()
    with enable_sdpa():
        assert torch.equal(varlen_attn(*tensors, window_size=(-1, 0)), expected)
    assert len(runs) == 1


def test_compiled_with_cuda_graphs():
    """Inductor captures forward and backward; replays read what changed."""

    def loss(q, k, v):
        return flash_attn_func(q * 0.5, k, v, causal=True).float().square().sum()

    compiled = torch.compile(loss, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        inputs = leaves(2, 300, 4, 64)
        with torch.no_grad():
            for x in inputs:
                x.normal_()
        ours = torch.autograd.grad(compiled(*inputs), inputs)
        expected = torch.autograd.grad(loss(*inputs), inputs)
        torch.testing.assert_close(ours, expected)


def test_captured_training_step():
    """Forward and backward in one graph: no allocation outside PyTorch, no wait for the device."""
    q, k, v = leaves(1, 700, 4, 128)

    def step():
        out, lse = flash_attn_func(q, k, v, causal=True, deterministic=True, return_lse=True)
        return torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        q.mul_(0.5)
    graph.replay()
    assert all(map(torch.equal, captured, step()))
