"""Differentiating the public functions on CPU tensors: the reference behind them."""

from __future__ import annotations

import pytest
import torch
from support.judge import check_backward
from support.problems import PACKED, Shape, offsets, random_inputs

from hopper_attention import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    reference,
)
from hopper_attention.dispatch import instances
from hopper_attention.launch import backward
from hopper_attention.problem.values import UNBOUNDED, Gradients, Inputs, Lengths, Mask
from hopper_attention.torch_ops.autograd import Attention

MASKS = {
    "full": Mask(),
    "causal": Mask(right=0),
    "window": Mask(left=3, right=2),
    "chunk": Mask(right=0, chunk=4),
}


def doubles(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


@pytest.fixture
def exact(monkeypatch):
    """Attention of q, k, v, sink, queries, keys as autograd sees it, in float64."""

    def attention(*inputs, **problem):
        problem["compute_dtype"] = torch.float64

        def run_forward(_plan, inputs):
            q, k, v, sink, *_ = inputs
            lengths = {"queries": inputs.queries, "keys": inputs.keys}
            return reference.attention(q, k, v, sink=sink, **lengths, **problem)

        def run_backward(_plan, inputs, out, lse, dout, dlse):
            q, k, v, sink, *_ = inputs
            lengths = {"queries": inputs.queries, "keys": inputs.keys}
            found = reference.gradients(
                q, k, v, dout, dlse, out=out, lse=lse, sink=sink, **lengths, **problem
            )
            return Gradients(*found)

        monkeypatch.setattr(backward, "run", run_backward)
        return Attention.apply(None, run_forward, *Inputs.of(*inputs))

    return attention


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(exact, mask, softcap):
    """Rows without keys (causal), grouped heads, sinks, the gradient through LSE."""
    q, k, v, sink = doubles((1, 7, 4, 3), (1, 5, 2, 3), (1, 5, 2, 2), (4,))
    whole = Lengths()
    problem = {"softmax_scale": 0.7, "mask": MASKS[mask], "softcap": softcap}

    def attention(*inputs):
        return exact(*inputs, whole, whole, **problem)

    assert torch.autograd.gradcheck(attention, (q, k, v, sink))


def test_gradcheck_of_packed_sequences(exact):
    q, k, v = doubles((6, 2, 3), (7, 1, 3), (7, 1, 3))
    queries, keys = Lengths(offsets((2, 0, 4))), Lengths(offsets((3, 1, 3)))

    def attention(*inputs):
        out, _ = exact(*inputs, None, queries, keys, softmax_scale=0.5, mask=Mask(right=0))
        return out

    assert torch.autograd.gradcheck(attention, (q, k, v))


@pytest.fixture
def inputs():
    tensors = random_inputs(Shape(2, 33, 49, 4, 2), 64, torch.bfloat16)
    return [x.requires_grad_() for x in tensors]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"causal": True}, {"window_size": (9, 3)}, {"softcap": 3.0}, {"attention_chunk": 16}],
    ids=str,
)
def test_matches_fp64(inputs, arguments):
    out = flash_attn_func(*inputs, **arguments)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, dout)
    check_backward(*inputs, dout, gradients, **arguments)


def test_packed_sequences_match_single_ones():
    lengths_q, lengths_k = zip(*PACKED[0])
    shape = Shape(1, sum(lengths_q), sum(lengths_k), 2, 1)
    q, k, v = (x[0].requires_grad_() for x in random_inputs(shape, 64, torch.bfloat16))
    out = flash_attn_varlen_func(q, k, v, offsets(lengths_q), offsets(lengths_k), None, None)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    rows, keys = slice(64, 177), slice(64, 267)  # the third sequence
    one = (x[None] for x in (q[rows], k[keys], v[keys], dout[rows]))
    check_backward(*one, [g[at][None] for g, at in zip(gradients, (rows, keys, keys))])


def test_only_what_requires_grad_has_one(inputs):
    q, k, v = inputs
    both = torch.autograd.grad(flash_attn_func(q, k, v).sum(), (q, v))
    alone = flash_attn_func(q.detach(), k.detach(), v)
    alone.sum().backward()
    assert torch.equal(v.grad, both[1]) and q.grad is None and k.grad is None


def test_sink_of_another_dtype(inputs):
    sink = torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)
    flash_attn_func(*(x.detach() for x in inputs), learnable_sink=sink).sum().backward()
    assert sink.grad.dtype == torch.bfloat16 and sink.grad.abs().sum() > 0


def test_no_grad_saves_nothing(inputs):
    with torch.no_grad():
        assert flash_attn_func(*inputs).grad_fn is None
    with torch.inference_mode():
        flash_attn_func(*inputs)
    assert flash_attn_func(*(x.detach() for x in inputs)).grad_fn is None


def test_saved_tensors_serve_twice(inputs):
    out = flash_attn_func(*inputs, causal=True)
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out.sum(), inputs)))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), inputs)


def test_no_second_derivative(inputs):
    out = flash_attn_func(*inputs)
    (dq,) = torch.autograd.grad(out.float().square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError):
        dq.sum().backward()


def test_inputs_changed_in_place_are_noticed(inputs):
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs)
    out = flash_attn_func(q, k, v)
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match=r"in-?place"):
        out.sum().backward()


def test_only_lse_is_used(inputs):
    _, lse = flash_attn_func(*inputs, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), inputs)
    zeros = torch.zeros_like(inputs[0])
    check_backward(*inputs, zeros, (dq, dk, dv), dlse=torch.ones_like(lse))
    assert (dv == 0).all()


def test_packed_qkv():
    q, k, v = random_inputs(Shape(1, 20, 20, 4, 2), 64, torch.bfloat16)
    qkv = torch.cat((q, k, v), dim=2).requires_grad_()
    out = flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=4)
    dout = torch.randn_like(out)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    check_backward(q, k, v, dout, dqkv.split([4, 2, 2], dim=2), causal=True)


def test_masks_of_reference_hide_the_same_from_gradients():
    q, k, v = doubles((1, 6, 1, 2), (1, 9, 1, 2), (1, 9, 1, 2))
    mask = Mask(left=1, right=UNBOUNDED)
    dq, dk, dv, _ = reference.gradients(
        q.detach(), k.detach(), v.detach(), torch.ones_like(q), softmax_scale=1.0, mask=mask,
        compute_dtype=torch.float64,
    )  # fmt: skip
    assert (dk[:, :2] == 0).all() and (dv[:, :2] == 0).all() and (dq != 0).all()


def test_workspace_bytes():
    q, v = torch.empty(2, 300, 4, 80, dtype=torch.bfloat16), torch.empty(2, 10, 2, 80)
    rows = 2 * 4 * 384  # whole blocks of 128
    assert backward.workspace_bytes(q, v) == rows * 4 * (96 + 2)
    turns = rows // 64 * 4
    assert backward.workspace_bytes(q, v, deterministic=True) == rows * 4 * (96 + 2) + turns
    packed = backward.workspace_bytes(q[0], v[0], offsets((100, 200)))
    assert packed == 4 * ((300 + 2 * 128) // 128 * 128) * 4 * (96 + 2)


def test_backward_that_does_not_exist_is_refused():
    with pytest.raises(NotImplementedError, match="no backward kernel"):
        instances.backward_instances("bf16", 64, 256 + 8, "full", False, False)
