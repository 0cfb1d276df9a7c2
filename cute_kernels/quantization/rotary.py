"""Rotary embedding of rows that have just been loaded (RoFormer, arXiv 2104.09864).

The first `dim` columns are turned in pairs, by the angle that the position and the pair have:
columns i and i + dim / 2 are a pair, or 2i and 2i + 1 ("interleaved"):

    a, b <- a cos - b sin, b cos + a sin

The other column of a pair is in another thread's vector, unless they are interleaved: its vector is
loaded again, from L1.  Every product is rounded, so that the result does not depend on what a
compiler fuses: 3 instructions an element, and as many again for what is loaded.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from hopper_attention.cute_kernels.primitives.arithmetic import minimum
from hopper_attention.cute_kernels.primitives.instructions import product
from hopper_attention.cute_kernels.primitives.memory import read
from hopper_attention.cute_kernels.quantization.vectors import VECTOR, vector_of, widen
from hopper_attention.cute_kernels.scheduling.sequence import Sequence


class RotaryTables(NamedTuple):
    """`Rotary`'s addresses, as kernels take them."""

    rotary_cos: Int64
    rotary_sin: Int64
    rotary_offsets: Int64


class RotaryCounts(NamedTuple):
    """`Rotary`'s integers, as kernels take them."""

    rotary_dim: Int32
    rotary_interleaved: Int32
    rotary_positions: Int32
    rotary_offset: Int32


@dataclass(frozen=True)
class Rotary:
    """Run-time arguments, the same for every row."""

    cos: Int64
    """Address of (positions, dim / 2) float32."""
    sin: Int64
    dim: Int32
    """A multiple of 16, at most the columns; 0: nothing is turned."""
    interleaved: Int32
    positions: Int32
    offset: Int32
    """Position of a sequence's first row."""
    offsets: Int64
    """Address of (sequences,) int32, which are added to that; or 0."""

    @staticmethod
    def create(tables: RotaryTables, counts: RotaryCounts) -> "Rotary":
        cos, sin, offsets = tables
        return Rotary(cos, sin, *counts, offsets)

    @cute.jit
    def of(self, sequence: Sequence, index: Int32) -> "Embedding":
        shift = self.offset - sequence.offset
        if self.offsets != 0:
            shift += read(Int32, self.offsets, index)
        return Embedding(self, shift)


@dataclass(frozen=True)
class Embedding:
    """The embedding of one sequence."""

    rotary: Rotary
    shift: Any
    """From rows of the tensor to positions."""

    @cute.jit
    def apply(self, values: cute.Tensor, source: cute.Tensor, vector: Int32, row: Int32):
        """values (VECTOR,) float32: `vector` of `source`, which is `row` of the tensor."""
        # A branch, no selects: ptxas would load for all vectors at once, and run out of registers.
        if vector < self.rotary.dim // VECTOR:
            position = minimum(row + self.shift, self.rotary.positions - 1)
            start = 2 * self.rotary.dim * Int64(position)  # bytes
            if self.rotary.interleaved != 0:
                self.turn_neighbours(values, vector, start)
            else:
                self.turn_halves(values, source, vector, start)

    @cute.jit
    def turn_neighbours(self, values: cute.Tensor, vector: Int32, start: Int64):
        cos, sin = (four_of(table + start, vector) for table in (self.rotary.cos, self.rotary.sin))
        for i in cutlass.range_constexpr(VECTOR // 2):
            a, b = values[2 * i], values[2 * i + 1]
            values[2 * i] = product(a, cos[i]) - product(b, sin[i])
            values[2 * i + 1] = product(b, cos[i]) + product(a, sin[i])

    @cute.jit
    def turn_halves(self, values: cute.Tensor, source: cute.Tensor, vector: Int32, start: Int64):
        half = self.rotary.dim // (2 * VECTOR)
        low = vector < half
        place, other = (vector, vector + half) if low else (vector - half, vector - half)
        loaded = cute.make_rmem_tensor((VECTOR,), source.element_type)
        cute.autovec_copy(cute.local_tile(source, (VECTOR,), (other,)), loaded)
        others, sign = widen(loaded), Float32(-1.0) if low else Float32(1.0)
        cos, sin = (vector_of(table + start, place) for table in (self.rotary.cos, self.rotary.sin))
        for e in cutlass.range_constexpr(VECTOR):
            values[e] = product(values[e], cos[e]) + product(others[e] * sign, sin[e])


def four_of(address: Int64, place: Int32) -> cute.Tensor:
    """(4,) of an array of float32, in registers."""
    start = cute.make_ptr(Float32, address, cute.AddressSpace.gmem, assumed_align=16)
    source = cute.make_tensor(start, cute.make_layout(1 << 30))
    loaded = cute.make_rmem_tensor((VECTOR // 2,), Float32)
    cute.autovec_copy(cute.local_tile(source, (VECTOR // 2,), (place,)), loaded)
    return loaded
