"""Storing an accumulator's rows in global memory, from registers: no shared memory, no barrier.

The four lanes of a quad hold, of every column block of 8, two columns each: 4 bytes in 16 bits.
Over four column blocks they exchange words until each lane has one block whole, 16 bytes.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32
from hopper_attention.cute_kernels.ampere.mma import Coordinates
from hopper_attention.cute_kernels.primitives.fragments import PackedFragment, rows_and_columns

QUAD = 4


@cute.jit
def store_rounded(
    acc: cute.Tensor, coordinates: Coordinates, target: cutlass.Constexpr, dtype: cutlass.Constexpr
):
    """`target`(row of the tile): (whether it exists, its columns in global memory)."""
    out = PackedFragment.like(acc, dtype)
    out.convert(acc)
    (_, _, column_blocks), row_blocks, _ = acc.shape
    lane = coordinates.lane & QUAD - 1
    chunk = cute.make_rmem_tensor((QUAD,), Int32)
    for i in cutlass.range_constexpr(2 * row_blocks):
        exists, line = target(coordinates[i, 0][0])
        for block in cutlass.range_constexpr(0, column_blocks, QUAD):
            start = 2 * (i // 2 * column_blocks + block) + i % 2
            count = min(QUAD, column_blocks - block)
            words = [out.words[start + 2 * min(j, count - 1)] for j in range(QUAD)]
            for j, word in enumerate(transpose(words, lane)):
                chunk[j] = word
            # A lane without a block has a column that no row has.
            column = coordinates.column_block(block + lane)
            if exists and column < cute.size(line):
                place = cute.recast_ptr((line.iterator + column).align(16), dtype=Int32)
                cute.autovec_copy(chunk, cute.make_tensor(place, cute.make_layout(QUAD)))


@cute.jit
def store_float32(acc: cute.Tensor, coordinates: Coordinates, target: cutlass.Constexpr):
    """Store unrounded; the columns in global memory are halves of float32 numbers."""
    values = rows_and_columns(acc)
    pair = cute.make_rmem_tensor((2,), Float32)
    for i in cutlass.range_constexpr(cute.size(values, mode=[0])):
        exists, line = target(coordinates[i, 0][0])
        for j in cutlass.range_constexpr(0, cute.size(values, mode=[1]), 2):
            column = 2 * coordinates[i, j][1]
            if exists and column < cute.size(line):
                pair[0], pair[1] = values[i, j], values[i, j + 1]
                place = cute.recast_ptr((line.iterator + column).align(8), dtype=Float32)
                cute.autovec_copy(pair, cute.make_tensor(place, cute.make_layout(2)))


@cute.jit
def transpose(words: list, lane: Int32):
    """Word j of lane l of a quad becomes word l of lane j: in two rounds of pairs."""
    a, b, c, d = words
    odd, upper = (lane & 1) != 0, (lane & 2) != 0
    a, b = exchange(a, b, odd, 1)
    c, d = exchange(c, d, odd, 1)
    a, c = exchange(a, c, upper, 2)
    b, d = exchange(b, d, upper, 2)
    return a, b, c, d


@cute.jit
def exchange(low: Int32, high: Int32, upper: Boolean, distance: cutlass.Constexpr):
    """The lower lane's high word for the upper lane's low one."""
    other = cute.arch.shuffle_sync_bfly(low if upper else high, offset=distance)
    return (other if upper else low), (high if upper else other)
