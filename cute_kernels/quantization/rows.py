"""128 rows of one head in the registers of 256 threads, for quantize.py and e5m2_to_e4m3.py.

Four lanes have a row, `columns / 32` vectors of 8 columns each (16 bytes, or 8 of e5m2), and a
thread two successive rows: all of them as float32, from load to cast.

Rows behind a sequence's last are loaded as the last, vectors behind the last as the last: neither
changes a maximum, but for rotated vectors, which are left out, and neither is stored.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.memory import SmemAllocator
from hopper_attention.cute_kernels.primitives.arithmetic import minimum
from hopper_attention.cute_kernels.primitives.types import DTYPES
from hopper_attention.cute_kernels.quantization.hadamard import Rotation
from hopper_attention.cute_kernels.quantization.rotary import Rotary
from hopper_attention.cute_kernels.quantization.v_layout import Block
from hopper_attention.cute_kernels.quantization.vectors import LANES, SPAN, VECTOR, vector_of, widen
from hopper_attention.cute_kernels.scheduling.sequence import Lengths

WARPS = 8
HALF = 64
"""Rows of the first four warps, which may have a scale of their own."""


@dataclass(frozen=True)
class Preparation:
    """Steps before rows are quantised: run-time arguments, each may be absent."""

    rotary: Rotary
    mean: Int64
    """Address of (sequences, heads, columns) float32 to take off, or 0."""
    rotation: Rotation


class RegisterRows:
    """How the rows of one block lie in its threads."""

    def __init__(self, dtype: str, columns: int):
        self.dtype = DTYPES[dtype]
        self.vectors = columns // SPAN
        """Vectors of a lane."""

    @cute.jit
    def load(self, mX: cute.Tensor, block: Block, thread: Int32):
        """(VECTOR, vectors, 2) float32: this thread's.  mX (batch, row, head, column)."""
        x = mX[block.sequence.batch, None, block.head, None]
        pair, lane = thread // LANES, thread % LANES
        last = x.shape[1] // VECTOR - 1
        loaded = cute.make_rmem_tensor((VECTOR, self.vectors, 2), self.dtype)
        for r in cutlass.range_constexpr(2):
            source = x[block.row(2 * pair + r), None]
            for v in cutlass.range_constexpr(self.vectors):
                vector = minimum(v * LANES + lane, last)
                cute.autovec_copy(cute.local_tile(source, (VECTOR,), (vector,)), loaded[None, v, r])
        return widen(loaded)

    @cute.jit
    def prepare(
        self,
        values: cute.Tensor,
        mX: cute.Tensor,
        block: Block,
        preparation: Preparation,
        thread: Int32,
    ):
        lane, last = thread % LANES, mX.shape[3] // VECTOR - 1
        if preparation.rotary.dim > 0:
            embedding = preparation.rotary.of(block.sequence, block.index)
            for r in cutlass.range_constexpr(2):
                row = block.row(thread // LANES * 2 + r)
                source = mX[block.sequence.batch, row, block.head, None]
                for v in cutlass.range_constexpr(self.vectors):
                    embedding.apply(values[None, v, r], source, v * LANES + lane, row)
        if preparation.mean != 0:
            of_head = Int64(block.index) * mX.shape[2] + block.head
            self.center(values, preparation.mean + 4 * of_head * mX.shape[3], lane, last)
        preparation.rotation.apply(values, lane, last)

    def center(self, values: cute.Tensor, mean: Int64, lane: Int32, last: Int32) -> None:
        """`mean`: address of this head's row of means."""
        for v in range(self.vectors):
            means = vector_of(mean, minimum(v * LANES + lane, last))
            for i in range(2 * VECTOR):
                e, r = i % VECTOR, i // VECTOR
                values[e, v, r] = values[e, v, r] - means[e]

    @cute.jit
    def top_bits(self, values: cute.Tensor, columns: Int32, lane: Int32) -> Int32:
        """Bits of the greatest magnitude of this warp's rows."""
        top = Float32(0.0)
        for v in cutlass.range_constexpr(self.vectors):
            chains = [cute.math.absf(values[0, v, r]) for r in range(2)]
            for i in cutlass.range_constexpr(2 * VECTOR):
                chains[i % 2] = greater(chains[i % 2], cute.math.absf(values[i // 2, v, i % 2]))
            of_vector = greater(*chains)
            top = greater(top, of_vector if (v * LANES + lane) * VECTOR < columns else Float32(0.0))
        return Int32(cute.arch.warp_redux_sync(top.bitcast(Int32), "max"))

    @cute.jit
    def amax(
        self,
        values: cute.Tensor,
        block: Block,
        columns: Int32,
        of_warps: cute.Tensor,
        thread: Int32,
    ):
        """The greatest magnitudes of the block's halves, 0 of no rows; waits for all threads.

        of_warps: (WARPS,) float32 in shared memory.
        """
        bits = self.top_bits(values, columns, thread % LANES)
        if thread % 32 == 0:
            of_warps[thread // 32] = bits.bitcast(Float32)
        cute.arch.sync_threads()
        halves = []
        for half in cutlass.range_constexpr(2):
            four = [of_warps[4 * half + i] for i in range(4)]
            halves.append(greater(greater(four[0], four[1]), greater(four[2], four[3])))
        return halves[0], halves[1] if block.rows > HALF else Float32(0.0)


def greater(a: Float32, b: Float32) -> Float32:
    """NaN if either is."""
    return cute.arch.fmax(a, b, nan=True)


def one_of_each_warp(allocator: SmemAllocator) -> cute.Tensor:
    return allocator.allocate_tensor(Float32, cute.make_layout(WARPS), byte_alignment=16)


def block_of(lengths: Lengths) -> Block:
    """Heads first: they share pages, and no division is needed."""
    head, number, index = cute.arch.block_idx()
    return Block(index, lengths.of(index), head, number)
