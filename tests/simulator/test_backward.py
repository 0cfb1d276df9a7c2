"""Every backward instance, interpreted from its PTX behind autograd, against FP64."""

from __future__ import annotations

import contextlib
import os
import random
import re
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from support import ampere
from support.judge import check_backward, check_packed_backward
from support.problems import (
    PACKED,
    SHAPES,
    TORCH_DTYPES,
    WINDOWS,
    Arguments,
    Case,
    PackedCase,
    Pairs,
    Shape,
    arguments_for,
    backward_instances,
    label,
    lengths_label,
    packed_inputs,
    random_inputs,
    seeds_label,
    window,
)
from support.simulate import differentiate, leaves, like, packed
from support.strategies import Problem, Side, check_dense_gradients, check_varlen_gradients

from hopper_attention import flash_attn_func, flash_attn_varlen_func, simulator
from hopper_attention.dispatch import manifest
from hopper_attention.launch import backward

pytestmark = pytest.mark.simulator
both = pytest.mark.usefixtures("kernels")
"""Hopper's and Ampere's."""

EDGE_SHAPE = Shape(1, 150, 210, 2, 1)
HEAD_DIMS = (64, 96, 128, 192, 256)
LENGTHS = ((0, 0), (70, 150), (0, 5), (150, 40), (7, 0), (1, 1), (0, 0))


def with_kernels(name, hopper, ampere):
    """Cases with Hopper's kernels, and with Ampere's, of which few tell: they are one program."""
    cases = [("hopper", case) for case in hopper] + [("ampere", case) for case in ampere]
    mark = pytest.mark.parametrize(("kernels", name), cases, indirect=["kernels"], ids=str)
    return lambda test: mark(both(test))


per_head_dim = with_kernels("head_dim", HEAD_DIMS, (64, 96))
"""Ampere's swizzle shared memory differently."""


def seeds(number):
    """A schedule that the simulator's first one is held against takes turns."""
    return 0, 1 + number % 3


def dense_cases():
    """Every instance has another shape: together they have all of them, in every mask.

    Instances with fp16 share all code but the conversions with bf16, and have one shape.
    """
    for number, instance in enumerate(backward_instances(varlen=False)):
        other = SHAPES[number % len(SHAPES)]
        for shape in (other,) if "fp16" in instance else (EDGE_SHAPE, other):
            yield Case(instance, shape, arguments_for(instance, window(number)), seeds(number))


@pytest.mark.parametrize("case", list(dense_cases()), ids=str)
def test_matches_fp64_for_every_schedule(case):
    """dQ is a sum in any order: seeds may differ in its last bits, dK and dV not at all."""
    q, k, v = case.inputs()
    results = []
    for seed in case.seeds:
        dout, gradients = differentiate(flash_attn_func, q, k, v, seed, **case.arguments)
        check_backward(q, k, v, dout, gradients, **case.arguments)
        results.append(gradients)
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:]))


def packed_cases():
    for instance in backward_instances(varlen=True):
        number = len(instance)
        arguments = arguments_for(instance, window(number))
        yield PackedCase(instance, LENGTHS, arguments, seeds=seeds(number))


@pytest.mark.parametrize("case", list(packed_cases()), ids=str)
def test_packed_sequences_match_fp64_for_every_schedule(case):
    q, k, v = case.inputs()
    results = []
    for seed in case.seeds:
        dout, gradients = differentiate(packed(case.lengths), q, k, v, seed, **case.arguments)
        check_packed_backward(q, k, v, dout, gradients, case.lengths, **case.arguments)
        results.append(gradients)
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:]))


def test_more_sequences_than_lanes():
    q, k, v = packed_inputs("bwd_bf16_d64_causal_varlen", PACKED[1])
    dout, gradients = differentiate(packed(PACKED[1]), q, k, v, causal=True)
    check_packed_backward(q, k, v, dout, gradients, PACKED[1], causal=True)


@with_kernels("head_dim", (8, 40, 72, 80, 88, 112, 120, 160, 200, 224), (40, 88, 160))
def test_head_dims_between_the_tiles(head_dim):
    q, k, v = random_inputs(EDGE_SHAPE, head_dim, torch.bfloat16)
    dout, gradients = differentiate(flash_attn_func, q, k, v, causal=True)
    check_backward(q, k, v, dout, gradients, causal=True)


