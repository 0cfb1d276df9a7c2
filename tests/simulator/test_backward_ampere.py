"""Every Ampere backward instance, interpreted from its PTX behind autograd, against FP64.

What does not depend on the instance is tested with both backends in test_backward.py.
"""

from __future__ import annotations

import re

import pytest
import torch
from support.ampere import VARIANTS, arguments_for, device_of, instances, launched
from support.judge import check_backward, check_packed_backward
from support.problems import (
    TORCH_DTYPES,
    Case,
    PackedCase,
    Shape,
    inputs_for,
    random_inputs,
    window,
)
from support.simulate import differentiate, leaves, packed

from hopper_attention import backend, flash_attn_func, simulator
from hopper_attention.dispatch import manifest, target
from hopper_attention.launch import backward
from hopper_attention.problem.values import Options

pytestmark = pytest.mark.simulator

FAMILY = "ampere_backward"
DENSE = (Shape(1, 113, 147, 1, 1), Shape(1, 67, 70, 2, 1), Shape(1, 131, 70, 1, 1))
"""Blocks of each tile that are full, that end early, heads of a group, rows without keys."""
LENGTHS = ((0, 0), (70, 90), (0, 5), (1, 1), (7, 0), (0, 0))


def cases():
    """All instances are one program for other tiles; fp16 shares all but conversions."""
    for number, instance in enumerate(instances(FAMILY)):
        shapes = DENSE[:2] if "bf16" in instance else DENSE[1 + number % 2 :][:1]
        for i, shape in enumerate(shapes):
            variant = VARIANTS[(number + 2 * i) % len(VARIANTS)]
            arguments = arguments_for(variant, window(number))
            yield Case(instance, shape, arguments, seeds=(0, 1 + number % 3))


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_matches_fp64_for_every_schedule(monkeypatch, case):
    """dQ is a sum in any order: seeds may differ in its last bits, dK and dV not at all."""
    q, k, v = case.inputs()
    results = []
    with device_of(monkeypatch, case.instance):
        for seed in case.seeds:
            dout, gradients = differentiate(flash_attn_func, q, k, v, seed, **case.arguments)
            check_backward(q, k, v, dout, gradients, **case.arguments)
            results.append(gradients)
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:]))


def packed_case(instance):
    arguments = arguments_for(VARIANTS[len(instance) % 3], window(len(instance)))
    return PackedCase(instance, LENGTHS, arguments, seeds=(1,))


@pytest.mark.parametrize("case", list(map(packed_case, instances(FAMILY, dtype="bf16"))), ids=str)
def test_packed_sequences_match_fp64(monkeypatch, case):
    q, k, v = case.inputs()
    with device_of(monkeypatch, case.instance):
        function = packed(case.lengths)
        dout, gradients = differentiate(function, q, k, v, *case.seeds, **case.arguments)
    check_packed_backward(q, k, v, dout, gradients, case.lengths, **case.arguments)


@pytest.mark.parametrize("instance", instances(FAMILY, "sm_90"))
def test_what_hopper_runs_gives_the_same(monkeypatch, instance):
    """Compiled for sm_90 it is a second opinion on Hopper's kernels."""
    seqlen_k = manifest.instances()[instance].config["tile_n"] + 6
    q, k, v = inputs_for(instance, Shape(1, 65, seqlen_k, 1, 1))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = flash_attn_func(q, k, v, return_lse=True)  # whose tiles may differ
    options = Options.of(deterministic=True)
    saved = (torch.ones_like(out), None, out, lse, q, k, v, *[None] * 5)
    results = []
    for seed, name in enumerate((instance, instance.removesuffix("_sm90"))):
        with device_of(monkeypatch, name), simulator.enabled(seed=seed):
            results.append(torch.ops.hopper_attention.backward(*saved, *options)[:3])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("instance", instances(FAMILY, dtype="bf16"))
def test_the_semaphore_is_raised_when_all_have_added(instance):
    """Every thread's sums, its fence, all threads, then the counter: schedules hardly show it."""
    text = manifest.ptx_path(instance).read_text()
    kinds = r"(red\.global\.add\.f32|fence\.acq_rel\.gpu|bar\.sync|red\.release\.gpu)"
    order = re.findall(kinds, text)
    end = order.index("red.release.gpu")
    assert order.count("red.release.gpu") == 1
    assert order[end - 3 : end] == ["red.global.add.f32", "fence.acq_rel.gpu", "bar.sync"]


CAPABILITIES = {(8, 0): "", (8, 6): "_small", (8, 7): "", (8, 9): "_small", (9, 0): "_sm90"}


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_devices_get_tiles_that_fit(monkeypatch, dtype, capability):
    suffix = CAPABILITIES[capability]
    architecture = "_sm90" if capability == (9, 0) else ""
    monkeypatch.setitem(target.SIMULATED, "ampere", capability)
    inputs = leaves(random_inputs(DENSE[1], 128, TORCH_DTYPES[dtype]))
    with backend("ampere"), simulator.enabled():
        found = launched(lambda: flash_attn_func(*inputs).sum().backward())
        assert backward.workspace_bytes(inputs[0], inputs[2]) == 256 * (128 + 2) * 4
    assert found[1:] == [
        f"ampere_bwd_pre_{dtype}{architecture}",
        f"ampere_bwd_{dtype}_d128{suffix}",
        f"ampere_bwd_post_{dtype}{architecture}",
    ]
