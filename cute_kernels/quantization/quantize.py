"""Quantisation to FP8: x ~ values * descale, as reference/quantize.py states it.

    ColumnSums, ColumnMeans   first, if the mean over a sequence is taken off (column_means.py)
    AbsMax                    then, where all rows of a head or everything share a scale, or scales
                              of blocks are powers of two below their head's largest
    Quantize                  scale and cast; finds the scale of blocks in the same pass

A block of 256 threads holds 128 rows of one head of a sequence in registers (rows.py); a
block without rows says that its scale is that of zeros.  What is done to them is arguments:

    load -> rotary embedding (rotary.py) -> - mean -> rotation (hadamard.py)
         -> greatest magnitude -> / descale -> e4m3 -> store

The greatest magnitude is that of a warp's 16 rows (redux on the bits: floats that are not negative
compare as integers), then of four or eight warps through shared memory.  AbsMax ends with an atomic
maximum of the bits into a table of zeros, which Quantize reads then.  NaN is greater than all, so
NaN and infinity reach everything that shares their scale: dequantised it is NaN.

Values are stored as x lies or, transposed for WGMMA (v_layout.py).

What it costs beside the copy: docs/kernels/quantization.md.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_tensor
from cutlass.memory import SmemAllocator
from hopper_attention.cute_kernels.conventions import (
    BLOCK_ROWS,
    LARGEST_E4M3,
    LEAST_DESCALE,
    OCTAVES,
)
from hopper_attention.cute_kernels.primitives.arguments import RowAddresses, example
from hopper_attention.cute_kernels.primitives.arithmetic import ceil_div, minimum
from hopper_attention.cute_kernels.primitives.memory import read
from hopper_attention.cute_kernels.primitives.types import strided
from hopper_attention.cute_kernels.quantization.config import AbsMaxConfig, QuantizeConfig
from hopper_attention.cute_kernels.quantization.hadamard import Rotation
from hopper_attention.cute_kernels.quantization.rotary import Rotary, RotaryCounts, RotaryTables
from hopper_attention.cute_kernels.quantization.rows import (
    HALF,
    Preparation,
    RegisterRows,
    block_of,
    greater,
    one_of_each_warp,
)
from hopper_attention.cute_kernels.quantization.store import Divisor, Values
from hopper_attention.cute_kernels.quantization.v_layout import Block
from hopper_attention.cute_kernels.quantization.vectors import LANES
from hopper_attention.cute_kernels.scheduling.sequence import Lengths


@dataclass(frozen=True)
class Scales:
    """Divisors of values: run-time arguments."""

    mDescale: cute.Tensor
    """(sequences, heads / group, blocks or 1), written for each."""
    amax: Int64
    """Address of the greatest magnitudes' bits, (sequences, heads / group), from AbsMax; or 0."""
    amax_stride: Int32
    """From sequence to sequence."""
    block_rows: Int32
    """64 or 128 rows have a scale, a power of two below their head's largest if `amax` is given; 0:
    all rows share that of `amax`."""
    group: Int32
    """Successive heads with one scale: one, if blocks have scales."""

    @cute.jit
    def descale(self, low: Float32, high: Float32, block: Block, thread: Int32) -> Float32:
        """The divisor of this thread's values, which is stored as well.

        low, high: the greatest magnitudes of the block's halves.
        """
        of_group, shared = block.head, Float32(0.0)
        if self.amax != 0:
            of_group = block.head // self.group
            of_sequence = Int64(block.index) * self.amax_stride
            shared = read(Float32, self.amax + 4 * (of_sequence + of_group), Int32(0))
        top, place, writes = shared, Int32(0), block.number == 0 and thread == 0
        if self.block_rows > 0:
            top, place, writes = greater(low, high), block.number, thread == 0
            if self.block_rows < BLOCK_ROWS:
                half = thread // (HALF // 2 * LANES)
                top = low if half == 0 else high
                place = 2 * block.number + half
                writes = thread % (HALF // 2 * LANES) == 0 and place < self.mDescale.shape[2]
        descale = descale_of(top)
        if self.block_rows > 0 and self.amax != 0:
            descale = power_of_two_scale(descale, descale_of(shared))
        if writes:
            self.mDescale[block.index, of_group, place] = descale
        return descale


@cute.jit
def descale_of(top: Float32) -> Float32:
    """An IEEE division by 448, as `Divisor`'s; what is tiny becomes LEAST_DESCALE anyhow."""
    quotient = Divisor(Float32(LARGEST_E4M3), Float32(1 / LARGEST_E4M3)).divide(top)
    descale = top if top == Float32.inf else quotient
    return Float32(LEAST_DESCALE) if descale < LEAST_DESCALE else descale


def power_of_two_scale(descale: Float32, largest: Float32) -> Float32:
    """The least that is not smaller and a power of two, at most OCTAVES, below the largest.

    The difference of the bits has that of the exponents in front, one less if mantissas borrow.
    """
    steps = minimum((largest.bitcast(Int32) - descale.bitcast(Int32)) >> 23, OCTAVES)
    return largest * ((127 - steps) << 23).bitcast(Float32)


class ScaleCounts(NamedTuple):
    """`Scales`' integers, as the kernel takes them."""

    amax_stride: Int32
    block_rows: Int32
    group: Int32


class PreparationAddresses(NamedTuple):
    """Addresses of what rows are centred and rotated by: `Preparation` and `Rotation`."""

    mean: Int64
    signs: Int64


def prepared(
    tables: RotaryTables, rotary: RotaryCounts, given: PreparationAddresses, rotation_size: Int32
) -> Preparation:
    """Return what is done to rows before they are scaled."""
    rotation = Rotation(rotation_size, given.signs)
    return Preparation(Rotary.create(tables, rotary), given.mean, rotation)


class Quantize:
    def __init__(self, config: QuantizeConfig):
        self.cfg = config
        self.rows = RegisterRows(config.dtype, config.columns)
        self.values = Values(config.columns, config.transposed)

    def example_arguments(self) -> tuple:
        shape, stride = [cute.sym_int32() for _ in range(3)], [cute.sym_int64() for _ in range(2)]
        descale = make_fake_tensor(Float32, (*shape,), (*stride, 1), assumed_align=4)
        scales = example(ScaleCounts, lambda: Int32(64))
        rows, values = strided(self.rows.dtype, 4), self.values.example_argument()
        return (rows, values, descale, Int64(0), scales, *example_rest())

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        values: cute.Tensor,
        descale: cute.Tensor,
        amax: Int64,
        scales: ScaleCounts,
        tables: RotaryTables,
        rotary: RotaryCounts,
        given: PreparationAddresses,
        rotation_size: Int32,
        addresses: RowAddresses,
        max_seqlen: Int32,
        stream: cuda.CUstream,
    ):
        """x (batch, seqlen, heads, columns), or (1, total, ...) if packed.

        values has x's layout, or that of v_layout.py.  Sequences have at most max_seqlen rows.
        """
        preparation = prepared(tables, rotary, given, rotation_size)
        lengths = Lengths(*addresses, x.shape[1])
        scales = Scales(descale, amax, *scales)
        self.kernel(x, values, scales, preparation, lengths).launch(
            grid=[x.shape[2], ceil_div(max_seqlen, BLOCK_ROWS), descale.shape[0]],
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
            values = self.rows.load(mX, block, thread)
            self.rows.prepare(values, mX, block, preparation, thread)
            if scales.block_rows > 0:
                low, high = self.rows.amax(values, block, mX.shape[3], of_warps, thread)
            divisor = Divisor.of(scales.descale(low, high, block, thread))
            self.values.store(values, divisor, mValues, block, thread, allocator)
        else:
            scales.descale(low, high, block, thread)


class AbsMax:
    def __init__(self, config: AbsMaxConfig):
        self.cfg = config
        self.rows = RegisterRows(config.dtype, config.columns)

    def example_arguments(self) -> tuple:
        shape = tuple(cute.sym_int32() for _ in range(2))
        amax = make_fake_tensor(Int32, shape, (cute.sym_int64(), cute.sym_int64()), assumed_align=4)
        return (strided(self.rows.dtype, 4), amax, Int32(1), *example_rest())

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        amax: cute.Tensor,
        group: Int32,
        tables: RotaryTables,
        rotary: RotaryCounts,
        given: PreparationAddresses,
        rotation_size: Int32,
        addresses: RowAddresses,
        max_seqlen: Int32,
        stream: cuda.CUstream,
    ):
        """amax (sequences, heads / group): zeros; then the bits of the greatest magnitudes."""
        preparation = prepared(tables, rotary, given, rotation_size)
        lengths = Lengths(*addresses, x.shape[1])
        self.kernel(x, amax, group, preparation, lengths).launch(
            grid=[x.shape[2], ceil_div(max_seqlen, BLOCK_ROWS), amax.shape[0]],
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
            values = self.rows.load(mX, block, thread)
            self.rows.prepare(values, mX, block, preparation, thread)
            low, high = self.rows.amax(values, block, mX.shape[3], of_warps, thread)
            if thread == 0:
                target = cute.domain_offset((block.index, block.head // group), mTops).iterator
                cute.arch.inline_ptx(
                    "red.relaxed.gpu.global.max.s32 [{$r0}], {$r1};",
                    read_only_args=[target.toint(), greater(low, high).bitcast(Int32)],
                )


def example_rest() -> tuple:
    """Return the last arguments of both kernels, from `tables` on."""
    return (
        example(RotaryTables, lambda: Int64(0)),
        example(RotaryCounts, lambda: Int32(1)),
        example(PreparationAddresses, lambda: Int64(0)),
        Int32(1),
        example(RowAddresses, lambda: Int64(0)),
        Int32(1),
    )
