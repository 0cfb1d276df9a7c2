"""What quantisation is tested on, on the simulator and on a GPU, and how results are judged."""

from __future__ import annotations

import torch
from torch import Tensor

from hopper_attention.quantize import Quantized

HEAD_DIMS = (8, 64, 80, 96, 128, 192, 256)
DTYPES = (torch.bfloat16, torch.float16)


def some(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Every row and channel of another size, and channels with a mean."""
    generator = torch.Generator().manual_seed(seed)
    batch, seqlen, heads, head_dim = shape
    sizes = torch.rand(batch, seqlen, heads, 1, generator=generator) * 4
    means = torch.randn(batch, 1, heads, head_dim, generator=generator)
    return (torch.randn(shape, generator=generator) * sizes + means).to(dtype)


def check_layout(got: Quantized, expected: Quantized) -> None:
    for ours, theirs in zip(got, expected):
        assert (ours.dtype, ours.shape, ours.stride()) == (
            theirs.dtype, theirs.shape, theirs.stride(),
        )  # fmt: skip
    assert not padding(got.values).any()


def padding(values: Tensor) -> Tensor:
    """Bytes behind the last row of each column, where rows lie next to each other."""
    batch, seqlen, heads, head_dim = values.shape
    room = values.stride(3)
    if room == 1:
        return values.new_empty(0, dtype=torch.uint8)
    shape = (batch, heads, head_dim, room)
    strides = (heads * head_dim * room, head_dim * room, room, 1)
    return values.view(torch.uint8).as_strided(shape, strides)[..., seqlen:]


def check_equal(got: Quantized, expected: Quantized) -> None:
    """Bit for bit, which tells 0 from -0; NaN is NaN."""
    check_layout(got, expected)
    assert torch.equal(got.descale.nan_to_num(-1), expected.descale.nan_to_num(-1))
    ours, theirs = (t.values.float() for t in (got, expected))
    assert torch.equal(ours.nan_to_num(-1000), theirs.nan_to_num(-1000))
    assert torch.equal(ours.signbit()[~ours.isnan()], theirs.signbit()[~theirs.isnan()])


def check_near(got: Quantized, expected: Quantized) -> None:
    """Sums in another order: descale by a few roundings, values by one step, and rarely."""
    check_layout(got, expected)
    torch.testing.assert_close(got.descale, expected.descale, rtol=2e-6, atol=0)
    ours, theirs = got.values.float(), expected.values.float()
    step = theirs.abs().clamp(min=2.0**-6).log2().floor().exp2() / 8
    assert ((ours - theirs).abs() <= step).all()
    assert (ours != theirs).float().mean() < 0.01
