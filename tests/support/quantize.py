"""Inputs of quantisation on the simulator and on a GPU, and judges of its results."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hopper_attention.problem.values import DENSE, Lengths
from hopper_attention.quantize import Quantized
from hopper_attention.reference.quantize import Sequences

HEAD_DIMS = (8, 64, 80, 96, 128, 192, 256)
DTYPES = (torch.bfloat16, torch.float16)


def some(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Rows and channels differ in size, and channels have a mean."""
    generator = torch.Generator().manual_seed(seed)
    batch, seqlen, heads, head_dim = shape
    sizes = torch.rand(batch, seqlen, heads, 1, generator=generator) * 4
    means = torch.randn(batch, 1, heads, head_dim, generator=generator)
    return (torch.randn(shape, generator=generator) * sizes + means).to(dtype)


@dataclass(frozen=True)
class Batch:
    """Sequences of one tensor, with rows of no sequence behind the last."""

    name: str
    shape: tuple[int, ...]
    """Extents before the head dim."""
    lengths: Lengths
    max_seqlen: int | None = None

    def __str__(self) -> str:
        return self.name


def lengths_of(sizes: list[int] | None, used: list[int] | None) -> Lengths:
    """Packed sequences of these sizes, of which so many rows are used."""
    cu_seqlens = None if sizes is None else torch.tensor([0, *sizes]).cumsum(0).int()
    return Lengths(cu_seqlens, None if used is None else torch.tensor(used, dtype=torch.int32))


def exists(x: Tensor, lengths: Lengths) -> Tensor:
    """A row is True if it is in a sequence; the result is (batch, seqlen) or (total,)."""
    sequences = Sequences.of(x, lengths)
    found = torch.zeros(sequences.rows.shape[:2], dtype=torch.bool)
    for entry, start, length in sequences.places:
        found[entry, start : start + length] = True
    return found.view(x.shape[:-2])


def poisoned(x: Tensor, lengths: Lengths) -> Tensor:
    """A copy of x has NaN in the rows of no sequence."""
    if x.dtype.itemsize == 1:
        bits = x.view(torch.uint8).clone()
        bits[~exists(x, lengths)] = 0x7F  # NaN of e4m3 and of e5m2
        return bits.view(x.dtype)
    return x.masked_fill(~exists(x, lengths)[..., None, None], torch.nan)


def defined(values: Tensor, x: Tensor, lengths: Lengths = DENSE) -> Tensor:
    """The bytes of rows that are in a sequence, or of their columns, are defined.

    With the zeros that follow up to a multiple of 128 keys, if there is room.
    """
    bits, sequences = values.view(torch.uint8), Sequences.of(x, lengths)
    if values.shape == x.shape:
        return bits[exists(x, lengths)]
    parts = []
    for i, (entry, offset, length) in enumerate(sequences.places):
        start = (offset // 128 + i - entry) * 128
        parts.append(bits[entry, ..., start : start + -(-length // 128) * 128].flatten())
    return torch.cat([bits.new_empty(0), *parts])


def check_columns(got: Tensor, expected: Tensor, v: Tensor, lengths: Lengths) -> None:
    """Columns of sequences are compared bit for bit."""
    check_layout(got, expected)
    assert torch.equal(defined(got, v, lengths), defined(expected, v, lengths))


def check_layout(ours: Tensor, theirs: Tensor) -> None:
    assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())


def check_equal(got: Quantized, expected: Quantized, x: Tensor, lengths: Lengths = DENSE) -> None:
    """Values are compared bit for bit, which tells 0 from -0; every NaN is alike."""
    check_layout(got.values, expected.values)
    check_layout(got.descale, expected.descale)
    assert torch.equal(got.descale.nan_to_num(-1), expected.descale.nan_to_num(-1))
    ours, theirs = (number_bits(t, x, lengths) for t in (got, expected))
    assert torch.equal(ours, theirs)


def number_bits(quantized: Quantized, x: Tensor, lengths: Lengths) -> Tensor:
    """Bytes are those of `defined`, but every NaN is alike."""
    bits = defined(quantized.values, x, lengths)
    return torch.where(bits.view(quantized.values.dtype).float().isnan(), 0x7F, bits)


def check_near(got: Quantized, expected: Quantized, x: Tensor, lengths: Lengths = DENSE) -> None:
    """Sums in another order move descales by a few roundings, and a few values by one step."""
    check_layout(got.values, expected.values)
    check_layout(got.descale, expected.descale)
    torch.testing.assert_close(got.descale, expected.descale, rtol=2e-6, atol=0)
    ours, theirs = (
        defined(t.values, x, lengths).view(t.values.dtype).float() for t in (got, expected)
    )
    step = theirs.abs().clamp(min=2.0**-6).log2().floor().exp2() / 8
    assert ((ours - theirs).abs() <= step).all()
    assert (ours != theirs).float().mean() < 0.01
