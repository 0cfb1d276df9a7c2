"""V^T as FP8 attention reads it: the keys of a column lie together, interleaved in every 16.

    whole batch entries   (batch, heads, columns, keys up to a multiple of 16)
    packed sequences      (1, heads, columns, (total // 128 + sequences) * 128)

Sequence i of packed ones starts at block cu_seqlens[i] // 128 + i of 128 keys, so that TMA's boxes
of 64 or 128 keys lie as they do in a sequence of its own, and a kernel needs to know nothing more.
Sequences do not overlap: from cu_seqlens = 128 a + r to 128 a' + r', r and r' below 128, there are
at most a' - a + 1 blocks, and the next sequence starts at block a' + i + 1.

A block that has a key has zeros behind its last: P is 0 there, and 0 * NaN is NaN.  Other blocks
are not written.

In every 16 keys, pairs of successive keys lie in the order 0, 4, 1, 5, 2, 6, 3, 7: as P lies in
registers (`Fp8Fragment`).
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint16
from cutlass.memory import SmemAllocator
from hopper_attention.cute_kernels.conventions import BLOCK_ROWS
from hopper_attention.cute_kernels.primitives.arithmetic import minimum
from hopper_attention.cute_kernels.scheduling.sequence import Sequence

KEYS = 16
"""That are interleaved: one store of a thread."""
CHUNKS = BLOCK_ROWS // KEYS
EIGHT = 8
"""Columns whose chunks are swizzled alike."""


@dataclass(frozen=True)
class Block:
    """BLOCK_ROWS rows of one head of a sequence, or what there is of them."""

    index: Any
    """Which sequence."""
    sequence: Sequence
    head: Any
    number: Any
    """Among the sequence's."""

    @property
    def first_row(self):
        """Among the sequence's."""
        return self.number * BLOCK_ROWS

    @property
    def rows(self):
        """How many there are from this block on; none if not positive."""
        return self.sequence.length - self.first_row

    @property
    def among_columns(self):
        """Which block of its batch entry's columns this is (for V)."""
        first = self.sequence.offset // BLOCK_ROWS + self.index - self.sequence.batch
        return first + self.number

    def row(self, row):
        """The tensor's row that is this block's `row`, or the last there is."""
        return self.sequence.offset + minimum(self.first_row + row, self.sequence.length - 1)


@dataclass(frozen=True)
class Staging:
    """A block's columns in shared memory: two successive rows of a column are 16 bits.

    Column c has 128 bytes, its 16-byte chunk k at chunk k ^ (c / 8) % 8.  So neither four lanes
    that store to columns 8 or 16 apart, 16 bytes in each, nor eight lanes that load a column ask
    a bank twice.
    """

    pairs: cute.Tensor

    @staticmethod
    def allocate(allocator: SmemAllocator, columns: int) -> "Staging":
        layout = cute.make_layout(columns * BLOCK_ROWS // 2)
        return Staging(allocator.allocate_tensor(Uint16, layout, byte_alignment=16))

    def slots(self, eight: Int32, pair: Int32) -> cute.Tensor:
        """(EIGHT,): where rows 2 * pair and the next go, of columns 8 * eight and on."""
        chunk, place = pair // (KEYS // 2), pair % (KEYS // 2)
        slot = place % 4 * 2 + place // 4
        start = eight * (EIGHT * BLOCK_ROWS // 2) + (chunk ^ (eight % 8)) * (KEYS // 2) + slot
        layout = cute.make_layout(EIGHT, stride=BLOCK_ROWS // 2)
        return cute.make_tensor(self.pairs.iterator + start, layout)

    @cute.jit
    def store(self, mColumns: cute.Tensor, block: Block, first: Int32, thread: Int32, threads: int):
        """All of it, to columns `first` and on, once all threads have come past a barrier."""
        columns = cute.size(self.pairs) * 2 // BLOCK_ROWS
        for i in cutlass.range_constexpr(columns * CHUNKS // threads):
            column, chunk = (i * threads + thread) // CHUNKS, thread % CHUNKS
            stored = column * CHUNKS + (chunk ^ (column // EIGHT % 8))
            out = cute.make_rmem_tensor((KEYS // 2,), Uint16)
            cute.autovec_copy(cute.local_tile(self.pairs, (KEYS // 2,), (stored,)), out)
            store_keys(out, mColumns, block, first + column, chunk)


@cute.jit
def store_keys(keys: cute.Tensor, mColumns: cute.Tensor, block: Block, column: Int32, chunk: Int32):
    """16 bytes, `chunk` of the block's in `column`, if that exists."""
    place = block.among_columns * CHUNKS + chunk
    if column < mColumns.shape[2] and place * KEYS < mColumns.shape[3]:
        of_column = mColumns[block.sequence.batch, block.head, column, None]
        out = cute.recast_tensor(keys, mColumns.element_type)
        cute.autovec_copy(out, cute.local_tile(of_column, (KEYS,), (place,)))
