"""Masks on accumulator fragments: a masked score becomes -inf."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from hopper_attention.cute_kernels.arithmetic import minimum


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
        # Columns of a thread are a run-time base plus constants: one limit a row, and every
        # element compares a constant with it.
        base = self.coordinates[0, 0][1]
        in_sequence = self.seqlen_k - n_block * self.tile_n - base
        for i in cutlass.range_constexpr(cute.size(scores, mode=[0])):
            limit = in_sequence
            if const_expr(self.causal):
                row = self.first_row + self.coordinates[i, 0][0]
                limit = minimum(limit, in_sequence + row + 1 - self.seqlen_q)
            for j in cutlass.range_constexpr(cute.size(scores, mode=[1])):
                # Accumulator layout: columns (2, N/8) are c + 8 v from the thread's first one.
                column = j % 2 + j // 2 * 8
                scores[i, j] = scores[i, j] if column < limit else -Float32.inf
