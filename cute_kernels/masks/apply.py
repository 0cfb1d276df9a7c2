"""Masks on accumulator fragments: a masked score becomes -inf."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op
from hopper_attention.cute_kernels.primitives.arithmetic import maximum, minimum
from hopper_attention.cute_kernels.scheduling.sequence import TileRows

WORD = 32
"""Columns of a row that one word of bits stands for."""


@dataclass(frozen=True)
class Mask:
    """Hides the keys that a sequence's `MaskRange` hides, on the fragment of one thread.

    Rows are queries and columns keys; with `TransposedMaskRange` it is the other way round.
    """

    mask_range: Any
    coordinates: cute.Tensor
    """(rows, columns) -> (row, column) in the tile, of this thread's fragment."""
    rows: TileRows
    """Which query each of the tile's rows is."""
    tile_n: cutlass.Constexpr

    @cute.jit
    def apply(self, scores: cute.Tensor, n_block: Int32):
        """scores (rows, columns) of column block `n_block`, in place."""
        # A thread's columns are a run-time base plus constants, so a row's limits are numbers of
        # those columns.  As words of ones they become predicates seven at a time (R2P), where
        # comparing every column would cost an instruction each.
        base = n_block * self.tile_n + self.coordinates[0, 0][1]
        columns = cute.size(scores, mode=[1])
        for i in cutlass.range_constexpr(cute.size(scores, mode=[0])):
            query = self.rows.position(self.coordinates[i, 0][0])
            end, begin = Int32(columns), Int32(0)
            if const_expr(self.mask_range.bounds_end):
                end = columns_below(self.mask_range.end(query) - base)
            if const_expr(self.mask_range.bounds_begin):
                begin = columns_below(self.mask_range.begin(query) - base)
            for start in cutlass.range_constexpr(0, columns, WORD):
                seen = Int32(-1)
                if const_expr(self.mask_range.bounds_end):
                    seen = low_ones(columns_after(end, start))
                if const_expr(self.mask_range.bounds_begin):
                    seen = seen & ~low_ones(columns_after(begin, start))
                for j in cutlass.range_constexpr(start, min(start + WORD, columns)):
                    visible = (seen & (1 << (j - start))) != 0
                    scores[i, j] = scores[i, j] if visible else -Float32.inf


def columns_below(limit: Int32) -> Int32:
    """How many of a thread's columns 0, 1, 8, 9, 16, 17, ... lie below `limit`."""
    limit = maximum(limit, 0)
    return (limit >> 3) * 2 + minimum(limit & 7, 2)


def columns_after(count: Int32, start: int) -> Int32:
    """The number of columns from `start` on, among the first `count` >= 0."""
    return count if start == 0 else maximum(count - start, 0)


@dsl_user_op
def low_ones(count: Int32, *, loc=None, ip=None) -> Int32:
    """A word with the lowest min(count, 32) bits set, count >= 0."""
    word = llvm.inline_asm(
        T.i32(),
        [count.ir_value(loc=loc, ip=ip)],
        "bmsk.clamp.b32 $0, 0, $1;",
        "=r,r",
        has_side_effects=False,
        loc=loc,
        ip=ip,
    )
    return Int32(word)
