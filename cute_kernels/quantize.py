"""Quantisation to FP8: x ~ values * descale, as quantize_statement.py states it.

    ColumnSums, ColumnMeans   first, if the mean over a sequence is taken off (column_means.py)
    AbsMax                    then, where all rows of a head or everything share a scale, or scales
                              of blocks are powers of two below their head's largest
    Quantize                  scale and cast; finds the scale of blocks in the same pass

A block of 256 threads holds 128 rows of one head of a sequence in registers (quantize_rows.py); a
block without rows says that its scale is that of zeros.  Mean and rotation are arguments:

    load -> - mean -> rotation (hadamard.py) -> greatest magnitude -> / descale -> e4m3 -> store

The greatest magnitude is that of a warp's 16 rows (redux on the bits: floats that are not negative
compare as integers), then of four or eight warps through shared memory.  AbsMax ends with an atomic
maximum of the bits into a table of zeros, which Quantize reads then.  NaN is greater than all, so
NaN and infinity reach everything that shares their scale: dequantised it is NaN.

Values are stored as x lies or, "arranged", as V's columns through shared memory (columns.py).

The quotient is an IEEE division's: q = x r with the rounded reciprocal r of the divisor d, then
q - (q d - x) r (Markstein, IBM J. Res. Dev. 34, 1990); with these signs -0 stays -0.

What it costs beside the copy: docs/tuning.md.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint16
from cutlass._mlir.dialects import llvm
from cutlass.cute.runtime import make_fake_tensor
from cutlass.cutlass_dsl import T, dsl_user_op
from cutlass.memory import SmemAllocator
from hopper_attention.cute_kernels.arithmetic import ceil_div, minimum
from hopper_attention.cute_kernels.columns import ROWS, Block, Staging
from hopper_attention.cute_kernels.hadamard import LANES, VECTOR, Rotation
from hopper_attention.cute_kernels.memory import read
from hopper_attention.cute_kernels.quantize_rows import (
    HALF,
    Preparation,
    Rows,
    greater,
    one_of_each_warp,
)
from hopper_attention.cute_kernels.sequence import Lengths
from hopper_attention.cute_kernels.types import strided
from hopper_attention.hopper.config import AbsMaxConfig, QuantizeConfig

FP8 = cutlass.Float8E4M3FN
LARGEST = 448.0
"""Of e4m3."""
LEAST = 1e-12
"""Of a descale."""
OCTAVES = 60
"""That a block's descale may be below the largest of its head."""


@dsl_user_op
def fma(a: Float32, b: Float32, c: Float32, *, loc=None, ip=None) -> Float32:
    """a * b + c, rounded once; said, not left to ptxas, because the result depends on it."""
    operands = [x.ir_value(loc=loc, ip=ip) for x in (a, b, c)]
    code = "fma.rn.f32 $0, $1, $2, $3;"
    return Float32(
        llvm.inline_asm(T.f32(), operands, code, "=f,f,f,f", has_side_effects=False, loc=loc, ip=ip)
    )


@dsl_user_op
def to_fp8(low: Float32, high: Float32, *, loc=None, ip=None) -> Uint16:
    """Two bytes of e4m3: nearest even, saturating."""
    operands = [x.ir_value(loc=loc, ip=ip) for x in (high, low)]
    code = "cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;"
    return Uint16(
        llvm.inline_asm(T.i16(), operands, code, "=h,f,f", has_side_effects=False, loc=loc, ip=ip)
    )


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