@with_kernels("dims", ((192, 128), (72, 16), (8, 120)), ((72, 16), (8, 120)))
def test_v_of_another_head_dim(dims):
    head_dim, head_dim_v = dims
    q, k, v = random_inputs(EDGE_SHAPE, head_dim, torch.bfloat16, head_dim_v=head_dim_v)
    dout, gradients = differentiate(flash_attn_func, q, k, v, 1, causal=True)
    check_backward(q, k, v, dout, gradients, causal=True)


@with_kernels("head_dim", (64, 256), (64,))
@pytest.mark.parametrize("arguments", [{}, {"causal": True}, {"window_size": (40, 0)}], ids=str)
def test_sinks_and_lse(head_dim, arguments):
    """Each head its own sink; with masks, there are rows that have the sink alone."""
    q, k, v = random_inputs(Shape(1, 203, 113, 4, 2), head_dim, torch.bfloat16)
    sink = torch.tensor([-3.0, 0.0, 2.5, -20.0 if arguments else -torch.inf])
    dlse = torch.randn(1, 4, 203, generator=torch.Generator().manual_seed(1))
    arguments = {**arguments, "learnable_sink": sink}
    dout, gradients = differentiate(flash_attn_func, q, k, v, dlse=dlse, **arguments)
    check_backward(q, k, v, dout, gradients, dlse=dlse, **arguments)


@both
def test_sinks_of_packed_sequences():
    q, k, v = packed_inputs("bwd_bf16_d64_varlen", LENGTHS)
    sink = torch.tensor([0.5, -1.0])
    dout, gradients = differentiate(packed(LENGTHS), q, k, v, learnable_sink=sink)
    check_packed_backward(q, k, v, dout, gradients[:3], LENGTHS, learnable_sink=sink)
    plain = leaves((q, k, v, sink))
    out = packed(LENGTHS)(*plain[:3], learnable_sink=plain[3])
    (expected,) = torch.autograd.grad(out, plain[3:], dout)
    torch.testing.assert_close(gradients[3], expected, rtol=1e-2, atol=1e-2)


@per_head_dim
def test_large_logits(head_dim):
    """LSE below -100 and above 100: exp(-LSE) overflows for rows and keys that do not exist."""
    for shape in (Shape(1, 65, 127, 1, 1), Shape(1, 1, 193, 1, 1)):
        q, k, v = random_inputs(shape, head_dim, torch.bfloat16, scale=8.0)
        for sign in (1, -1):
            rows = q.abs() * sign
            dout, gradients = differentiate(flash_attn_func, rows, k.abs(), v)
            check_backward(rows, k.abs(), v, dout, gradients)


@per_head_dim
def test_scores_with_few_digits(head_dim):
    """Probabilities remain at most 1 where float32 is off by more than 1, sinks' as well."""
    q, k, v = random_inputs(Shape(1, 70, 90, 2, 1), head_dim, torch.bfloat16, scale=10.0)
    sink = torch.tensor([9e8, -3.0])
    inputs = leaves((q, k, v, sink))
    with simulator.enabled():
        out = flash_attn_func(*inputs[:3], learnable_sink=inputs[3], softmax_scale=1e6)
        dout = like(out)
        dq, dk, dv, dsink = torch.autograd.grad(out, inputs, dout)
    most = dout.float().abs().sum(dim=(1, 2))
    assert (dv[:, :, 0].float().abs() <= 1.01 * most[:, None]).all()
    # |dS| <= |dP| + |delta|, both at most the product of these norms.
    ds = 2 * dout.float().norm(dim=-1).sum() * v.float().norm(dim=-1).max()
    assert (dk.float().abs() <= 1e6 * ds * q.float().abs().max()).all()
    assert dq.isfinite().all() and (dsink.abs() <= ds).all()


