"""Every forward instance on hardware: against FP64, and bit for bit against the simulator."""

from __future__ import annotations

import pytest
import torch
from cases import SHAPES, TORCH_DTYPES, Shape, check_forward, forward_instances, random_inputs

from hopper_attention import flash_attn_func, manifest, simulator

pytestmark = pytest.mark.gpu

LARGE = (Shape(2, 2048, 2048, 8, 2), Shape(1, 1023, 4097, 4, 4), Shape(1, 4097, 1023, 4, 1))


def configuration(instance: str) -> tuple[int, torch.dtype, bool]:
    config = manifest.instances()[instance].config
    return config["head_dim"], TORCH_DTYPES[config["dtype"]], config["causal"]


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
@pytest.mark.parametrize("instance", forward_instances())
def test_matches_fp64(instance, shape):
    head_dim, dtype, causal = configuration(instance)
    q, k, v = random_inputs(shape, head_dim, dtype, device="cuda")
    out, lse = flash_attn_func(q, k, v, causal=causal, return_lse=True)
    check_forward(q, k, v, out, lse, causal=causal)
    again, lse_again = flash_attn_func(q, k, v, causal=causal, return_lse=True)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


@pytest.mark.parametrize("instance", forward_instances())
def test_simulator_agrees(instance):
    """The approximations of exp2, log2 and 1/x may differ in the last place, hence out's by one."""
    head_dim, dtype, causal = configuration(instance)
    q, k, v = random_inputs(Shape(1, 203, 333, 2, 1), head_dim, dtype)
    with simulator.enabled():
        simulated = flash_attn_func(q, k, v, causal=causal)
    hardware = flash_attn_func(q.cuda(), k.cuda(), v.cuda(), causal=causal).cpu()
    torch.testing.assert_close(hardware, simulated, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
