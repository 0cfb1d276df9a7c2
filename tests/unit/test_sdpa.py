"""Our kernels behind PyTorch's own attention functions: the same operators on CPU tensors."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import offsets
from torch.nn import attention
from torch.nn.attention import varlen
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from hopper_attention import (
    disable_sdpa,
    enable_sdpa,
    flash_attn_func,
    flash_attn_varlen_func,
    reference,
    simulator,
)
from hopper_attention.launch import forward
from hopper_attention.reference.error import FLOOR, Error

aten = torch.ops.aten
VARLEN_OPTIONS = inspect.signature(varlen_attn).parameters
"""torch 2.11 takes grouped heads without being told, and neither used keys nor out."""


@pytest.fixture(autouse=True)
def restored():
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    disable_sdpa()


@pytest.fixture
def runs(monkeypatch):
    """Counts calls of our forward."""
    count, run = [], forward.run
    monkeypatch.setattr(forward, "run", lambda *args: (count.append(0), run(*args))[1])
    return count


def heads_first(batch=2, seqlen=19, heads=4, head_dim=64, dtype=torch.bfloat16):
    """(batch, heads, seqlen, head_dim), in memory as projections leave it."""
    x = torch.randn(batch, seqlen, heads, head_dim).to(dtype)
    return x.transpose(1, 2).requires_grad_()


def judged(actual, torch_result, exact):
    """At most twice PyTorch's error."""
    ours, theirs = Error.of(actual, exact), Error.of(torch_result, exact)
    assert ours.within_twice(theirs), (ours, theirs)


@pytest.mark.parametrize("causal", [False, True])
def test_forward_and_backward(runs, causal):
    q, k, v = heads_first(), heads_first(), heads_first()
    dout = torch.randn(q.shape).bfloat16()

    def results(*inputs):
        out = F.scaled_dot_product_attention(*inputs, is_causal=causal, scale=0.2)
        return out, *torch.autograd.grad(out, inputs, dout.to(out.dtype))

    theirs = results(q, k, v)
    exact = results(*(x.detach().double().requires_grad_() for x in (q, k, v)))
    with enable_sdpa(device="cpu"):
        ours = results(q, k, v)
    assert len(runs) == 1
    for mine, yours, true in zip(ours, theirs, exact, strict=True):
        assert mine.stride() == yours.stride()
        judged(mine, yours, true)


def test_grouped_heads(runs):
    q, k, v = heads_first(), heads_first(heads=2), heads_first(heads=2)
    theirs = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    with enable_sdpa(device="cpu"):
        judged(F.scaled_dot_product_attention(q, k, v, enable_gqa=True), theirs, exact)
    assert len(runs) == 1


UNSUPPORTED = {
    "mask": {"attn_mask": torch.ones(19, 19, dtype=torch.bool).tril()},
    "dropout": {"dropout_p": 0.5},
    "float32": {},
    "head dim": {},
    "causal, more keys": {"is_causal": True},
    "value's head dim": {},
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_falls_through(runs, case):
    """Bit for bit what PyTorch computes without us."""
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    q, k, v = (heads_first(dtype=dtype) for _ in range(3))
    if case == "head dim":
        q, k, v = (x[..., :20] for x in (q, k, v))
    if case == "causal, more keys":
        q = q[:, :, :7]
    if case == "value's head dim":
        v = v[..., :32]

    def results():
        torch.manual_seed(1)
        out = F.scaled_dot_product_attention(q, k, v, **UNSUPPORTED[case])
        return out, *torch.autograd.grad(out.sum(), (q, k, v))

    theirs = results()
    with enable_sdpa(device="cpu"):
        ours = results()
    assert not runs
    assert all(map(torch.equal, ours, theirs))


def test_what_is_restored():
    q, k, v = (heads_first() for _ in range(3))
    before = F.scaled_dot_product_attention(q, k, v)
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    with enable_sdpa():
        assert attention.current_flash_attention_impl() == "hopper_attention"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        with enable_sdpa():
            pass
        assert attention.current_flash_attention_impl() == "hopper_attention"
    assert attention.current_flash_attention_impl() is None
    assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
    enable_sdpa(device="cpu")
    enable_sdpa(device="cpu")
    disable_sdpa()
    disable_sdpa()
    assert attention.current_flash_attention_impl() is None
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), before)
    with pytest.raises(ValueError, match="device must be one of cuda, cpu; got 'tpu'"):
        enable_sdpa("tpu")


