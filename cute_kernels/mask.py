"""Masks on accumulator fragments: a masked score becomes -inf."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from hopper_attention.cute_kernels.arithmetic import clamp, maximum, minimum
from hopper_attention.cute_kernels.visibility import Visibility

WORD = 28
"""Columns whose visibility one word holds: a multiple of the seven that R2P takes."""


@dataclass(frozen=True)
class Mask:
    """Hides the keys that a sequence's `Visibility` hides, on the fragment of one thread."""

    visibility: Visibility
    coordinates: cute.Tensor
    """(rows, columns) -> (row, column) in the tile, of this thread's fragment."""
    first_row: Int32
    """Query row of the tile's row 0."""
    tile_n: cutlass.Constexpr

    @cute.jit
    def apply(self, scores: cute.Tensor, n_block: Int32):
        """scores (rows, columns) of key block `n_block`, in place."""
        # A thread's columns are a run-time base plus constants, so a row's limits are numbers of
        # those columns.  As words of ones they become predicates seven at a time (R2P), where
        # comparing every column would cost an instruction each.
        base = n_block * self.tile_n + self.coordinates[0, 0][1]
        columns = cute.size(scores, mode=[1])
        for i in cutlass.range_constexpr(cute.size(scores, mode=[0])):
            row = self.first_row + self.coordinates[i, 0][0]
            end = columns_below(self.visibility.end(row) - base)
            begin = Int32(0)
            if const_expr(self.visibility.kind == "local"):
                begin = columns_below(self.visibility.begin(row) - base)
            for start in cutlass.range_constexpr(0, columns, WORD):
                seen = low_ones(end - start)
                if const_expr(self.visibility.kind == "local"):
                    seen = seen & ~low_ones(begin - start)
                for j in cutlass.range_constexpr(start, min(start + WORD, columns)):
                    visible = (seen & (1 << (j - start))) != 0
                    scores[i, j] = scores[i, j] if visible else -Float32.inf


def columns_below(limit: Int32) -> Int32:
    """How many of a thread's columns 0, 1, 8, 9, 16, 17, ... lie below `limit`."""
    limit = maximum(limit, 0)
    return (limit >> 3) * 2 + minimum(limit & 7, 2)


def low_ones(count: Int32) -> Int32:
    """A word with the lowest min(max(count, 0), WORD) bits set."""
    return (Int32(1) << clamp(count, 0, WORD)) - 1
