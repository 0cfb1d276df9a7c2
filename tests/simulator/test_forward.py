"""Every forward instance, interpreted from its PTX, against FP64."""

from __future__ import annotations

import pytest
import torch
from support.judge import check_forward, check_packed
from support.problems import (
    FEW_SHAPES,
    PACKED,
    SHAPES,
    WINDOWS,
    PackedCase,
    Shape,
    arguments_for,
    dense_cases,
    forward_instances,
    inputs_for,
    offsets,
    packed_inputs,
    random_inputs,
    window,
)
from support.simulate import simulate, simulate_packed

from hopper_attention import flash_attn_func, flash_attn_varlen_func, reference, simulator
from hopper_attention.dispatch import manifest, target
from hopper_attention.launch import runtime
from hopper_attention.problem.values import CAUSAL
from hopper_attention.reference.error import Error

pytestmark = pytest.mark.simulator
both = pytest.mark.usefixtures("kernels")
"""Hopper's and Ampere's."""

SEEDS = (0, 1, 2)
EDGE_SHAPE = Shape(1, 150, 210, 2, 1)
HEAD_DIMS = (64, 96, 128, 192, 256)


def cases():
    """Instances with fp16 share all code but the conversions with bf16: fewer shapes."""
    for instance in forward_instances(varlen=False):
        yield from dense_cases([instance], FEW_SHAPES if "fp16" in instance else SHAPES)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_matches_fp64_for_every_schedule(case):
    q, k, v = case.inputs()
    first, *others = [simulate(q, k, v, seed, **case.arguments) for seed in case.seeds]
    check_forward(q, k, v, *first, **case.arguments)
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, first))


def packed_cases():
    """Every instance has sequences of the edges; with bf16 also many, under another window."""
    for instance in forward_instances(varlen=True):
        edges = PackedCase(instance, PACKED[0], arguments_for(instance, WINDOWS[0]))
        many = PackedCase(instance, PACKED[1], arguments_for(instance, WINDOWS[1]), seeds=(0,))
        yield pytest.param((edges, many) if "bf16" in instance else (edges,), id=instance)


@pytest.mark.parametrize("cases", list(packed_cases()))
def test_packed_sequences_match_fp64_for_every_schedule(cases):
    for case in cases:
        print(case)
        q, k, v = case.inputs()
        runs = [simulate_packed(q, k, v, case.lengths, s, **case.arguments) for s in case.seeds]
        first, *others = runs
        check_packed(q, k, v, *first, case.lengths, **case.arguments)
        assert all(torch.equal(a, b) for other in others for a, b in zip(other, first))


@both
@pytest.mark.parametrize("head_dim", [8, 40, 72, 80, 88, 112, 120, 136, 160, 200, 224])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_head_dims_between_the_tiles(head_dim, causal):
    q, k, v = random_inputs(EDGE_SHAPE, head_dim, torch.bfloat16)
    check_forward(q, k, v, *simulate(q, k, v, causal=causal), causal=causal)


@both
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"), [(192, 128), (64, 256), (64, 512 // 4), (72, 16), (8, 248)]
)
def test_v_of_another_head_dim(head_dim, head_dim_v):
    q, k, v = random_inputs(EDGE_SHAPE, head_dim, torch.bfloat16, head_dim_v=head_dim_v)
    check_forward(q, k, v, *simulate(q, k, v, causal=True), causal=True)
    lengths = ((100, 130), (50, 80))
    out, lse = simulate_packed(q[0], k[0], v[0], lengths, causal=True)
    check_packed(q[0], k[0], v[0], out, lse, lengths, causal=True)


@both
@pytest.mark.parametrize("arguments", [{}, {"causal": True}, {"window_size": (40, 0)}], ids=str)
def test_sinks(arguments):
    """Each head its own; rows without keys have the sink alone: out 0, lse the sink."""
    q, k, v = random_inputs(Shape(1, 203, 113, 4, 2), 64, torch.bfloat16)
    sink = torch.tensor([-3.0, 0.0, 2.5, -torch.inf])
    out, lse = simulate(q, k, v, learnable_sink=sink, **arguments)
    check_forward(q, k, v, out, lse, learnable_sink=sink, **arguments)
    if arguments:
        assert torch.equal(lse[0, :3, 0], sink[:3]) and (out[:, 0] == 0).all()


