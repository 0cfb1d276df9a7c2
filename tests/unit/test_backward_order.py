"""Which order of its main loop a backward instance has, and what follows from it."""

from dataclasses import replace

import pytest
from hopper_attention.hopper import instances
from hopper_attention.hopper.backward import config

ALL = [(*dims, *variant) for dims in config.BACKWARD_TILES for variant in instances.VARIANTS]


def backward(dims, mask, softcap):
    return instances._backward("bf16", dims, mask, softcap, False)


@pytest.mark.parametrize(("d", "dv", "mask", "softcap"), ALL)
def test_a_line_selects_the_order(d, dv, mask, softcap, monkeypatch):
    """Names and tiles stay, so that builds of both orders can be compared; softcap has one."""
    monkeypatch.setattr(instances, "LATE_DQ", tuple(config.BACKWARD_TILES))
    late = backward((d, dv), mask, softcap)
    monkeypatch.setattr(instances, "LATE_DQ", ())
    early = backward((d, dv), mask, softcap)
    assert late.config.late_dq == (not softcap) and not early.config.late_dq
    assert not early.config.rounded_p and not early.config.holds_dq_address
    assert early.config.dp_rows == 64
    assert (early.name, early.config.tile_m) == (late.name, late.config.tile_m)


def test_registers_of_late_dq():
    """dP comes at once; P is kept in float32 where there is room, at d96."""
    configs = {
        d: replace(backward((d, d), "full", False).config, late_dq=True) for d in (64, 96, 128)
    }
    assert all(c.parts == 1 for c in configs.values())
    assert [d for d, c in configs.items() if c.rounded_p] == [64, 128]
    assert [d for d, c in configs.items() if c.holds_dq_address] == [96, 128]


def test_softcap_refuses_late_dq():
    with pytest.raises(AssertionError, match="slope"):
        config.BackwardConfig("bf16", 128, 128, "local", True, False, 64, late_dq=True)


def test_no_instance_rounds_p():
    """Until its error is at most twice PyTorch's, or the judge knows better."""
    listed = [i.config for i in instances.BACKWARD if hasattr(i.config, "rounded_p")]
    assert listed and not any(c.rounded_p for c in listed)
