"""Rotation of rows by random signs and Hadamard's matrix, in registers: x D H / sqrt(n).

Columns of a row are numbered by bits: three within a vector of 8 that a thread loads at once, two
for the lane of the row's four, the rest for the thread's vector.  H of n = 2^k columns is k stages,
one a bit, in any order: a, b <- a + b, a - b for all pairs of columns that differ in that bit.  The
lanes' bits need shuffles: two of up to eight stages.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from hopper_attention.cute_kernels.primitives.arithmetic import minimum
from hopper_attention.cute_kernels.primitives.instructions import fma
from hopper_attention.cute_kernels.quantization.vectors import LANES, SPAN, VECTOR, vector_of


@dataclass(frozen=True)
class Rotation:
    """Run-time arguments, the same for every row."""

    size: Int32
    """n, a power of two from 8 to 256 that divides the columns; 1: no rotation."""
    signs: Int64
    """Address of a float32 for every column: D / sqrt(n)."""

    @cute.jit
    def apply(self, values: cute.Tensor, lane: Int32, last: Int32):
        """values (VECTOR, vectors, rows) float32 <- rotated.

        `lane` of the row, whose last vector is `last`; what is behind it becomes anything.
        """
        if self.size > 1:
            self.scale(values, lane, last)
            for bit in cutlass.range_constexpr(3):
                self.within_vectors(values, 1 << bit)
            for bit in cutlass.range_constexpr(2):
                if self.size > VECTOR << bit:
                    self.between_lanes(values, lane, 1 << bit)
            for bit in cutlass.range_constexpr(3):
                if cutlass.const_expr(1 << bit < values.shape[1]):
                    if self.size > SPAN << bit:
                        self.between_vectors(values, 1 << bit)

    def scale(self, values: cute.Tensor, lane: Int32, last: Int32) -> None:
        for v in range(values.shape[1]):
            signs = vector_of(self.signs, minimum(v * LANES + lane, last))
            for row in range(values.shape[2]):
                for e in range(VECTOR):
                    values[e, v, row] = values[e, v, row] * signs[e]

    def within_vectors(self, values: cute.Tensor, bit: int) -> None:
        for row in range(values.shape[2]):
            for v in range(values.shape[1]):
                for e in range(VECTOR):
                    if not e & bit:
                        butterfly(values, (e, v, row), (e | bit, v, row))

    def between_vectors(self, values: cute.Tensor, bit: int) -> None:
        """a + b, then a + b - 2 b, each in its place: what is optional costs a move otherwise."""
        for row in range(values.shape[2]):
            for v in range(values.shape[1]):
                if not v & bit:
                    for e in range(VECTOR):
                        a, b = values[e, v, row], values[e, v | bit, row]
                        values[e, v, row] = a + b
                        values[e, v | bit, row] = fma(b, Float32(-2.0), a + b)

    @cute.jit
    def between_lanes(self, values: cute.Tensor, lane: Int32, bit: cutlass.Constexpr):
        own = Float32(1.0) if (lane & bit) == 0 else Float32(-1.0)
        for i in cutlass.range_constexpr(cute.size(values)):
            other = cute.arch.shuffle_sync_bfly(values[i], offset=bit)
            values[i] = values[i] * own + other


def butterfly(values: cute.Tensor, low: Any, high: Any) -> None:
    a, b = values[low], values[high]
    values[low], values[high] = a + b, a - b
