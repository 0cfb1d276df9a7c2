"""Rows in registers (rows.py), divided and cast to e4m3, to memory.

As x lies; or transposed for WGMMA, through shared memory (v_layout.py).

The quotient is an IEEE division's: q = x r with the rounded reciprocal r of the divisor d, then
q - (q d - x) r (Markstein, IBM J. Res. Dev. 34, 1990); with these signs -0 stays -0.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint16
from cutlass.cute.runtime import make_fake_tensor
from cutlass.memory import SmemAllocator
from hopper_attention.cute_kernels.primitives.instructions import fma, to_fp8
from hopper_attention.cute_kernels.primitives.types import strided
from hopper_attention.cute_kernels.quantization.v_layout import Block, Staging
from hopper_attention.cute_kernels.quantization.vectors import LANES, VECTOR

FP8 = cutlass.Float8E4M3FN
THREADS = 256


@dataclass(frozen=True)
class Divisor:
    """Division of many numbers by one."""

    divisor: Float32
    reciprocal: Float32

    @staticmethod
    @cute.jit
    def of(divisor: Float32) -> "Divisor":
        # What is infinite divides to 0: q d - x must not be NaN for it.
        finite = divisor if divisor < Float32.inf else Float32(0.0)
        return Divisor(finite, Float32(1.0) / divisor)

    def divide(self, x: Float32) -> Float32:
        quotient = x * self.reciprocal
        excess = fma(quotient, self.divisor, -x)
        return fma(-excess, self.reciprocal, quotient)


class Values:
    """The place of one block's values."""

    def __init__(self, columns: int, transposed: bool):
        self.columns, self.transposed = columns, transposed

    def example_argument(self) -> cute.Tensor:
        """(batch, row, head, column); transposed: v_layout.py."""
        if self.transposed:
            return strided(FP8, 4)
        shape = (*(cute.sym_int32() for _ in range(3)), cute.sym_int32(divisibility=VECTOR))
        stride = (*(cute.sym_int64(divisibility=VECTOR) for _ in range(3)), 1)
        return make_fake_tensor(FP8, shape, stride, assumed_align=16)

    @cute.jit
    def store(
        self,
        values: cute.Tensor,
        divisor: Divisor,
        mValues: cute.Tensor,
        block: Block,
        thread: Int32,
        allocator: SmemAllocator,
    ):
        if cutlass.const_expr(self.transposed):
            staging = Staging.allocate(allocator, self.columns)
            self.stage(values, divisor, staging, block, thread)
            cute.arch.sync_threads()
            staging.store(mValues, block, Int32(0), thread, THREADS)
        else:
            self.store_rows(values, divisor, mValues, block, thread)

    @cute.jit
    def store_rows(
        self,
        values: cute.Tensor,
        divisor: Divisor,
        mValues: cute.Tensor,
        block: Block,
        thread: Int32,
    ):
        pair, lane = thread // LANES, thread % LANES
        for r in cutlass.range_constexpr(2):
            row = 2 * pair + r
            target = mValues[block.sequence.batch, block.row(row), block.head, None]
            for v in cutlass.range_constexpr(cute.size(values, mode=[1])):
                pairs = cute.make_rmem_tensor((VECTOR // 2,), Uint16)
                for i in cutlass.range_constexpr(VECTOR // 2):
                    low, high = (divisor.divide(values[2 * i + j, v, r]) for j in range(2))
                    pairs[i] = to_fp8(low, high)
                vector = v * LANES + lane
                if row < block.rows and vector * VECTOR < mValues.shape[3]:
                    out = cute.recast_tensor(pairs, FP8)
                    cute.autovec_copy(out, cute.local_tile(target, (VECTOR,), (vector,)))

    @cute.jit
    def stage(
        self,
        values: cute.Tensor,
        divisor: Divisor,
        staging: Staging,
        block: Block,
        thread: Int32,
    ):
        """Store to shared memory; what is behind the last row becomes 0."""
        pair, lane = thread // LANES, thread % LANES
        exists = Int32(0xFFFF) if 2 * pair + 1 < block.rows else Int32(0xFF)
        exists = exists if 2 * pair < block.rows else Int32(0)
        for v in cutlass.range_constexpr(cute.size(values, mode=[1])):
            slots = staging.slots(v * LANES + lane, pair)
            for e in cutlass.range_constexpr(VECTOR):
                low, high = (divisor.divide(values[e, v, r]) for r in range(2))
                slots[e] = to_fp8(low, high) & Uint16(exists)
