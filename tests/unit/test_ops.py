"""The operators as PyTorch's compilers, modes and transforms see them, on CPU tensors."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from support.problems import offsets
from torch.autograd import forward_ad
from torch.distributed.tensor import Shard
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from hopper_attention import flash_attn_func, flash_attn_varlen_func, simulator
from hopper_attention.problem.values import Inputs, Options, ResultsAndGradients
from hopper_attention.torch_ops import dtensor
from hopper_attention.torch_ops.attention import forward

FORWARD = torch.ops.hopper_attention.forward.default
BACKWARD = torch.ops.hopper_attention.backward.default


def leaf(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape).to(dtype).requires_grad_()


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()


@pytest.fixture
def qkv():
    """GQA, V of another head dim, more keys than queries."""
    return leaf(2, 17, 4, 64), leaf(2, 19, 2, 64), leaf(2, 19, 2, 48)


def options(**changes):
    return Options.of()._replace(**changes)


def packed_tensors(cu_seqlens_q=(0, 7, 7, 17), cu_seqlens_k=(0, 9, 10, 19), seqused_k=(5, 1, 9)):
    index = (cu_seqlens_q, cu_seqlens_k, None, seqused_k)
    lengths = [None if x is None else torch.tensor(x, dtype=torch.int32) for x in index]
    return [leaf(17, 4, 64), leaf(19, 2, 64), leaf(19, 2, 64), torch.randn(4), *lengths]


DENSE = [None] * 5


@pytest.mark.parametrize(
    ("changes", "sink"),
    [
        ({"causal": True}, True),
        ({"window_left": 3, "softcap": 5.0}, False),
        ({"attention_chunk": 4, "softmax_scale": 0.3, "deterministic": True}, False),
    ],
)
def test_opcheck(qkv, changes, sink):
    """Schema, fake strides, autograd registration, AOT dispatch with dynamic shapes."""
    scores = leaf(4, dtype=torch.float32) if sink else None
    arguments = (*qkv, scores, *DENSE[1:], *options(**changes))
    opcheck(FORWARD, arguments)
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    out, lse = FORWARD(*arguments)
    opcheck(BACKWARD, (torch.randn_like(out), None, out, lse, *arguments))
    opcheck(BACKWARD, (torch.randn_like(out), torch.randn_like(lse), out, lse, *arguments))


def test_opcheck_of_packed_sequences():
    arguments = [*packed_tensors(), *options(max_seqlen_q=10, causal=True)]
    opcheck(FORWARD, tuple(arguments))
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    out, lse = FORWARD(*arguments)
    opcheck(BACKWARD, (torch.randn_like(out), None, out, lse, *arguments))
    arguments[-3] = torch.float32
    opcheck(FORWARD, tuple(arguments))


def test_schemas_are_the_tuples():
    names = [argument.name for argument in FORWARD._schema.arguments]
    assert tuple(names) == Inputs._fields + Options._fields
    names = [argument.name for argument in BACKWARD._schema.arguments]
    assert tuple(names) == ResultsAndGradients._fields + Inputs._fields + Options._fields


def attention_loss(q, k, v, sink=None, causal=True):
    out, lse = flash_attn_func(
        q * 1.0, k, v, causal=causal, window_size=(9, -1), learnable_sink=sink, return_lse=True
    )
    return out.float().sin().sum() + lse.cos().sum()


def packed_loss(q, k, v, cu_seqlens, max_seqlen):
    out = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True
    )
    return out.float().square().sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_graph_breaks(qkv, backend):
    leaves = (*qkv, leaf(4, dtype=torch.float32))
    compiled = torch.compile(attention_loss, fullgraph=True, backend=backend)
    expected, actual = attention_loss(*leaves), compiled(*leaves)
    torch.testing.assert_close(actual, expected)
    gradients = torch.autograd.grad(actual, leaves)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_of_dynamic_shapes(backend):
    """One graph for all totals, numbers of sequences and bounds."""
    compiled = torch.compile(packed_loss, fullgraph=True, backend=backend, dynamic=True)
    stances = ("default", "fail_on_recompile", "fail_on_recompile")
    for stance, lengths in zip(stances, ((5, 8), (3, 0, 9, 4), (6, 2, 7)), strict=True):
        total = sum(lengths)
        leaves = leaf(total, 4, 64), leaf(total, 2, 64), leaf(total, 2, 64)
        expected = packed_loss(*leaves, offsets(lengths), max(lengths))
        with torch.compiler.set_stance(stance):
            actual = compiled(*leaves, offsets(lengths), max(lengths))
        torch.testing.assert_close(actual, expected)
        gradients = torch.autograd.grad(actual, leaves)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, leaves))


def test_compile_without_gradients_and_other_scalars(qkv):
    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def compiled(q, k, v, scale, left):
        return flash_attn_func(q, k, v, scale, window_size=(left, 2), softcap=2.0)

    with torch.no_grad():
        for scale, left in ((0.1, 3), (0.2, 5), (None, -1)):
            expected = flash_attn_func(*qkv, scale, window_size=(left, 2), softcap=2.0)
            assert torch.equal(compiled(*qkv, scale, left), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_attn_func(q, k, v, causal=True)

    q, k, v = torch.randn(3, 2, 17, 4, 64).bfloat16()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    shapes = ({1: tokens}, {1: tokens}, {1: tokens})
    program = torch.export.export(Layer(), (q, k, v), dynamic_shapes=shapes, strict=strict)
    assert [n.target for n in program.graph.nodes if n.op == "call_function"][:1] == [FORWARD]
    longer = [torch.cat([x, x], dim=1) for x in (q, k, v)]
    assert torch.equal(program.module()(*longer), flash_attn_func(*longer, causal=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(qkv, reentrant):
    expected = torch.autograd.grad(attention_loss(*qkv), qkv)
    loss = checkpoint(attention_loss, *qkv, use_reentrant=reentrant)
    gradients = [torch.zeros(())] * 3
    if reentrant:
        loss.backward()
        gradients = [x.grad for x in qkv]
    else:
        gradients = torch.autograd.grad(loss, qkv)
    assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize(("kept", "runs"), [([], 2), ([FORWARD], 1)])
def test_selective_checkpointing(monkeypatch, qkv, kept, runs):
    """The forward runs once if checkpointing keeps attention, else twice."""
    count, run = [], forward.run
    monkeypatch.setattr(forward, "run", lambda *args: (count.append(0), run(*args))[1])
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    loss = checkpoint(attention_loss, *qkv, use_reentrant=False, context_fn=contexts)
    gradients = torch.autograd.grad(loss, qkv)
    assert len(count) == runs
    assert all(map(torch.equal, gradients, torch.autograd.grad(attention_loss(*qkv), qkv)))


def test_no_second_derivatives(qkv):
    """Refused through the operator as through plain calls; never silently zero."""
    arguments = (*qkv, *DENSE, *options())
    for out in (FORWARD(*arguments)[0], flash_attn_func(*qkv)):
        (gradient,) = torch.autograd.grad(out.sum(), qkv[:1], create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            gradient.sum().backward()


def test_float32_results_have_no_gradient(qkv):
    with pytest.raises(NotImplementedError, match="out_dtype"):
        FORWARD(*qkv, *DENSE, *options(out_dtype=torch.float32))


def sdpa_flops(q, k, v, backward=False):
    """PyTorch counts so many operations for its own attention."""
    with FlopCounterMode(display=False) as counter:
        q, k, v = (x.transpose(1, 2).to("meta").requires_grad_(backward) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = q @ k.mT
        out = scores @ v
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


def test_flops(qkv):
    q, k, v = (x.detach() for x in qkv)
    with FlopCounterMode(display=False) as counter:
        flash_attn_func(q, k, v, causal=True)
    assert counter.get_total_flops() == sdpa_flops(q, k, v)
    with FlopCounterMode(display=False) as counter:
        attention_loss(*qkv).backward()
    recomputed_scores = 2 * 2 * 4 * 17 * 19 * 64
    assert counter.get_total_flops() == sdpa_flops(q, k, v, backward=True) + recomputed_scores


def test_flops_of_packed_sequences():
    q, k, v = (torch.randn(12, 2, 64).bfloat16() for _ in range(3))
    cu_seqlens = offsets((3, 9))
    with FlopCounterMode(display=False) as counter:
        flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 9, 9)
    assert counter.get_total_flops() == 2 * 2 * 64 * 2 * (3 * 3 + 9 * 9)
    meta = [x.to("meta") for x in (q, k, v, cu_seqlens, cu_seqlens)]
    with FlopCounterMode(display=False) as counter:
        flash_attn_varlen_func(*meta, 9, 9)
    assert counter.get_total_flops() == 2 * 2 * 64 * 2 * 2 * 12 * 12  # at most


def test_meta_tensors(qkv):
    out, lse = flash_attn_func(*(x.to("meta") for x in qkv), return_lse=True)
    assert out.is_meta
    assert (out.shape, out.dtype) == ((2, 17, 4, 48), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 17), torch.float32)
    with pytest.raises(ValueError, match=r"^k has head_dim"):
        flash_attn_func(*(x.to("meta") for x in (qkv[0], qkv[1][..., :32], qkv[2])))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled):
    """float32 inputs take autocast's dtype, as in PyTorch's own attention; gradients do not."""
    q, k, v = (leaf(1, 9, 2, 64, dtype=torch.float32) for _ in range(3))
    attention = flash_attn_func
    if compiled:
        attention = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, flash_attn_func(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    out.sum().backward()
    assert q.grad.dtype == torch.float32
    with pytest.raises(NotImplementedError, match=r"^q has dtype torch.float32"):
        flash_attn_func(q, k, v)


def test_negated_views(qkv):
    q, k, v = (x.detach() for x in qkv)
    assert torch.equal(flash_attn_func(torch._neg_view(q), k, v), flash_attn_func(-q, k, v))


def test_profiler_shows_operators(qkv):
    with torch.profiler.profile() as profile:
        attention_loss(*qkv).backward()
    names = {event.key for event in profile.key_averages()}
    assert {"hopper_attention::forward", "hopper_attention::backward"} <= names


WATCHERS = {
    "jit.trace": lambda f, *x: torch.jit.trace(f, x, check_trace=False)(*x),
    "make_fx": lambda f, *x: make_fx(f)(*x)(*x),
    "make_fx before dispatch": lambda f, *x: make_fx(f, pre_dispatch=True)(*x)(*x),
}


@pytest.mark.parametrize("watcher", WATCHERS)
def test_what_is_traced_is_the_operator(monkeypatch, qkv, watcher):
    """Not what an eager call does instead, of which kernels are no part."""
    inputs = [x.detach() for x in qkv]
    expected = flash_attn_func(*inputs)
    count, run = [], forward.run
    monkeypatch.setattr(forward, "run", lambda *args: (count.append(0), run(*args))[1])

    def attention(q, k, v):
        return flash_attn_func(q, k, v)

    assert torch.equal(WATCHERS[watcher](attention, *inputs), expected)
    assert len(count) == 2


def test_forward_derivatives_are_refused(qkv):
    q, k, v = (x.detach() for x in qkv)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        flash_attn_func(forward_ad.make_dual(q, torch.ones_like(q)), k, v)


def test_sink_of_another_class(qkv):
    """Its memory is not where a tensor's is: a call must not go on without it."""
    q, k, v = (x.detach() for x in qkv)
    sink = torch.randn(4)
    out = flash_attn_func(q, k, v, learnable_sink=TwoTensor(sink, sink))
    assert torch.equal(out.a, flash_attn_func(q, k, v, learnable_sink=sink))