@both
@pytest.mark.parametrize("softcap", [2.0, 50.0])
def test_softcap_of_large_scores(softcap):
    q, k, v = random_inputs(EDGE_SHAPE, 128, torch.bfloat16, scale=4.0)
    arguments = {"causal": True, "softcap": softcap}
    check_forward(q, k, v, *simulate(q, k, v, **arguments), **arguments)


@both
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_any_strides(head_dim, causal):
    """Head-major storage, a slice of packed QKV, and one key head expanded to many."""
    q, k, v = random_inputs(EDGE_SHAPE, head_dim, torch.bfloat16)
    out, lse = simulate(q, k, v, causal=causal)
    head_major = q.transpose(1, 2).contiguous().transpose(1, 2)
    packed = torch.stack((k, v, torch.full_like(v, torch.nan)), dim=2)
    expanded_k, expanded_v = (packed[:, :, i].expand(-1, -1, 2, -1) for i in (0, 1))
    strided = simulate(head_major, expanded_k, expanded_v, causal=causal)
    assert torch.equal(strided[0], out) and torch.equal(strided[1], lse)


@both
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
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


@both
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_packed_neighbours_do_not_leak(head_dim, causal):
    """A sequence of NaN between others, whose last tiles reach into it."""
    lengths = ((70, 90), (30, 50), (60, 70))
    total_q, total_k = (sum(side) for side in zip(*lengths))
    tensors = random_inputs(Shape(1, total_q, total_k, 2, 1), head_dim, torch.bfloat16)
    q, k, v = (x[0] for x in tensors)
    q[70:100], k[90:140], v[90:140] = torch.nan, torch.nan, torch.nan
    out, lse = simulate_packed(q, k, v, lengths, causal=causal)
    assert out[70:100].isnan().all()
    for rows, keys in ((slice(0, 70), slice(0, 90)), (slice(100, 160), slice(140, 210))):
        one = (x[None] for x in (q[rows], k[keys], v[keys], out[rows], lse[:, rows]))
        check_forward(*one, causal=causal)


@both
def test_used_lengths():
    """Padded tensors of which parts are used: the rest is neither read nor written."""
    shape = Shape(3, 140, 180, 2, 1)
    q, k, v = random_inputs(shape, 64, torch.bfloat16)
    used_q, used_k = (torch.tensor(n, dtype=torch.int32) for n in ((140, 33, 0), (77, 180, 9)))
    for b in range(3):
        q[b, used_q[b] :], k[b, used_k[b] :], v[b, used_k[b] :] = torch.nan, torch.nan, torch.nan
    with simulator.enabled():
        out, lse = flash_attn_varlen_func(
            q, k, v, None, None, 140, 180, used_q, used_k, causal=True, return_lse=True
        )
    for b, (n, m) in enumerate(zip(used_q, used_k)):
        one = (x[b : b + 1] for x in (q[:, :n], k[:, :m], v[:, :m], out[:, :n], lse[..., :n]))
        check_forward(*one, causal=True)
        assert (out[b, n:] == 0).all() and (lse[b, :, n:] == -torch.inf).all()


@both
def test_dense_queries_with_packed_keys():
    q, _, _ = random_inputs(Shape(2, 33, 33, 2, 1), 128, torch.bfloat16)
    _, k, v = (x[0] for x in random_inputs(Shape(1, 1, 190, 2, 1), 128, torch.bfloat16))
    with simulator.enabled():
        out, lse = flash_attn_varlen_func(
            q, k, v, None, offsets((150, 40)), None, None, causal=True, return_lse=True
        )
    for b, keys in enumerate((slice(0, 150), slice(150, 190))):
        one = (q[b : b + 1], k[None, keys], v[None, keys], out[b : b + 1], lse[b : b + 1])
        check_forward(*one, causal=True)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_blocks_take_tile_after_tile(monkeypatch, head_dim, causal):
    """More tiles than blocks, some without keys; the counter ends as the next launch needs it."""
    counter = torch.zeros(2, dtype=torch.int32)
    monkeypatch.setattr(runtime, "simulated_counter", lambda _device: counter)
    monkeypatch.setattr(target, "SIMULATED_SMS", 3)
    q, k, v = random_inputs(Shape(2, 420, 130, 2, 1), head_dim, torch.bfloat16)
    for seed in SEEDS:
        out, lse = simulate(q, k, v, seed, causal=causal)
        check_forward(q, k, v, out, lse, causal=causal)
        assert counter.tolist() == [0, 0]


def assert_rounded_alike(out, expected):
    """A probability rounded the other way changes out by eps times itself times a value of V."""
    eps = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, expected, rtol=eps, atol=eps / 4)


