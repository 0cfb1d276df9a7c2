"""V's columns by the compiled kernels, interpreted from their PTX, against the plain statement."""

from __future__ import annotations

import pytest
import torch
from support.quantize import Batch, check_columns, lengths_of, poisoned
from torch import Tensor

from hopper_attention import simulator
from hopper_attention.dispatch import manifest
from hopper_attention.problem.values import DENSE, Lengths
from hopper_attention.quantize import columns_of

pytestmark = [
    pytest.mark.simulator,
    pytest.mark.skipif(
        not any(i.family == "arrange" for i in manifest.instances().values()),
        reason="this build has no arranging kernels",
    ),
]

BATCHES = (
    Batch("whole", (2, 131, 3), DENSE),
    Batch("used", (3, 150, 2), lengths_of(None, [129, 0, 77]), 140),
    Batch("packed", (420, 1), lengths_of([0, 130, 0, 1, 200, 64], None), 200),
    Batch("packed and used", (400, 2), lengths_of([130, 0, 200, 70], [128, 0, 97, 1])),
)


def simulate(v: Tensor, lengths: Lengths = DENSE, seed: int = 1, **arguments) -> Tensor:
    with simulator.enabled(seed=seed, hazards="raise"):
        return columns_of(v, lengths, **arguments)


def bytes_of(*shape: int) -> Tensor:
    """Every byte is another in a row and a column, but for NaN."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return torch.where(numbers % 128 == 127, 1, numbers).view(torch.float8_e4m3fn)


def by_columns(v: Tensor) -> Tensor:
    """A copy has the keys of a column together, and each column at a multiple of 16 bytes."""
    *batch, rows, heads, head_dim = v.shape
    room = torch.zeros((*batch, heads, head_dim, -(-rows // 16) * 16), dtype=torch.uint8)
    columns = room[..., :rows].view(v.dtype).movedim(-1, -3)
    return columns.copy_(v)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize(("layout", "seed"), [(Tensor.contiguous, 0), (by_columns, 1)])
@pytest.mark.parametrize("head_dim", [16, 80, 256])
def test_columns_equal_the_plain_statement(batch, layout, seed, head_dim):
    """NaN lies behind the last key of everything."""
    v = poisoned(bytes_of(*batch.shape, head_dim), batch.lengths)
    got = simulate(layout(v), batch.lengths, seed, max_seqlen=batch.max_seqlen)
    check_columns(got, columns_of(v, batch.lengths), v, batch.lengths)


@pytest.mark.parametrize("layout", [Tensor.contiguous, by_columns])
@pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 127, 128, 129])
def test_row_counts(seqlen, layout):
    v = bytes_of(1, seqlen, 2, 16)
    got = simulate(layout(v))
    assert torch.equal(got.view(torch.uint8), columns_of(v).view(torch.uint8))


@pytest.mark.parametrize("shift", range(1, 16))
def test_packed_columns_start_anywhere(shift):
    """Two loads and a shift by so many bytes; the last column ends with its memory."""
    v, lengths = bytes_of(64, 1, 16), lengths_of([shift, 64 - shift], None)
    check_columns(simulate(by_columns(v), lengths), columns_of(v, lengths), v, lengths)


def test_other_strides():
    """Heads before rows, rows that TMA cannot address, columns of odd length: copied or not."""
    v = bytes_of(2, 40, 3, 48)
    expected = columns_of(v).view(torch.uint8)
    wide = torch.zeros(2, 40, 3, 50, dtype=torch.uint8).view(v.dtype)
    odd = torch.zeros(2, 3, 48, 41, dtype=torch.uint8).view(v.dtype)
    for room in (
        wide[..., 1:49],
        odd[..., :40].permute(0, 3, 1, 2),
        torch.empty(2, 3, 40, 48, dtype=torch.uint8).view(v.dtype).transpose(1, 2),
        torch.empty(2, 3, 41, 48, dtype=torch.uint8).view(v.dtype).permute(0, 2, 1, 3)[:, :40],
    ):
        assert torch.equal(simulate(room.copy_(v)).view(torch.uint8), expected)


def test_nothing_to_do():
    for v, lengths in (
        (bytes_of(1, 0, 2, 16), DENSE),
        (bytes_of(0, 2, 16), lengths_of([0, 0], None)),
        (bytes_of(5, 2, 16), lengths_of([], None)),
        (bytes_of(5, 2, 16), lengths_of([5], [0])),
    ):
        assert simulate(v, lengths).shape == columns_of(v, lengths).shape
        simulate(v, lengths, max_seqlen=0 if lengths.given else None)
