"""The place of one batch entry's sequence, and its length."""

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from cutlass import Int32, Int64
from hopper_attention.cute_kernels.primitives.memory import read


@dataclass(frozen=True)
class Sequence:
    """Rows [offset, offset + length) of batch entry `batch` of a (batch, row, ...) tensor."""

    batch: Any
    offset: Any
    length: Any


@dataclass(frozen=True)
class TileRows:
    """Which query each row of a tile is: `group` heads, which read the same keys, share tiles.

    Row r of a sequence's tiles is position r // group of head first_head + r % group.
    """

    group: Any
    first_head: Any
    first_row: Any
    """The first row of this tile, among the sequence's."""

    def position(self, row):
        return (self.first_row + row) // self.group

    def head(self, row):
        return self.first_head + (self.first_row + row) % self.group


@dataclass(frozen=True)
class EqualLengths:
    """Every batch entry's sequence is all of its rows."""

    length: Any

    def of(self, batch) -> Sequence:
        return Sequence(batch, 0, self.length)


@dataclass(frozen=True)
class Lengths:
    """The sequences of one side, queries or keys; addresses of int32 arrays, 0 where absent.

    `cu_seqlens` (batch + 1): entry b owns rows [cu_seqlens[b], cu_seqlens[b + 1]) of the one batch
    entry of a packed tensor.  `seqused` (batch): only so many of an entry's rows are used.
    """

    cu_seqlens: Int64
    seqused: Int64
    padded: Int32
    """Rows of a batch entry where there is no cu_seqlens."""

    @cute.jit
    def of(self, batch: Int32) -> Sequence:
        owner, offset, length = batch, Int32(0), self.padded
        if self.cu_seqlens != 0:
            owner, offset = Int32(0), read(Int32, self.cu_seqlens, batch)
            length = read(Int32, self.cu_seqlens, batch + 1) - offset
        if self.seqused != 0:
            length = read(Int32, self.seqused, batch)
        return Sequence(owner, offset, length)