def cases_of_six_heads():
    """Tiles are more than blocks, and some rows are unused."""
    lengths = ((37, 131), (0, 9), (150, 70), (1, 1))
    rows = {
        "learnable_sink": torch.tensor([-1.0, 0.5, -torch.inf, 2.0, 0.0, 1.0]),
        "seqused_q": torch.tensor([37, 0, 131, 1], dtype=torch.int32),
    }
    for instance in forward_instances(varlen=True):
        if "bf16" in instance:
            arguments = arguments_for(instance, window(len(instance))) | rows
            yield PackedCase(instance, lengths, arguments, heads=6, heads_kv=2)


@pytest.mark.parametrize("case", list(cases_of_six_heads()), ids=str)
def test_heads_that_share_tiles(case):
    """Heads that share tiles have the results of heads with tiles of their own, but for rounding.

    The simulator's float32 products depend on where in a tile a row is.
    """
    q, k, v = case.inputs()
    expected = simulate_packed(q, k, v, case.lengths, pack_gqa=False, **case.arguments)
    for seed in case.seeds:
        out, lse = simulate_packed(q, k, v, case.lengths, seed, pack_gqa=True, **case.arguments)
        assert_rounded_alike(out, expected[0])
        torch.testing.assert_close(lse, expected[1], rtol=1e-6, atol=1e-6)


def test_gathered_rows_beside_gemms_of_others(monkeypatch):
    """One consumer gathers its rows while the other's GEMM reads its own, which lie between."""
    monkeypatch.setattr(target, "SIMULATED_SMS", 1)
    q, k, v = packed_inputs("fwd_bf16_d128_varlen", ((127, 1),), heads=4, heads_kv=2)
    out, lse = simulate_packed(q, k, v, ((127, 1),), 0, pack_gqa=True)
    check_packed(q, k, v, out, lse, ((127, 1),))


@both
@pytest.mark.parametrize("shape", [Shape(2, 5, 300, 8, 1), Shape(1, 70, 70, 6, 2)], ids=str)
def test_dense_heads_that_share_tiles(monkeypatch, shape):
    monkeypatch.setattr(target, "SIMULATED_SMS", 2)
    q, k, v = random_inputs(shape, 120, torch.bfloat16)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    out, lse = simulate(q, k, v, pack_gqa=True, causal=True)
    check_forward(q, k, v, out, lse, causal=True)
    assert_rounded_alike(out, simulate(q, k, v, pack_gqa=False, causal=True)[0])


@both
def test_few_queries_share_tiles_unasked():
    q, k, v = random_inputs(Shape(1, 8, 64, 8, 2), 64, torch.bfloat16)
    grids = []
    for pack_gqa in (None, True, False):
        with simulator.enabled(), runtime.intercepted(lambda _, *ask: grids.append(ask[1][0])):
            flash_attn_func(q, k, v, pack_gqa=pack_gqa)
    assert grids == [2, 2, 8]