@pytest.mark.parametrize("outer", ["cpu", "cuda"])
def test_nested_devices(runs, outer):
    inner = "cuda" if outer == "cpu" else "cpu"
    q, k, v = (heads_first() for _ in range(3))
    with enable_sdpa(outer):
        with enable_sdpa(inner):
            pass
        F.scaled_dot_product_attention(q, k, v)
        assert len(runs) == (outer == "cpu")
        assert torch.backends.cuda.cudnn_sdp_enabled() == (outer == "cpu")
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_enabled_inside_a_choice_of_kernels():
    """A backend that `sdpa_kernel` switches off for a while is on again afterwards."""
    with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
        enable_sdpa()
    disable_sdpa()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_gradients_of_another_dtype_fall_through():
    q, k, v = (heads_first().detach() for _ in range(3))
    state = torch.zeros(2, dtype=torch.uint64)
    with enable_sdpa("cpu"):
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
        with pytest.raises(ValueError, match=r"^dout is torch.float32"):
            aten._scaled_dot_product_flash_attention_backward(
                out.float(), q, k, v, out, lse, None, None, 19, 19, 0.0, False, state, state
            )


def test_cudnn_that_was_off_stays_off():
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with enable_sdpa(), enable_sdpa():
            pass
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_another_library_comes_back():
    class Handle:
        removed = 0

        def remove(self):
            Handle.removed += 1

    attention.register_flash_attention_impl("other", register_fn=Handle)
    attention.activate_flash_attention_impl("other")
    with enable_sdpa():
        assert Handle.removed == 1
    assert attention.current_flash_attention_impl() == "other"
    disable_sdpa()
    assert attention.current_flash_attention_impl() == "other"
    attention.restore_flash_attention_impl()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(runs, backend):
    q, k, v = (heads_first() for _ in range(3))

    def loss(q, k, v):
        out = F.scaled_dot_product_attention(q * 2.0, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2).float().sin().sum()

    with enable_sdpa(device="cpu"):
        compiled = torch.compile(loss, fullgraph=True, backend=backend)
        ours = torch.autograd.grad(compiled(q, k, v), (q, k, v))
        assert len(runs) == 1
        torch.testing.assert_close(ours, torch.autograd.grad(loss(q, k, v), (q, k, v)))


def packed(lengths, heads=2):
    return torch.randn(sum(lengths), heads, 64).bfloat16().requires_grad_()


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (2, 4)])
def test_varlen_attn(window):
    """PyTorch's function for packed sequences, which has no kernel of its own on a CPU."""
    lengths, more = (5, 0, 12), (7, 3, 12)
    q, k, v = packed(lengths), packed(more, 1), packed(more, 1)
    tensors = (q, k, v, offsets(lengths), offsets(more), 12, 12)
    expected, lse = flash_attn_varlen_func(*tensors, window_size=window, return_lse=True)
    gradients = torch.autograd.grad(expected.float().sin().sum(), (q, k, v))
    arguments = {"window_size": window}
    if "enable_gqa" in VARLEN_OPTIONS:
        arguments["enable_gqa"] = True
    with enable_sdpa(device="cpu"):
        out, aux = varlen_attn(*tensors, **arguments, return_aux=AuxRequest(lse=True))
        assert torch.equal(out, expected)
        assert torch.equal(aux, lse)
        ours = torch.autograd.grad(out.float().sin().sum(), (q, k, v))
        if hasattr(varlen, "varlen_attn_out"):
            written = torch.empty_like(out)
            with torch.no_grad():
                varlen.varlen_attn_out(written, *tensors, **arguments)
            assert torch.equal(written, expected)
    assert all(map(torch.equal, ours, gradients))


@pytest.mark.skipif("seqused_k" not in VARLEN_OPTIONS, reason="not in this version of PyTorch")
def test_varlen_attn_with_used_keys():
    lengths = (5, 12)
    q, k, v = (packed(lengths).detach() for _ in range(3))
    cu_seqlens, used = offsets(lengths), torch.tensor((3, 12), dtype=torch.int32)
    with enable_sdpa(device="cpu"):
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, 12, 12, seqused_k=used)
    expected = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 12, 12, seqused_k=used)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "refused", [{"block_table": torch.zeros(1, 1, dtype=torch.int32)}, {"num_splits": 4}]
)
def test_varlen_attn_refuses_where_nothing_is_left(refused):
    """There is no kernel of PyTorch's to fall through to."""
    q, k, v = (packed((8,)).detach() for _ in range(3))
    cu_seqlens = offsets((8,))
    with enable_sdpa(device="cpu"), pytest.raises(NotImplementedError, match=next(iter(refused))):
        aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, 8, 8, 0.0, False, False, **refused
        )


