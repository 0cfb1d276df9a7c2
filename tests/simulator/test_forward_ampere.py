"""Every Ampere forward instance, interpreted from its PTX, against FP64.

What does not depend on the instance is tested with both backends: test_forward.py and others.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.ampere import VARIANTS, arguments_for, device_of, instances, launched
from support.judge import check_forward, check_packed
from support.problems import (
    PACKED,
    SHAPES,
    TORCH_DTYPES,
    Case,
    PackedCase,
    Shape,
    inputs_for,
    random_inputs,
    window,
)
from support.simulate import simulate, simulate_packed

from hopper_attention import backend, flash_attn_func, reference, simulator
from hopper_attention.dispatch import manifest, target
from hopper_attention.launch import runtime
from hopper_attention.problem.values import CAUSAL
from hopper_attention.reference.error import Error

pytestmark = pytest.mark.simulator

FAMILY = "ampere_forward"
FEW = (Shape(1, 203, 113, 1, 1), Shape(1, 97, 131, 2, 1))
FEW_PACKED = (((0, 0), (70, 90), (0, 5), (1, 1), (7, 0), (40, 120)),)

packed = partial(simulate_packed, bounded=False)


def thorough(instance: str) -> bool:
    """All instances are one program for other tiles: a few shapes tell whether the tiles fit."""
    return instance in ("ampere_fwd_bf16_d64", "ampere_fwd_bf16_d128")


def cases():
    for instance in instances(FAMILY):
        for variant in VARIANTS if "bf16" in instance else VARIANTS[1:2]:
            every = VARIANTS.index(variant) % 2
            shapes = SHAPES[every::2] if thorough(instance) else FEW[every:]
            found = [
                Case(instance, shape, arguments_for(variant, window(len(instance) + number)))
                for number, shape in enumerate(shapes)
            ]
            yield pytest.param(instance, found, id=f"{instance}-{variant}")


@pytest.mark.parametrize(("instance", "cases"), list(cases()))
def test_matches_fp64_for_every_schedule(monkeypatch, instance, cases):
    with device_of(monkeypatch, instance):
        for case in cases:
            print(case)
            q, k, v = case.inputs()
            first, second = (simulate(q, k, v, seed, **case.arguments) for seed in case.seeds)
            check_forward(q, k, v, *first, **case.arguments)
            assert all(torch.equal(a, b) for a, b in zip(first, second))


def packed_cases():
    for instance in instances(FAMILY):
        lengths = PACKED if thorough(instance) else FEW_PACKED
        masks = [arguments_for(name, window(len(instance))) for name in ("causal", "local")]
        found = [PackedCase(instance, *both) for both in zip(lengths, masks)]
        yield pytest.param(instance, found, id=instance)


@pytest.mark.parametrize(("instance", "cases"), list(packed_cases()))
def test_packed_sequences_match_fp64_for_every_schedule(monkeypatch, instance, cases):
    with device_of(monkeypatch, instance):
        for case in cases:
            print(case)
            q, k, v = case.inputs()
            first, second = (packed(q, k, v, case.lengths, s, **case.arguments) for s in case.seeds)
            check_packed(q, k, v, *first, case.lengths, **case.arguments)
            assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("instance", instances(FAMILY, dtype="bf16"))
def test_heads_that_share_tiles(monkeypatch, instance):
    """But for rounding, what they are with tiles of their own: rows lie elsewhere in tiles."""
    lengths = ((37, 131), (0, 9), (60, 70), (1, 1))
    total_q, total_k = (sum(side) for side in zip(*lengths))
    q, k, v = (x[0] for x in inputs_for(instance, Shape(1, total_q, total_k, 6, 2)))
    arguments = {
        "window_size": (60, 10),
        "learnable_sink": torch.tensor([-1.0, 0.5, -torch.inf, 2.0, 0.0, 1.0]),
        "seqused_q": torch.tensor([37, 0, 51, 1], dtype=torch.int32),
    }
    with device_of(monkeypatch, instance):
        expected = packed(q, k, v, lengths, pack_gqa=False, **arguments)
        out, lse = packed(q, k, v, lengths, 1, pack_gqa=True, **arguments)
    eps = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, expected[0], rtol=eps, atol=eps / 4)
    torch.testing.assert_close(lse, expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("instance", instances(FAMILY))
def test_float32_is_what_the_result_is_rounded_from(monkeypatch, instance):
    config = manifest.instances()[instance].config
    q, k, v = inputs_for(instance, Shape(1, 70, 90, 4, 2))
    q, v = q[..., : config["head_dim"] - 8], v[..., : config["head_dim_v"] - 8]
    k = k[..., : q.shape[-1]]
    with device_of(monkeypatch, instance):
        rounded, lse = simulate(q, k, v, pack_gqa=True, causal=True)
        arguments = {"causal": True, "out_dtype": torch.float32}
        out, same_lse = simulate(q, k, v, pack_gqa=True, **arguments)
    assert out.dtype == torch.float32
    assert torch.equal(out.to(rounded.dtype), rounded) and torch.equal(same_lse, lse)
    exact, _ = reference.attention(
        q, k, v, softmax_scale=q.shape[-1] ** -0.5, mask=CAUSAL, compute_dtype=torch.float64
    )
    assert Error.of(out, exact).rms < Error.of(rounded, exact).rms


@pytest.mark.parametrize("instance", instances(FAMILY, dtype="bf16"))
def test_columns_that_blocks_without_mask_lack(monkeypatch, instance):
    """They are zeros before the first load, which does not write them."""
    config = manifest.instances()[instance].config
    keys = 2 * config["tile_n"]
    q, k, v = inputs_for(instance, Shape(1, 5, keys, 1, 1))
    q, k, v = q[..., :-8], k[..., :-8], v[..., :-8]
    with device_of(monkeypatch, instance):
        check_forward(q, k, v, *simulate(q, k, v))


@pytest.mark.parametrize("instance", instances(FAMILY, dtype="bf16"))
def test_blocks_do_several_tiles(monkeypatch, instance):
    """With a margin there are as many blocks as run together; some tiles are without keys."""
    monkeypatch.setattr(target, "SIMULATED_SMS", 2)
    q, k, v = inputs_for(instance, Shape(1, 389, 70, 1, 1))
    arguments = {"causal": True, "sm_margin": 1}
    grids = []
    with device_of(monkeypatch, instance):
        out, lse = simulate(q, k, v, seed=1, **arguments)
        with simulator.enabled(), runtime.intercepted(lambda _, *ask: grids.append(ask[1][0])):
            flash_attn_func(q, k, v, **arguments)
    check_forward(q, k, v, out, lse, causal=True)
    config = manifest.instances()[instance].config
    assert grids[0] <= 3 < -(-389 // config["tile_m"])


@pytest.mark.parametrize("instance", instances(FAMILY, "sm_90"))
def test_what_hopper_runs(monkeypatch, instance):
    """Compiled for sm_90 it is a second opinion on Hopper's kernels."""
    q, k, v = inputs_for(instance, FEW[1])
    arguments = {"window_size": (100, 20)}
    with device_of(monkeypatch, instance):
        check_forward(q, k, v, *simulate(q, k, v, **arguments), **arguments)
        with simulator.enabled():
            assert launched(lambda: flash_attn_func(q, k, v)) == [instance]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_devices_with_less_memory_get_smaller_tiles(monkeypatch, dtype):
    q, k, v = random_inputs(FEW[1], 256, TORCH_DTYPES[dtype])
    for capability, suffix in (((8, 0), ""), ((8, 7), ""), ((8, 6), "_small"), ((8, 9), "_small")):
        monkeypatch.setitem(target.SIMULATED, "ampere", capability)
        with backend("ampere"), simulator.enabled():
            kernels = launched(lambda: flash_attn_func(q, k, v))
        assert kernels == [f"ampere_fwd_{dtype}_d256{suffix}"]
