"""Every forward instance, interpreted from its PTX, against FP64."""

from __future__ import annotations

import pytest
import torch
from cases import SHAPES, TORCH_DTYPES, Shape, check_forward, forward_instances, random_inputs

from hopper_attention import flash_attn_func, manifest, simulator

pytestmark = pytest.mark.simulator

SEEDS = (0, 1)
EDGE_SHAPE = Shape(1, 150, 210, 2, 1)


def configuration(instance: str) -> tuple[int, torch.dtype, bool]:
    config = manifest.instances()[instance].config
    return config["head_dim"], TORCH_DTYPES[config["dtype"]], config["causal"]


def simulate(q, k, v, seed=0, **arguments):
    with simulator.enabled(seed=seed):
        return flash_attn_func(q, k, v, return_lse=True, **arguments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("instance", forward_instances())
def test_matches_fp64_for_every_schedule(instance, shape):
    head_dim, dtype, causal = configuration(instance)
    q, k, v = random_inputs(shape, head_dim, dtype)
    results = [simulate(q, k, v, seed, causal=causal) for seed in SEEDS]
    check_forward(q, k, v, *results[0], causal=causal)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_any_strides(head_dim, causal):
    """Head-major storage, a slice of packed QKV, and one key head expanded to many."""
    shape = EDGE_SHAPE
    q, k, v = random_inputs(shape, head_dim, torch.bfloat16)
    out, lse = simulate(q, k, v, causal=causal)
    head_major = q.transpose(1, 2).contiguous().transpose(1, 2)
    packed = torch.stack((k, v, torch.full_like(v, torch.nan)), dim=2)
    expanded_k, expanded_v = (packed[:, :, i].expand(-1, -1, 2, -1) for i in (0, 1))
    strided = simulate(head_major, expanded_k, expanded_v, causal=causal)
    assert torch.equal(strided[0], out) and torch.equal(strided[1], lse)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_memory_around_the_tensors_is_not_read(head_dim, causal):
    """NaN behind the last row must not leak through 0 * NaN, and nothing may be written there."""
    q, k, v = random_inputs(EDGE_SHAPE, head_dim, torch.bfloat16)
    out, lse = simulate(q, k, v, causal=causal)

    def in_nan(x):
        padded = x.new_full((x.shape[0] + 1, x.shape[1] + 70, *x.shape[2:]), torch.nan)
        padded[:-1, :-70] = x
        return padded[:-1, :-70]

    embedded = simulate(in_nan(q), in_nan(k), in_nan(v), causal=causal)
    assert torch.equal(embedded[0], out) and torch.equal(embedded[1], lse)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_large_logits(head_dim):
    """All scores far above or far below 0: exponentials would overflow or vanish unshifted."""
    q, k, v = random_inputs(EDGE_SHAPE, head_dim, torch.bfloat16, scale=8.0)
    for sign in (1, -1):
        out, lse = simulate(q.abs() * sign, k.abs(), v)
        check_forward(q.abs() * sign, k.abs(), v, out, lse, causal=False)
        assert lse.abs().min() > 100


def test_softmax_scale():
    q, k, v = random_inputs(EDGE_SHAPE, 64, torch.bfloat16)
    out, lse = simulate(q, k, v, softmax_scale=0.5, causal=True)
    check_forward(q, k, v, out, lse, causal=True, softmax_scale=0.5)


def test_nan_in_a_key_reaches_just_the_queries_that_see_it():
    q, k, v = random_inputs(EDGE_SHAPE, 128, torch.bfloat16)
    clean, _ = simulate(q, k, v, causal=True)
    k[:, 205] = torch.nan
    out, lse = simulate(q, k, v, causal=True)
    first = 205 - (EDGE_SHAPE.seqlen_k - EDGE_SHAPE.seqlen_q)
    assert torch.equal(out[:, :first], clean[:, :first])
    assert out[:, first:].isnan().all() and lse[..., first:].isnan().all()


def test_offsets_beyond_32_bits():
    """Batch strides of more than 2^31 elements; only the pages in use are ever touched."""
    stride = 2**31 + 4096
    storage = torch.empty(stride + 4096 * 16, dtype=torch.bfloat16)
    q, k, v = random_inputs(Shape(2, 40, 70, 1, 1), 64, torch.bfloat16)
    far = []
    for offset, x in ((0, q), (2**16 // 4, k), (2**16 // 2, v)):
        view = storage.as_strided(x.shape, (stride, 64, 64, 1), offset)
        view.copy_(x)
        far.append(view)
    out, lse = simulate(*far)
    check_forward(q, k, v, out, lse, causal=False)