@pytest.mark.parametrize("packed_layout", [False, True])
def test_operators_of_cuda(packed_layout):
    """`F.scaled_dot_product_attention` of GPU tensors calls these; results as their metas say."""
    q, k, v = (heads_first(heads=h).detach() for h in (4, 2, 2))
    if packed_layout:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        name, layout = "_flash_attention", (None, None, 19, 19, 0.0, True, False)
    else:
        name, layout = "_scaled_dot_product_flash_attention", (0.0, True, False)
    operator = getattr(aten, "_flash_attention_forward" if packed_layout else name)
    with enable_sdpa(device="cpu"):
        out, lse, *rest = operator(q, k, v, *layout)
        state = rest[:2] if packed_layout else rest[4:6]
        lengths = (None, None, 19, 19, 0.0, True)
        gradients = getattr(aten, f"{name}_backward")(out, q, k, v, out, lse, *lengths, *state)
    shown = operator(*(x.to("meta") for x in (q, k, v)), *layout)
    for result, fake in zip((out, lse, *rest), shown, strict=True):
        if isinstance(result, torch.Tensor):
            assert (result.shape, result.dtype) == (fake.shape, fake.dtype)
            assert result.stride() == fake.stride()
        else:
            assert result == fake
    assert [g.stride() for g in gradients] == [x.stride() for x in (q, k, v)]
    first = (x if packed_layout else x.transpose(1, 2) for x in (q, k, v))
    q, k, v = (x.detach().requires_grad_() for x in first)
    expected = flash_attn_func(q, k, v, causal=True)
    assert torch.equal(out if packed_layout else out.transpose(1, 2), expected)
    exact = torch.autograd.grad(expected, (q, k, v), expected)
    ours = gradients if packed_layout else [g.transpose(1, 2) for g in gradients]
    assert all(map(torch.equal, ours, exact))


def test_contiguous_heads_first():
    """(batch, heads, seqlen, head_dim) in memory, too: results and gradients follow the inputs."""
    q, k, v = (heads_first().detach().contiguous() for _ in range(3))
    with enable_sdpa(device="cpu"):
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
        state = torch.zeros(2, dtype=torch.uint64)
        gradients = aten._scaled_dot_product_flash_attention_backward(
            out, q, k, v, out, lse, None, None, 19, 19, 0.0, False, state, state
        )
    assert all(x.is_contiguous() for x in (out, *gradients))
    expected = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    assert torch.equal(out.transpose(1, 2), expected)


@settings(max_examples=25, deadline=None)
@given(parts=st.integers(1, 4), seqlen_q=st.integers(1, 20), seqlen_k=st.integers(4, 40))
def test_backward_of_merged_results(parts, seqlen_q, seqlen_k):
    """Ring attention: shares of the keys with the out and LSE of all keys add up to the whole."""
    q = torch.randn(1, seqlen_q, 2, 64).bfloat16()
    k, v = torch.randn(2, 1, seqlen_k, 2, 64).bfloat16()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = flash_attn_func(*leaves, return_lse=True)
    whole = torch.autograd.grad(out, leaves, torch.ones_like(out))
    state = torch.zeros(2, dtype=torch.uint64)
    with enable_sdpa(device="cpu"):
        shares = [
            aten._flash_attention_backward(
                torch.ones_like(out), q, kk, vv, out.float(), lse, None, None, seqlen_q,
                kk.shape[1], 0.0, False, state, state,
            )
            for kk, vv in zip(k.chunk(parts, dim=1), v.chunk(parts, dim=1), strict=True)
        ]  # fmt: skip
    doubles = (x.detach().double() for x in (*leaves, torch.ones_like(out)))
    exact = reference.gradients(*doubles, softmax_scale=1 / 8, compute_dtype=torch.float64)
    for place in (1, 2):
        judged(torch.cat([share[place] for share in shares], dim=1), whole[place], exact[place])
    ours = Error.of(sum(share[0].float() for share in shares), exact[0])
    assert ours.maximum <= 2 * parts * Error.of(whole[0], exact[0]).maximum + FLOOR  # rounded each


@pytest.mark.simulator
def test_on_the_simulator():
    q, k, v = (heads_first(batch=1, heads=1, seqlen=40) for _ in range(3))

    def results(*inputs):
        out = F.scaled_dot_product_attention(*inputs, is_causal=True)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    theirs = results(q, k, v)
    exact = results(*(x.detach().double().requires_grad_() for x in (q, k, v)))
    with enable_sdpa(device="cpu"), simulator.enabled(seed=1):
        ours = results(q, k, v)
    assert not torch.equal(ours[0], theirs[0])  # another order of additions
    for mine, yours, true in zip(ours, theirs, exact, strict=True):
        judged(mine, yours, true)
