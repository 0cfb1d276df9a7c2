"""Forward kernels of other libraries had these faults, which other tests would not notice."""

from __future__ import annotations

import contextlib
import functools
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from support.judge import check_forward, check_packed
from support.problems import (
    WINDOWS,
    Shape,
    arguments_for,
    forward_instances,
    inputs_for,
    offsets,
    random_inputs,
)
from support.simulate import simulate, simulate_packed

from hopper_attention import flash_attn_func, flash_attn_varlen_func, simulator
from hopper_attention.dispatch import manifest, target

pytestmark = pytest.mark.simulator
both = pytest.mark.usefixtures("kernels")

MASKS = ({}, {"causal": True}, {"window_size": (9, 30)})
dense = partial(simulate, pack_gqa=None)
packed = partial(simulate_packed, bounded=False)


@both
@pytest.mark.parametrize("head_dim", [64, 128])
def test_causal_is_aligned_to_the_bottom_right(head_dim):
    """Lengths at the edges of tiles, more queries than keys and the other way round."""
    for seqlen_q, seqlen_k in product((1, 63, 128, 129, 193), repeat=2):
        q, k, v = random_inputs(Shape(1, seqlen_q, seqlen_k, 2, 1), head_dim, torch.bfloat16)
        check_forward(q, k, v, *dense(q, k, v, causal=True), causal=True)


@both
@pytest.mark.parametrize("causal", [False, True], ids=["two-sided", "causal"])
def test_window_encodings(causal):
    """None and -1 are unbounded, 0 is not, and what exceeds the keys hides nothing."""
    q, k, v = random_inputs(Shape(1, 90, 140, 1, 1), 64, torch.bfloat16)
    for window_size in product((None, -1, 0, 5, 139, 1000, 2**31 - 1), repeat=2):
        arguments = {"causal": causal, "window_size": window_size}
        check_forward(q, k, v, *dense(q, k, v, **arguments), **arguments)


@both
@pytest.mark.parametrize("dims", [(64, 64), (64, 256), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("arguments", MASKS, ids=str)
def test_unused_keys_are_not_read(dims, arguments):
    """Rows that seqused leaves out hold NaN or infinity, between packed sequences and behind."""
    shape, (head_dim, head_dim_v) = Shape(1, 130, 260, 2, 1), dims
    q, k, v = random_inputs(shape, head_dim, torch.bfloat16, head_dim_v=head_dim_v)
    used_k = torch.tensor((81, 33), dtype=torch.int32)
    results = []
    for garbage in (0.0, torch.nan, torch.inf):
        for x in (k, v):
            x[:, 81:150], x[:, 183:] = garbage, garbage
        lengths = ((70, 150), (60, 110))
        results.append(packed(q[0], k[0], v[0], lengths, seqused_k=used_k, **arguments))
    (out, lse), *others = results
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, (out, lse)))
    for rows, keys in ((slice(0, 70), slice(0, 81)), (slice(70, 130), slice(150, 183))):
        one = (q[:, rows], k[:, keys], v[:, keys], out[None, rows], lse[None, :, rows])
        check_forward(*one, **arguments)


@both
@pytest.mark.parametrize("side", ["queries", "keys", "both"])
@pytest.mark.parametrize("place", [0, 1, 2, slice(0, 2), slice(0, 3)], ids=str)
def test_empty_sequences(side, place):
    columns = {"queries": 0, "keys": 1, "both": slice(0, 2)}
    numbers = np.array(((70, 90), (150, 30), (20, 200)))
    numbers[place, columns[side]] = 0
    lengths = tuple(map(tuple, numbers.tolist()))
    total_q, total_k = (sum(x) for x in zip(*lengths))
    tensors = random_inputs(Shape(1, total_q, total_k, 2, 1), 64, torch.bfloat16)
    q, k, v = (x[0] for x in tensors)
    for causal, seed in product((False, True), (0, 1)):
        out, lse = packed(q, k, v, lengths, seed, causal=causal)
        check_packed(q, k, v, out, lse, lengths, causal=causal)


@both
@pytest.mark.parametrize("arguments", MASKS, ids=str)
def test_result_does_not_depend_on_the_batch(arguments):
    """Bit for bit, a sequence alone and among others."""
    q, k, v = random_inputs(Shape(3, 140, 210, 2, 1), 128, torch.bfloat16)
    out, lse = dense(q, k, v, **arguments)
    lengths, rows, keys = ((60, 0), (140, 210), (3, 500)), slice(60, 200), slice(0, 210)
    tensors = random_inputs(Shape(1, 203, 710, 2, 1), 128, torch.bfloat16)
    packed_q, packed_k, packed_v = (x[0] for x in tensors)
    packed_out, packed_lse = packed(packed_q, packed_k, packed_v, lengths, **arguments)
    for b in range(3):
        alone, alone_lse = dense(q[b : b + 1], k[b : b + 1], v[b : b + 1], **arguments)
        assert torch.equal(alone[0], out[b]) and torch.equal(alone_lse[0], lse[b])
    one = (packed_q[rows], packed_k[keys], packed_v[keys])
    alone, alone_lse = packed(*one, lengths[1:2], **arguments)
    assert torch.equal(alone, packed_out[rows]) and torch.equal(alone_lse, packed_lse[:, rows])