@dataclass(frozen=True)
class Scales:
    """What values are divided by: run-time arguments."""

    mDescale: cute.Tensor
    """(sequences, heads / group, blocks or 1), written for each."""
    tops: Int64
    """Address of the greatest magnitudes' bits, (sequences, heads / group), from AbsMax; or 0."""
    tops_stride: Int32
    """From sequence to sequence."""
    block_rows: Int32
    """64 or 128 rows have a scale, a power of two below their head's largest if `tops` is given; 0:
    all rows share that of `tops`."""
    group: Int32
    """Successive heads with one scale."""

    @cute.jit
    def descale(self, low: Float32, high: Float32, block: Block, thread: Int32) -> Float32:
        """What this thread's values are divided by, which is stored as well.

        low, high: the greatest magnitudes of the block's halves.
        """
        of_group = block.head // self.group
        shared = Float32(0.0)
        if self.tops != 0:
            of_sequence = Int64(block.index) * self.tops_stride
            shared = read(Float32, self.tops + 4 * (of_sequence + of_group), Int32(0))
        top, place, writes = shared, Int32(0), block.number == 0 and thread == 0
        if self.block_rows > 0:
            top, place, writes = greater(low, high), block.number, thread == 0
            if self.block_rows < ROWS:
                half = thread // (HALF // 2 * LANES)
                top = low if half == 0 else high
                place = 2 * block.number + half
                writes = thread % (HALF // 2 * LANES) == 0 and place < self.mDescale.shape[2]
        descale = descale_of(top)
        if self.block_rows > 0 and self.tops != 0:
            descale = in_octaves(descale, descale_of(shared))
        if writes:
            self.mDescale[block.index, of_group, place] = descale
        return descale


@cute.jit
def descale_of(top: Float32) -> Float32:
    descale = top / LARGEST
    return Float32(LEAST) if descale < LEAST else descale


def in_octaves(descale: Float32, largest: Float32) -> Float32:
    """The least that is not smaller and a power of two, at most OCTAVES, below the largest."""
    steps = minimum(((largest / descale).bitcast(Int32) >> 23) - 127, OCTAVES)
    return largest * ((127 - steps) << 23).bitcast(Float32)


class Quantize:
    def __init__(self, config: QuantizeConfig):
        self.cfg = config
        self.rows = Rows(config.dtype, config.columns)

    def example_arguments(self) -> tuple:
        shape = (*(cute.sym_int32() for _ in range(3)), cute.sym_int32(divisibility=VECTOR))
        stride = (*(cute.sym_int64(divisibility=VECTOR) for _ in range(3)), 1)
        rows = make_fake_tensor(FP8, shape, stride, assumed_align=16)
        values = strided(FP8, 4) if self.cfg.arranged else rows
        shape, stride = [cute.sym_int32() for _ in range(3)], [cute.sym_int64() for _ in range(2)]
        descale = make_fake_tensor(Float32, (*shape,), (*stride, 1), assumed_align=4)
        scales = (Int64(0), Int32(0), Int32(64), Int32(1))
        return (strided(self.rows.dtype, 4), values, descale, *scales, *example_rest())

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,
        mValues: cute.Tensor,
        mDescale: cute.Tensor,
        tops: Int64,
        tops_stride: Int32,
        block_rows: Int32,
        group: Int32,
        mean: Int64,
        rotation_size: Int32,
        signs: Int64,
        cu_seqlens: Int64,
        seqused: Int64,
        max_seqlen: Int32,
        stream: cuda.CUstream,
    ):
        """mX (batch, seqlen, heads, columns), or (1, total, ...) if packed.

        mValues: the same, or arranged.  tops, tops_stride, block_rows, group: `Scales`.  mean:
        `Preparation`; rotation_size, signs: `Rotation`.  cu_seqlens, seqused: `Lengths`, of at most
        max_seqlen rows.
        """
        scales = Scales(mDescale, tops, tops_stride, block_rows, group)
        preparation = Preparation(mean, Rotation(rotation_size, signs))
        lengths = Lengths(cu_seqlens, seqused, mX.shape[1])
        self.kernel(mX, mValues, scales, preparation, lengths).launch(
            grid=[mX.shape[2], ceil_div(max_seqlen, ROWS), mDescale.shape[0]],
            block=[self.cfg.threads, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,
        mValues: cute.Tensor,
        scales: Scales,
        preparation: Preparation,
        lengths: Lengths,
    ):
        thread, block = cute.arch.thread_idx()[0], block_of(lengths)
        allocator = SmemAllocator()
        of_warps = one_of_each_warp(allocator)
        low = high = Float32(0.0)
        if block.rows > 0:
            values = self.rows.load(mX, block, preparation, thread)
            if scales.block_rows > 0:
                low, high = self.rows.tops(values, block, mX.shape[3], of_warps, thread)
            divisor = Divisor.of(scales.descale(low, high, block, thread))
            if cutlass.const_expr(self.cfg.arranged):
                staging = Staging.allocate(allocator, self.cfg.columns)
                self.stage(values, divisor, staging, block, thread)
                cute.arch.sync_threads()
                staging.store(mValues, block, Int32(0), thread, self.cfg.threads)
            else:
                self.store(values, divisor, mValues, block, thread)
        else:
            scales.descale(low, high, block, thread)

    @cute.jit
    def store(
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
            for v in cutlass.range_constexpr(self.rows.vectors):
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
        """To shared memory; what is behind the last row becomes 0."""
        pair, lane = thread // LANES, thread % LANES
        exists = Int32(0xFFFF) if 2 * pair + 1 < block.rows else Int32(0xFF)
        exists = exists if 2 * pair < block.rows else Int32(0)
        for v in cutlass.range_constexpr(self.rows.vectors):
            slots = staging.slots(v * LANES + lane, pair)
            for e in cutlass.range_constexpr(VECTOR):
                low, high = (divisor.divide(values[e, v, r]) for r in range(2))
                slots[e] = to_fp8(low, high) & Uint16(exists)


class AbsMax:
    def __init__(self, config: AbsMaxConfig):
        self.cfg = config
        self.rows = Rows(config.dtype, config.columns)

    def example_arguments(self) -> tuple:
        shape = tuple(cute.sym_int32() for _ in range(2))
        tops = make_fake_tensor(Int32, shape, (cute.sym_int64(), cute.sym_int64()), assumed_align=4)
        return (strided(self.rows.dtype, 4), tops, Int32(1), *example_rest())

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,
        mTops: cute.Tensor,
        group: Int32,
        mean: Int64,
        rotation_size: Int32,
        signs: Int64,
        cu_seqlens: Int64,
        seqused: Int64,
        max_seqlen: Int32,
        stream: cuda.CUstream,
    ):
        """mTops (sequences, heads / group): zeros; then the bits of the greatest magnitudes."""
        preparation = Preparation(mean, Rotation(rotation_size, signs))
        lengths = Lengths(cu_seqlens, seqused, mX.shape[1])
        self.kernel(mX, mTops, group, preparation, lengths).launch(
            grid=[mX.shape[2], ceil_div(max_seqlen, ROWS), mTops.shape[0]],
            block=[self.cfg.threads, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,
        mTops: cute.Tensor,
        group: Int32,
        preparation: Preparation,
        lengths: Lengths,
    ):
        thread, block = cute.arch.thread_idx()[0], block_of(lengths)
        of_warps = one_of_each_warp(SmemAllocator())
        if block.rows > 0:
            values = self.rows.load(mX, block, preparation, thread)
            low, high = self.rows.tops(values, block, mX.shape[3], of_warps, thread)
            if thread == 0:
                target = cute.domain_offset((block.index, block.head // group), mTops).iterator
                cute.arch.inline_ptx(
                    "red.relaxed.gpu.global.max.s32 [{$r0}], {$r1};",
                    read_only_args=[target.toint(), greater(low, high).bitcast(Int32)],
                )


def example_rest() -> tuple:
    """mean; size and signs of the rotation; cu_seqlens, seqused, max_seqlen."""
    return (Int64(0), Int32(1), Int64(0), Int64(0), Int64(0), Int32(1))


def block_of(lengths: Lengths) -> Block:
    """Heads first: they share pages, and no division is needed."""
    head, number, index = cute.arch.block_idx()
    return Block(index, lengths.of(index), head, number)