@per_head_dim
def test_any_strides_and_memory_around(head_dim):
    """Head-major storage, slices of one tensor, NaN behind the last rows, a strided dout."""
    q, k, v = random_inputs(EDGE_SHAPE, head_dim, torch.bfloat16)
    dout = like(q, 2)

    def in_nan(x):
        padded = x.new_full((x.shape[0] + 1, x.shape[1] + 70, *x.shape[2:]), torch.nan)
        padded[:-1, :-70] = x
        return padded[:-1, :-70]

    def head_major(x):
        return in_nan(x.transpose(1, 2)).transpose(1, 2)

    results = []
    for arrange in (torch.Tensor.contiguous, in_nan, head_major):
        inputs = [arrange(x.detach()).requires_grad_() for x in (q, k, v)]
        with simulator.enabled():
            out = flash_attn_func(*inputs, causal=True)
            results.append(torch.autograd.grad(out, inputs, arrange(dout)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@both
def test_expanded_dout():
    inputs = leaves(random_inputs(EDGE_SHAPE, 64, torch.bfloat16))
    with simulator.enabled():
        out = flash_attn_func(*inputs)
        gradients = torch.autograd.grad(out.sum(), inputs)
    check_backward(*inputs, torch.ones_like(out), gradients)


@per_head_dim
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_packed_neighbours_do_not_leak(head_dim, causal):
    """A sequence of NaN between others, whose last tiles reach into it."""
    lengths = ((70, 90), (30, 50), (60, 70))
    total_q, total_k = (sum(side) for side in zip(*lengths))
    tensors = random_inputs(Shape(1, total_q, total_k, 2, 1), head_dim, torch.bfloat16)
    q, k, v = (x[0] for x in tensors)
    dout = like(q, 3)
    for x, rows in ((q, slice(70, 100)), (dout, slice(70, 100)), (k, slice(90, 140)),
                    (v, slice(90, 140))):  # fmt: skip
        x[rows] = torch.nan
    inputs = leaves((q, k, v))
    with simulator.enabled(seed=1):
        out = packed(lengths)(*inputs, causal=causal)
        gradients = torch.autograd.grad(out, inputs, dout)
    for rows, keys in ((slice(0, 70), slice(0, 90)), (slice(100, 160), slice(140, 210))):
        one = (x[None] for x in (q[rows], k[keys], v[keys], dout[rows]))
        parts = [g[at][None] for g, at in zip(gradients, (rows, keys, keys))]
        check_backward(*one, parts, causal=causal)


@both
def test_used_lengths():
    """Padded tensors of which parts are used: the rest is not read, and has no gradient."""
    q, k, v = random_inputs(Shape(3, 140, 180, 2, 1), 64, torch.bfloat16)
    used_q, used_k = (torch.tensor(n, dtype=torch.int32) for n in ((140, 33, 0), (77, 180, 9)))
    dout = like(q, 4)
    for b in range(3):
        for x, used in ((q, used_q), (dout, used_q), (k, used_k), (v, used_k)):
            x[b, used[b] :] = torch.nan
    inputs = leaves((q, k, v))
    with simulator.enabled():
        out = flash_attn_varlen_func(*inputs, None, None, 140, 180, used_q, used_k, causal=True)
        gradients = torch.autograd.grad(out, inputs, dout)
    for b, (n, m) in enumerate(zip(used_q, used_k)):
        one = (x[b : b + 1] for x in (q[:, :n], k[:, :m], v[:, :m], dout[:, :n]))
        parts = [g[b : b + 1, :used] for g, used in zip(gradients, (n, m, m))]
        check_backward(*one, parts, causal=True)
        assert all((g[b, used:] == 0).all() for g, used in zip(gradients, (n, m, m)))


@both
def test_packed_tensors_without_sequences():
    """Nothing is looked up or computed; gradients of rows of no sequence are 0."""
    nothing = torch.zeros(1, dtype=torch.int32)
    inputs = leaves([x[0] for x in random_inputs(Shape(1, 5, 5, 2, 1), 64, torch.bfloat16)])
    with simulator.enabled():
        out = flash_attn_varlen_func(*inputs, nothing, nothing, 5, 5)
        gradients = torch.autograd.grad(out.sum(), inputs)
    assert (out == 0).all() and all((g == 0).all() for g in gradients)


@both
def test_rows_behind_the_last_sequence_have_no_gradient():
    lengths = ((10, 20), (15, 5))
    inputs = leaves([x[0] for x in random_inputs(Shape(1, 40, 40, 2, 1), 64, torch.bfloat16)])
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        with simulator.enabled():
            out = packed(lengths)(*inputs)
            gradients = torch.autograd.grad(out.sum(), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(g[:25].isfinite().all() and (g[25:] == 0).all() for g in gradients)


@both
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_lse_gradient_of_rows_without_keys_does_not_matter(value):
    """log(exp(-inf) + exp(-inf)) has NaN as gradient, where results without keys are merged."""
    q, k, v = leaves(random_inputs(Shape(1, 20, 10, 2, 2), 64, torch.bfloat16))
    with simulator.enabled():
        out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
        dlse = torch.zeros_like(lse)
        expected = torch.autograd.grad((out, lse), (q, k, v), (out, dlse), retain_graph=True)
        dlse[..., :10] = value
        found = torch.autograd.grad((out, lse), (q, k, v), (out, dlse))
    assert all(g.isfinite().all() for g in found)
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])


FOUR = (0, 1, 2, 3)
DETERMINISTIC = (
    Case("bwd_bf16_d64_causal", Shape(1, 260, 400, 2, 1), {"causal": True}, FOUR),
    Case("bwd_bf16_d96_local", Shape(1, 400, 400, 1, 1), {"window_size": (100, 30)}, FOUR),
    Case("bwd_bf16_d192", Shape(1, 130, 200, 2, 1), {}, FOUR),
)
FEW = Case("ampere_bwd_bf16_d64", Shape(1, 130, 260, 2, 1), {"causal": True}, FOUR)


@pytest.fixture
def sums(monkeypatch):
    """The float32 dQ of every backward: rounding it hides most other orders of its summands."""
    kept = []
    make = backward.Workspace.like

    def like(*arguments):
        workspace = make(*arguments)
        kept.append(workspace.dq.zero_())  # gaps between sequences
        return workspace

    monkeypatch.setattr(backward.Workspace, "like", like)
    return kept


def all_equal(runs):
    return all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@with_kernels("case", DETERMINISTIC, (FEW,))
def test_deterministic(case, sums):
    """Every schedule gives the same bits; tests/gpu has the 1,000 runs."""
    q, k, v = case.inputs()
    runs = [
        differentiate(flash_attn_func, q, k, v, seed, deterministic=True, **case.arguments)
        for seed in case.seeds
    ]
    check_backward(q, k, v, *runs[0], **case.arguments)
    assert all_equal([gradients for _, gradients in runs])
    assert all_equal([(dq,) for dq in sums])


DETERMINISTIC_PACKED = PackedCase(
    "bwd_bf16_d128_causal_varlen", (*LENGTHS, (150, 400)), {"causal": True}, seeds=FOUR
)
FEW_PACKED = PackedCase(
    "ampere_bwd_bf16_d64", ((0, 5), (70, 150), (70, 270)), {"causal": True}, seeds=FOUR
)


@with_kernels("case", (DETERMINISTIC_PACKED,), (FEW_PACKED,))
def test_deterministic_packed(case, sums):
    q, k, v = case.inputs()
    function = packed(case.lengths)
    runs = [
        differentiate(function, q, k, v, seed, deterministic=True, **case.arguments)[1]
        for seed in case.seeds
    ]
    assert all_equal(runs) and all_equal([(dq,) for dq in sums])


TILE_LENGTHS = (1, 63, 64, 65, 127, 129)
HEADS = {"mha": (2, 1), "gqa": (2, 2), "mqa": (1, 2)}
"""heads_kv, and query heads of each."""
LAYOUTS = ("packed", "queries padded", "keys padded", "both padded")


@dataclass(frozen=True)
class TileCase:
    """Sequences whose lengths are around a tile's, in one layout."""

    instance: str
    heads: str
    layout: str
    lengths: Pairs
    arguments: Arguments
    seed: int
    """The values' seed; schedules are chosen by it, too."""

    @classmethod
    def drawn(cls, instance, heads, layout):
        """Lengths, a window and Ampere's variant are drawn by the rest."""
        generator = random.Random(f"{instance} {heads} {layout}")
        lengths = tuple(tuple(generator.choices(TILE_LENGTHS, k=2)) for _ in range(2))
        number = generator.randrange(len(WINDOWS))
        if "ampere" in instance:
            variant = generator.choice(ampere.VARIANTS)
            arguments = ampere.arguments_for(variant, window(number))
        else:
            arguments = arguments_for(instance, window(number))
        lengths = lengths[:1] if layout == "dense" else lengths
        return cls(instance, heads, layout, lengths, arguments, number)

    def __str__(self):
        parts = (self.heads, self.layout, lengths_label(self.lengths), self.arguments)
        return label(self.instance, *parts, seeds_label(seeds(self.seed)))


def tile_cases():
    """Cases of the wide kernels, whose consumers add dQ in different steps, and of a few others.

    Each is for bf16, with one grouping of heads and one layout, in turn: masks and dtypes share all
    code that takes turns.  With HOPPER_ATTENTION_FUZZ every instance has all groupings and layouts.
    """
    every = bool(os.environ.get("HOPPER_ATTENTION_FUZZ"))
    instances = [name for varlen in (True, False) for name in backward_instances(varlen=varlen)]
    for architecture in ("sm_80", "sm_90") if every else ("sm_80",):
        instances += ampere.instances("ampere_backward", architecture)
    if not every:
        wide = [name for name in instances if re.match(r"bwd_bf16_d(192|256)\S*_varlen", name)]
        instances = wide + [name for name in instances if "bf16" in name and name not in wide][::6]
    for number, instance in enumerate(instances):
        dense = manifest.instances()[instance].config.get("varlen") is False
        layouts = ("dense",) if dense else LAYOUTS
        ways = list(product(HEADS, layouts))
        turn = (number % 3) * len(layouts) + number // 3 % len(layouts)
        for heads, layout in ways if every else ways[turn:][:1]:
            yield TileCase.drawn(instance, heads, layout)


@pytest.mark.parametrize("case", list(tile_cases()), ids=str)
def test_deterministic_lengths_around_the_tile(case, sums, monkeypatch):
    """No two roles wait for each other, and the sums have the same bits under either schedule."""
    config = manifest.instances()[case.instance].config
    device = contextlib.nullcontext()
    if "ampere" in case.instance:
        device = ampere.device_of(monkeypatch, case.instance)
    problem = Problem(
        TORCH_DTYPES[config["dtype"]], config["head_dim"], config["head_dim_v"],
        *HEADS[case.heads], case.lengths, None, case.arguments, None, ("contiguous",) * 3,
        1.0, case.seed, deterministic=True,
    )  # fmt: skip
    sides = [
        Side(case.layout not in (f"{side} padded", "both padded"), allotted, 7, "exact")
        for side, allotted in zip(("queries", "keys"), zip(*case.lengths))
    ]
    runs = []
    with device:
        for seed in seeds(case.seed):
            with simulator.enabled(seed=seed):
                if case.layout == "dense":
                    runs.append(check_dense_gradients(problem, "cpu"))
                else:
                    runs.append(check_varlen_gradients(problem, *sides, "cpu"))
    assert all_equal(runs) and all_equal([(dq,) for dq in sums])


@both
def test_offsets_beyond_32_bits():
    """Batch strides of more than 2^31 elements; only the pages in use are ever touched."""
    stride = 2**31 + 4096
    storage = torch.empty(stride + 4096 * 16, dtype=torch.bfloat16)
    q, k, v = random_inputs(Shape(2, 40, 70, 1, 1), 64, torch.bfloat16)
    dout = like(q, 5)
    far = []
    for offset, x in ((0, q), (2**14, k), (2**15, v), (3 * 2**14, dout)):
        view = storage.as_strided(x.shape, (stride, 64, 64, 1), offset)
        view.copy_(x)
        far.append(view)
    inputs = [x.requires_grad_() for x in far[:3]]
    with simulator.enabled():
        out = flash_attn_func(*inputs)
        gradients = torch.autograd.grad(out, inputs, far[3])
    check_backward(q, k, v, dout, gradients)


@pytest.mark.parametrize("instance", ["bwd_bf16_d64", "bwd_bf16_d128_causal", "bwd_bf16_d256"])
def test_the_semaphore_is_raised_when_all_have_added(instance):
    """The turn, sums, a fence, then the warp that raises it: schedules hardly show it."""
    text = manifest.ptx_path(instance).read_text()
    text = re.sub(r"bar\.sync\s+(?:%\w+|[45]), 160", "own turn", text)
    kinds = (
        r"red\.global\.add\.v4|fence\.acq_rel\.gpu|red\.release\.gpu"
        r"|own turn|bar\.(?:sync|arrive)\s+[456]"
    )
    order = [re.sub(r"\s+", " ", found) for found in re.findall(kinds, text)]
    sums = order.count("red.global.add.v4") // order.count("fence.acq_rel.gpu")
    consumer = ["own turn", *["red.global.add.v4"] * sums, "fence.acq_rel.gpu", "bar.arrive 6"]
    giver = ["bar.arrive 4", "bar.arrive 5", "bar.sync 6", "red.release.gpu"]
    assert sums > 0 and order[:4] == giver
    assert order[4:] == consumer * (len(order[4:]) // len(consumer))