@both
def test_max_seqlen_is_an_upper_bound():
    """Absent, exact, far above, and on the device: the same bits."""
    lengths = ((70, 90), (33, 20))
    q, k, v = (x[0] for x in random_inputs(Shape(1, 103, 110, 2, 1), 64, torch.bfloat16))
    cu_seqlens = [offsets(side) for side in zip(*lengths)]
    bounds = (None, None), (70, 90), (10**6, 10**6), (torch.tensor(70), torch.tensor([4096]))
    with simulator.enabled():
        results = [
            flash_attn_varlen_func(q, k, v, *cu_seqlens, *bound, window_size=(80, 0))
            for bound in bounds
        ]
    assert all(torch.equal(result, results[0]) for result in results)


# fp16 shares everything but conversions.
BF16 = [
    name for varlen in (False, True) for name in forward_instances(varlen=varlen) if "bf16" in name
]


@pytest.mark.parametrize("instance", BF16)
def test_every_instance_takes_tile_after_tile(monkeypatch, instance):
    """Q of the next tile must not meet O, staged over a Q, before it has been stored."""
    monkeypatch.setattr(target, "SIMULATED_SMS", 1)
    config = manifest.instances()[instance].config
    rows, keys, arguments = 2 * config["tile_m"] + 9, 110, arguments_for(instance, WINDOWS[0])
    q, k, v = inputs_for(instance, Shape(1, rows, keys, 1, 1))
    if config["varlen"]:
        lengths = ((rows - 150, 60), (150, 50))
        out, lse = packed(q[0], k[0], v[0], lengths, seed=1, **arguments)
        check_packed(q[0], k[0], v[0], out, lse, lengths, **arguments)
    else:
        check_forward(q, k, v, *dense(q, k, v, seed=1, **arguments), **arguments)


@both
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_results_beyond_32_bits(monkeypatch, causal):
    """A batch stride of more than 2^31 elements in out too; few pages are ever touched."""
    stride = 2**31 + 4096
    storage = torch.empty(stride + 2**16, dtype=torch.bfloat16)
    q, k, v = random_inputs(Shape(2, 40, 70, 1, 1), 64, torch.bfloat16)

    def far(x, place):
        return storage.as_strided(x.shape, (stride, 64, 64, 1), place * 2**14)

    monkeypatch.setattr(torch, "empty_like", lambda x, **_: far(x, 3))  # where out is made
    inputs = [far(x, place).copy_(x) for place, x in enumerate((q, k, v))]
    out, lse = dense(*inputs, causal=causal)
    assert out.stride(0) == stride
    check_forward(q, k, v, out, lse, causal=causal)


@both
def test_packed_rows_beyond_32_bits(monkeypatch):
    """Row strides of 2^26 elements: the last rows lie behind 2^31."""
    stride, lengths = 2**26, ((30, 20), (6, 16))
    storage = torch.empty(35 * stride + 4096, dtype=torch.bfloat16)
    q, k, v = (x[0] for x in random_inputs(Shape(1, 36, 36, 1, 1), 64, torch.bfloat16))

    def far(x, place):
        return storage.as_strided(x.shape, (stride, 64, 1), place * 64)

    monkeypatch.setattr(torch, "empty_like", lambda x, **_: far(x, 3))
    inputs = [far(x, place).copy_(x) for place, x in enumerate((q, k, v))]
    out, lse = packed(*inputs, lengths, causal=True)
    assert out.stride(0) == stride
    check_packed(q, k, v, out, lse, lengths, causal=True)


@both
@pytest.mark.parametrize("simulated", [False, True], ids=["reference", "simulator"])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_written_out(simulated, out_dtype):
    """Into every other head of a larger tensor, dense and packed; what lies between is left."""
    q, k, v = random_inputs(Shape(2, 40, 70, 4, 2), 64, torch.bfloat16)
    offsets_q, offsets_k = (torch.tensor((0, n), dtype=torch.int32) for n in (40, 70))

    def packed_call(**arguments):
        tensors = (x[0] for x in (q, k, v))
        return flash_attn_varlen_func(*tensors, offsets_q, offsets_k, 40, 70, **arguments)

    calls = (functools.partial(flash_attn_func, q, k, v), packed_call)
    with simulator.enabled(seed=1) if simulated else contextlib.nullcontext():
        for call in calls:
            expected, lse = call(out_dtype=out_dtype, return_lse=True)
            space = torch.full((*expected.shape[:-2], 8, 64), 7.0, dtype=out_dtype)
            out = space[..., ::2, :]
            result, other_lse = call(out=out, out_dtype=out_dtype, return_lse=True)
            assert result.data_ptr() == out.data_ptr()
            assert torch.equal(out, expected)
            assert torch.equal(other_lse, lse)
            assert (space[..., 1::2, :] == 7.0).all()


@both
@pytest.mark.parametrize("sign", [1, -1], ids=["inf", "-inf"])
@pytest.mark.parametrize("keys", [slice(0, 300), slice(0, 200), slice(130, 300)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_beyond_float32(head_dim, keys, sign):
    """Those that overflow are weights of 0 or NaN, wherever their blocks lie, as on the CPU."""
    q, k, v = random_inputs(Shape(1, 150, 300, 1, 1), head_dim, torch.bfloat16)
    q, k = 1e20 * q.abs(), 1e-20 * k
    k[:, keys] = sign * 1e20 * (1 + k[:, keys].abs())
    for arguments in MASKS:
        expected, expected_lse = flash_attn_func(q, k, v, return_lse=True, **arguments)
        out, lse = dense(q, k, v, **arguments)
        assert torch.equal(out.isnan(), expected.isnan()), arguments
        assert torch.equal(lse.isnan(), expected_lse.isnan()), arguments
        torch.testing.assert_close(lse, expected_lse, equal_nan=True, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out, expected, equal_nan=True, rtol=2e-2, atol=2e-2)