def test_out_is_known_to_be_written(qkv):
    q, k, v = (x.detach() for x in qkv)
    weight = torch.ones(1, requires_grad=True)
    out = torch.ones(2, 17, 4, 48).bfloat16()
    product = (weight * out).sum()
    with simulator.enabled():
        flash_attn_func(q, k, v, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_flops_of_backward_alone(qkv):
    loss = attention_loss(*qkv)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == 2 * 2 * 4 * 17 * 19 * (3 * 64 + 2 * 48)


def test_bounds_that_only_the_device_knows():
    def loss(q, cu_seqlens):
        longest = int(cu_seqlens.diff().max().item())
        return flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, longest, longest).sum()

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        q, cu_seqlens = leaf(12, 2, 64), offsets((5, 7))
        torch.testing.assert_close(compiled(q, cu_seqlens), loss(q, cu_seqlens))


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.zeros(2, 17, 4, 48), "^dout is torch.float32"),
        (0, torch.zeros(2, 17, 4, 40).bfloat16(), "^dout is torch.bfloat16 of shape"),
        (1, torch.zeros(2, 4, 9), "^dlse has shape"),
        (2, torch.zeros(2, 17, 4, 48), "^out is torch.float32"),
        (3, torch.zeros(2, 4, 17).bfloat16(), "^lse is torch.bfloat16"),
        (7, torch.zeros(1), r"^learnable_sink has shape \(1,\)"),
        (12, float("nan"), "^softmax_scale must"),
        (14, -7, "^window_size must"),
        (17, -3.0, "^softcap must"),
    ],
)
def test_bad_input_of_backward(qkv, place, wrong, message):
    inputs = [*(x.detach() for x in qkv), torch.zeros(4), *DENSE[1:], *options()]
    out, lse = FORWARD(*inputs)
    arguments = [out, lse, out, lse, *inputs]
    BACKWARD(*arguments)
    arguments[place] = wrong
    with pytest.raises(ValueError, match=message):
        BACKWARD(*arguments)


def test_bad_input_of_operators(qkv):
    """Checked there, too, for those who call them directly."""
    q, k, v = (x.detach() for x in qkv)
    with pytest.raises(ValueError, match=r"^k has head_dim 32"):
        FORWARD(q, k[..., :32], v, *DENSE, *options())
    tensors = packed_tensors(cu_seqlens_k=(0, 9, 10, 20))
    with pytest.raises(ValueError, match=r"^cu_seqlens_k must"):
        FORWARD(*tensors, *options())


@pytest.mark.parametrize(("heads_kv", "split"), [(8, True), (6, False), (2, False)])
def test_heads_that_a_whole_mesh_would_tear_apart(heads_kv, split):
    """Two mesh dimensions may both split heads: a group must stay on one rank even then."""

    def spec(*shape):
        mesh = SimpleNamespace(shape=(2, 2))
        return SimpleNamespace(shape=shape, ndim=len(shape), mesh=mesh)

    kv = spec(2, 9, heads_kv, 64)
    found = dtensor._forward(spec(2, 9, 24, 64), kv, kv, *DENSE, *options())
    assert (Shard(2) in [results[0] for results, _ in found]) == split
