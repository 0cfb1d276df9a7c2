"""Masks on accumulator fragments: a masked score becomes -inf."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from hopper_attention.cute_kernels.arithmetic import maximum, minimum


@dataclass(frozen=True)
class Mask:
    """Keys beyond the sequence and, if `causal`, beyond the bottom-right aligned diagonal."""

    coordinates: cute.Tensor
    """(rows, columns) -> (row, column) in the tile, of this thread's fragment."""
    first_row: Int32
    """Query row of the tile's row 0."""
    seqlen_q: Int32
    seqlen_k: Int32
    causal: cutlass.Constexpr
    tile_n: cutlass.Constexpr

    @cute.jit
    def apply(self, scores: cute.Tensor, n_block: Int32):
        """scores (rows, columns) of key block `n_block`, in place."""
        # A thread's columns are a run-time base plus constants, so a row's limit is a number of
        # those columns.  As a word of ones it becomes predicates seven at a time (R2P), where
        # comparing every column would cost an instruction each.
        base = self.coordinates[0, 0][1]
        in_sequence = self.seqlen_k - n_block * self.tile_n - base
        columns = cute.size(scores, mode=[1])
        for i in cutlass.range_constexpr(cute.size(scores, mode=[0])):
            limit = in_sequence
            if const_expr(self.causal):
                row = self.first_row + self.coordinates[i, 0][0]
                limit = minimum(limit, in_sequence + row + 1 - self.seqlen_q)
            visible = columns_below(limit)
            for start in cutlass.range_constexpr(0, columns, WORD):
                ones = low_ones(visible - start)
                for j in cutlass.range_constexpr(start, min(start + WORD, columns)):
                    seen = (ones & (1 << (j - start))) != 0
                    scores[i, j] = scores[i, j] if seen else -Float32.inf


WORD = 28
"""Columns whose visibility one word holds: a multiple of the seven that R2P takes."""


def columns_below(limit: Int32) -> Int32:
    """How many of a thread's columns 0, 1, 8, 9, 16, 17, ... lie below `limit`."""
    limit = maximum(limit, 0)
    return (limit >> 3) * 2 + minimum(limit & 7, 2)


def low_ones(count: Int32) -> Int32:
    """A word with the lowest min(max(count, 0), WORD) bits set."""
    return (Int32(1) << minimum(maximum(count, 0), WORD)) - 1