@pytest.mark.parametrize(
    "instance",
    [n for v in (False, True) for n in forward_instances(varlen=v) if "causal" in n],
)
def test_float32_is_what_the_result_is_rounded_from(instance):
    q, k, v = inputs_for(instance, EDGE_SHAPE)
    config = manifest.instances()[instance].config
    q, v = q[..., : config["head_dim"] - 8], v[..., : config["head_dim_v"] - 8]
    k, pack_gqa = k[..., : q.shape[-1]], config["varlen"]
    rounded, lse = simulate(q, k, v, pack_gqa=pack_gqa, causal=True)
    out, same_lse = simulate(q, k, v, pack_gqa=pack_gqa, causal=True, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert torch.equal(out.to(rounded.dtype), rounded) and torch.equal(same_lse, lse)
    exact, _ = reference.attention(
        q, k, v, softmax_scale=q.shape[-1] ** -0.5, mask=CAUSAL, compute_dtype=torch.float64
    )
    assert Error.of(out, exact).rms < Error.of(rounded, exact).rms


def test_sm_margin():
    q, k, v = random_inputs(EDGE_SHAPE, 64, torch.bfloat16)
    grids = []
    for sm_margin in (0, 100):
        with simulator.enabled(), runtime.intercepted(lambda _, *ask: grids.append(ask[1])):
            flash_attn_func(q.repeat(60, 1, 1, 1), k.repeat(60, 1, 1, 1), v.repeat(60, 1, 1, 1),
                            sm_margin=sm_margin)  # fmt: skip
    assert grids == [(120, 1, 1), (32, 1, 1)]


@both
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_large_logits(head_dim):
    """All scores far above or far below 0: exponentials would overflow or vanish unshifted."""
    q, k, v = random_inputs(EDGE_SHAPE, head_dim, torch.bfloat16, scale=8.0)
    for sign in (1, -1):
        out, lse = simulate(q.abs() * sign, k.abs(), v)
        check_forward(q.abs() * sign, k.abs(), v, out, lse)
        assert lse.abs().min() > 100


@both
def test_negative_scores_that_grow():
    """Far below 0, and each key block above those before: with a stale maximum they overflow."""
    q, k, v = random_inputs(Shape(1, 70, 512, 2, 2), 128, torch.bfloat16, scale=16.0)
    q, k = q.abs(), -k.abs()
    for block in range(4):
        k[:, 128 * block : 128 * (block + 1)] *= 0.1 * (block + 1)
    out, lse = simulate(q, k, v)
    check_forward(q, k, v, out, lse)
    assert lse.max() < -10


@both
def test_softmax_scale():
    q, k, v = random_inputs(EDGE_SHAPE, 64, torch.bfloat16)
    arguments = {"softmax_scale": 0.5, "causal": True}
    check_forward(q, k, v, *simulate(q, k, v, **arguments), **arguments)


@both
def test_nan_in_a_key_reaches_just_the_queries_that_see_it():
    q, k, v = random_inputs(EDGE_SHAPE, 128, torch.bfloat16)
    clean, _ = simulate(q, k, v, causal=True)
    k[:, 205] = torch.nan
    out, lse = simulate(q, k, v, causal=True)
    first = 205 - (EDGE_SHAPE.seqlen_k - EDGE_SHAPE.seqlen_q)
    assert torch.equal(out[:, :first], clean[:, :first])
    assert out[:, first:].isnan().all() and lse[..., first:].isnan().all()


@both
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
    check_forward(q, k, v, *simulate(*far))


@pytest.mark.parametrize(
    ("shape", "arguments", "blocks"),
    [
        (Shape(1, 192, 192, 1, 1), {"causal": True}, (1, 1, 2)),
        (Shape(1, 192, 300, 1, 1), {"causal": True}, (2, 2, 3)),
        (Shape(1, 192, 90, 1, 1), {"causal": True}, (0, 1, 1)),
        (Shape(1, 40, 300, 1, 1), {}, (3, 0, 0)),
        (Shape(1, 192, 300, 1, 1), {"window_size": (20, 0)}, (2, 2, 2)),
    ],
    ids=lambda value: str(value) if isinstance(value, (Shape, dict)) else None,
)
def test_a_consumer_computes_the_blocks_that_its_rows_see(shape, arguments, blocks):
    """Tiles of d64 are 192 rows; a block is 128 keys, with windows 112."""
    q, k, v = random_inputs(shape, 64, torch.bfloat16)
    with simulator.record() as recording:
        check_forward(q, k, v, *simulate(q, k, v, **arguments), **arguments)
    (trace,) = recording.traces
    keys = 112 if "window_size" in arguments else 128
    found = [sum(step.kind == "wgmma" for step in trace.warps[4 * w]) for w in (1, 2, 3)]
    assert found == [n * (64 // 16 + keys // 16) for n in blocks]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("arguments", [{"causal": True}, {"window_size": (20, 0)}], ids=str)
@pytest.mark.parametrize("pack_gqa", [False, True])
def test_a_ragged_last_block_that_some_consumers_skip(pack_gqa, arguments, seed, monkeypatch):
    """One block computes all tiles; NaN lies behind every sequence's last key.

    All consumers zero the rows of V behind the last key, those too that do not read the block.
    """
    monkeypatch.setattr(target, "SIMULATED_SMS", 1)
    lengths = ((192, 200), (40, 130), (150, 150), (0, 7), (64, 129))
    rows = [sum(side) for side in zip(*lengths)]
    q, k, v = (
        torch.randn(n + 9, h, 64, generator=torch.Generator().manual_seed(n + h)).bfloat16()
        for n, h in ((rows[0], 2), (rows[1], 1), (rows[1], 1))
    )
    for x in (k, v):
        x[rows[1] :] = torch.nan
    starts = [offsets(side) for side in zip(*lengths)]
    with simulator.enabled(seed=seed):
        out, lse = flash_attn_varlen_func(
            q, k, v, *starts, 192, 200, pack_gqa=pack_gqa, return_lse=True, **arguments
        )
    check_packed(q, k, v, out, lse, lengths, **arguments)
