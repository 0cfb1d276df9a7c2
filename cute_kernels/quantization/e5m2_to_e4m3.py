"""e5m2 to e4m3 by powers of two: x = values * factor, as reference/quantize.py states it.

64 rows of a head share a factor, 2^k.  The greatest of them, 2^E to 2^(E + 1), comes to lie below
e4m3's 448 = 1.75 * 2^8: k = E - 8.  e4m3 has a bit more than e5m2 and steps of 2^-9 where it has no
more exponents, so what is at least 2^(E - 15) is represented exactly, and what is smaller to the
nearest multiple of 2^(E - 17).  From k = -7 down e5m2's own least number, 2^-16, is one of e4m3's:
nothing is gained by less.

Blocks and threads as in quantize.py, without what is done to 16-bit rows before.
"""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_tensor
from cutlass.memory import SmemAllocator
from hopper_attention.cute_kernels.conventions import BLOCK_ROWS
from hopper_attention.cute_kernels.primitives.arguments import RowAddresses, example
from hopper_attention.cute_kernels.primitives.arithmetic import ceil_div, maximum
from hopper_attention.cute_kernels.primitives.types import strided
from hopper_attention.cute_kernels.quantization.config import E5m2ToE4m3Config
from hopper_attention.cute_kernels.quantization.rows import (
    HALF,
    RegisterRows,
    block_of,
    one_of_each_warp,
)
from hopper_attention.cute_kernels.quantization.store import Divisor, Values
from hopper_attention.cute_kernels.quantization.v_layout import Block
from hopper_attention.cute_kernels.quantization.vectors import LANES
from hopper_attention.cute_kernels.scheduling.sequence import Lengths

EXPONENT = 8
"""The exponent of e4m3's greatest number."""
LEAST = -7
"""k."""


class E5m2ToE4m3:
    def __init__(self, config: E5m2ToE4m3Config):
        self.cfg = config
        self.rows = RegisterRows("e5m2", config.columns)
        self.values = Values(config.columns, config.transposed)

    def example_arguments(self) -> tuple:
        shape, stride = [cute.sym_int32() for _ in range(3)], [cute.sym_int64() for _ in range(2)]
        factors = make_fake_tensor(Float32, (*shape,), (*stride, 1), assumed_align=4)
        values = self.values.example_argument()
        addresses = example(RowAddresses, lambda: Int64(0))
        return (strided(self.rows.dtype, 4), values, factors, addresses, Int32(1))

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        values: cute.Tensor,
        factors: cute.Tensor,
        addresses: RowAddresses,
        max_seqlen: Int32,
        stream: cuda.CUstream,
    ):
        """x, values, lengths as for Quantize; factors (sequences, heads, blocks of 64 rows)."""
        lengths = Lengths(*addresses, x.shape[1])
        self.kernel(x, values, factors, lengths).launch(
            grid=[x.shape[2], ceil_div(max_seqlen, BLOCK_ROWS), factors.shape[0]],
            block=[self.cfg.threads, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self, mX: cute.Tensor, mValues: cute.Tensor, mFactors: cute.Tensor, lengths: Lengths
    ):
        thread, block = cute.arch.thread_idx()[0], block_of(lengths)
        allocator = SmemAllocator()
        of_warps = one_of_each_warp(allocator)
        low = high = Float32(0.0)
        if block.rows > 0:
            values = self.rows.load(mX, block, thread)
            low, high = self.rows.amax(values, block, mX.shape[3], of_warps, thread)
            divisor = Divisor.of(self.factor(low, high, mFactors, block, thread))
            self.values.store(values, divisor, mValues, block, thread, allocator)
        else:
            self.factor(low, high, mFactors, block, thread)

    @cute.jit
    def factor(
        self, low: Float32, high: Float32, mFactors: cute.Tensor, block: Block, thread: Int32
    ) -> Float32:
        """The factor of this thread's half of the block, which is stored as well."""
        half, place = thread // (HALF // 2 * LANES), thread % (HALF // 2 * LANES)
        top = low if half == 0 else high
        exponent = (top.bitcast(Int32) >> 23) - 127
        power = (maximum(exponent - EXPONENT, LEAST) + 127 << 23).bitcast(Float32)
        factor = power if top < Float32.inf else top
        number = 2 * block.number + half
        if place == 0 and number < mFactors.shape[2]:
            mFactors[block.index, block.head, number] = factor
        return factor
