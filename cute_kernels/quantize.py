"""Quantisation to FP8: x ~ values * descale, as python/hopper_attention/quantize.py states it.

    ColumnSums   first, if the mean over seqlen is taken off: sums of 256 rows
    AbsMax       then, where all rows of a head or everything share a scale
    Quantize     scale and cast; finds the scale in the same pass where 64 or 128 rows share one

A block of 256 threads holds 128 rows of one head: four lanes a row, `columns / 32` vectors of 8
columns (16 bytes) a lane, two successive rows a thread.  All of them stay in registers, as float32,
from load to cast; mean and rotation are arguments:

    load -> - mean -> rotation (hadamard.py) -> greatest magnitude -> / descale -> e4m3 -> store

The greatest magnitude is that of a warp's 16 rows (redux on the bits: floats that are not negative
compare as integers), then of four or eight warps through shared memory.  AbsMax ends with an atomic
maximum of the bits into a table of zeros, which Quantize reads then.  NaN is greater than all, so
NaN and infinity reach everything that shares their scale: dequantised it is NaN.

Rows behind the last are loaded as the last, vectors behind the last as the last: neither changes a
maximum, but for rotated vectors, which are left out, and neither is stored.

With `transposed`, values go through shared memory: a thread stores its two rows of a column as 16
bits; column c has 128 bytes, its 16-byte chunk k at chunk k ^ (c / 8) % 8.  Four lanes store to
columns 8 apart, 16 bytes in each, and eight lanes load a column: no bank is asked twice.  Columns
are filled up with zeros to multiples of 16 rows.

The quotient is an IEEE division's: q = x r with the rounded reciprocal r of the divisor d, then
q - (q d - x) r (Markstein, IBM J. Res. Dev. 34, 1990); with these signs -0 stays -0.

What it costs beside the copy: docs/tuning.md.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint16
from cutlass._mlir.dialects import llvm
from cutlass.cute.runtime import make_fake_tensor
from cutlass.cutlass_dsl import T, dsl_user_op
from cutlass.memory import SmemAllocator
from hopper_attention.cute_kernels.arithmetic import ceil_div, minimum
from hopper_attention.cute_kernels.hadamard import (
    LANES,
    SPAN,
    VECTOR,
    Rotation,
    vector_of,
)
from hopper_attention.cute_kernels.memory import read
from hopper_attention.cute_kernels.types import DTYPES, strided
from hopper_attention.hopper.config import AbsMaxConfig, ColumnSumsConfig, QuantizeConfig

FP8 = cutlass.Float8E4M3FN
LARGEST = 448.0
"""Of e4m3."""
LEAST = 1e-12
"""Of a descale."""
ROWS = 128
"""Of a block: two a thread."""
WARPS = 8
HALF = 128
"""Threads with the first 64 rows."""
SUM_ROWS = 256
"""Of a block of ColumnSums."""
AHEAD = 4
"""Rows of a thread that ColumnSums loads before it adds them; `unroll=4` crashes the compiler."""


class Rows:
    """The rows of one block, in registers."""

    def __init__(self, dtype: str, columns: int):
        self.dtype = DTYPES[dtype]
        self.vectors = columns // SPAN
        """Of a lane."""

    def example_arguments(self) -> tuple:
        """mean; group; size and signs of the rotation."""
        return (Int64(0), Int32(1), Int32(1), Int64(0))

    def grid(self, mX: cute.Tensor) -> list:
        """Heads first: they share pages, and no division is needed."""
        return [mX.shape[2], ceil_div(mX.shape[1], ROWS), mX.shape[0]]

    def first_row(self, block: Int32, thread: Int32) -> Int32:
        """The first of the two of this thread."""
        return block * ROWS + thread // LANES * 2

    @cute.jit
    def load(self, mX: cute.Tensor, place: tuple, mean: Int64, rotation: Rotation, thread: Int32):
        """(VECTOR, vectors, 2) float32: this thread's, mean off, rotated."""
        head, block, batch = place  # the index of this block
        x = mX[batch, None, head, None]
        row, lane = self.first_row(block, thread), thread % LANES
        last_row, last = x.shape[0] - 1, x.shape[1] // VECTOR - 1
        loaded = cute.make_rmem_tensor((VECTOR, self.vectors, 2), self.dtype)
        for r in cutlass.range_constexpr(2):
            source = x[minimum(row + r, last_row), None]
            for v in cutlass.range_constexpr(self.vectors):
                vector = minimum(v * LANES + lane, last)
                cute.autovec_copy(cute.local_tile(source, (VECTOR,), (vector,)), loaded[None, v, r])
        values = widen(loaded)
        if mean != 0:
            start = mean + 4 * (Int64(batch) * mX.shape[2] + head) * mX.shape[3]
            self.center(values, start, lane, last)
        rotation.apply(values, lane, last)
        return values

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
    def tops(self, values: cute.Tensor, columns: Int32, of_warps: cute.Tensor, thread: Int32):
        """The greatest magnitudes of the first and of the last 64 rows; waits for all threads.

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
        return halves[0], halves[1]


def widen(loaded: cute.Tensor) -> cute.Tensor:
    """In float32, as exactly.  Of bf16 the DSL makes three instructions for two elements."""
    values = cute.make_rmem_tensor(loaded.shape, Float32)
    if loaded.element_type is cutlass.BFloat16:
        words = cute.recast_tensor(loaded, Int32)
        for i in range(cute.size(words)):
            values[2 * i] = (words[i] << 16).bitcast(Float32)
            values[2 * i + 1] = (words[i] & Int32(-1 << 16)).bitcast(Float32)
    else:
        values.store(loaded.load().to(Float32))
    return values


def greater(a: Float32, b: Float32) -> Float32:
    """NaN if either is."""
    return cute.arch.fmax(a, b, nan=True)


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


def one_of_each_warp(allocator: SmemAllocator) -> cute.Tensor:
    return allocator.allocate_tensor(Float32, cute.make_layout(WARPS), byte_alignment=16)


class Quantize:
    def __init__(self, config: QuantizeConfig):
        self.cfg = config
        self.rows = Rows(config.dtype, config.columns)

    def example_arguments(self) -> tuple:
        symbols = [cute.sym_int32() for _ in range(3)]
        columns = cute.sym_int32(divisibility=16 if self.cfg.transposed else VECTOR)
        step = 16 if self.cfg.transposed else VECTOR
        stride = (*(cute.sym_int64(divisibility=step) for _ in range(3)), 1)
        values = make_fake_tensor(FP8, (*symbols, columns), stride, assumed_align=16)
        shape, stride = [cute.sym_int32() for _ in range(3)], [cute.sym_int64() for _ in range(2)]
        descale = make_fake_tensor(Float32, (*shape,), (*stride, 1), assumed_align=4)
        x = strided(self.rows.dtype, 4)
        return (x, values, descale, Int64(0), Int32(64), *self.rows.example_arguments())

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,
        mValues: cute.Tensor,
        mDescale: cute.Tensor,
        tops: Int64,
        block_rows: Int32,
        mean: Int64,
        group: Int32,
        rotation_size: Int32,
        signs: Int64,
        stream: cuda.CUstream,
    ):
        """mX (batch, seqlen, heads, columns).

        mValues: the same, or transposed (batch, heads, columns, seqlen up to a multiple of 16).
        mDescale (batch, heads / group, blocks of `block_rows`: 64 or 128, written for each); but
        (batch, heads / group, 1) if `tops` is given, the address of the greatest magnitudes' bits,
        which lie as mDescale does.  mean: address of (batch, heads, columns) float32, or 0.
        rotation_size, signs: `Rotation`.
        """
        rotation = Rotation(rotation_size, signs)
        scales = (mDescale, tops, block_rows, group)
        self.kernel(mX, mValues, scales, mean, rotation).launch(
            grid=self.rows.grid(mX), block=[self.cfg.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self, mX: cute.Tensor, mValues: cute.Tensor, scales: tuple, mean: Int64, rotation: Rotation
    ):
        thread = cute.arch.thread_idx()[0]
        place = cute.arch.block_idx()
        allocator = SmemAllocator()
        shared = one_of_each_warp(allocator)
        values = self.rows.load(mX, place, mean, rotation, thread)
        divisor = Divisor.of(self.descale(values, mX.shape[3], scales, place, shared, thread))
        if cutlass.const_expr(self.cfg.transposed):
            layout = cute.make_layout(self.cfg.columns * ROWS // 2)
            pairs = allocator.allocate_tensor(Uint16, layout, byte_alignment=16)
            self.transpose(values, divisor, pairs, mX.shape[1], place, thread)
            cute.arch.sync_threads()
            self.store_columns(pairs, mValues, place, thread)
        else:
            self.store_rows(values, divisor, mValues, place, thread)

    @cute.jit
    def descale(
        self,
        values: cute.Tensor,
        columns: Int32,
        scales: tuple,
        place: tuple,
        shared: cute.Tensor,
        thread: Int32,
    ) -> Float32:
        """What this thread's values are divided by: the descale, which is stored as well."""
        mDescale, tops, block_rows, group = scales
        head, block, batch = place
        of_group = head // group
        top, first, writes = Float32(0.0), block, Boolean(thread == 0)
        if tops != 0:
            of_batch = Int64(batch) * mDescale.stride[0]
            top = read(Float32, tops + 4 * (of_batch + of_group * mDescale.stride[1]), Int32(0))
            writes = block == 0 and thread == 0
        else:
            low, high = self.rows.tops(values, columns, shared, thread)
            top = greater(low, high)
            if block_rows < ROWS:
                half = thread // HALF
                top = low if half == 0 else high
                first = 2 * block + half
                writes = thread % HALF == 0 and first < mDescale.shape[2]
        descale = top / LARGEST
        descale = Float32(LEAST) if descale < LEAST else descale
        if writes:
            mDescale[batch, of_group, first] = descale
        return descale

    @cute.jit
    def store_rows(
        self,
        values: cute.Tensor,
        divisor: Divisor,
        mValues: cute.Tensor,
        place: tuple,
        thread: Int32,
    ):
        head, block, batch = place
        row, lane = self.rows.first_row(block, thread), thread % LANES
        for r in cutlass.range_constexpr(2):
            target = mValues[batch, row + r, head, None]
            for v in cutlass.range_constexpr(self.rows.vectors):
                pairs = cute.make_rmem_tensor((VECTOR // 2,), Uint16)
                for i in cutlass.range_constexpr(VECTOR // 2):
                    low, high = (divisor.divide(values[2 * i + j, v, r]) for j in range(2))
                    pairs[i] = to_fp8(low, high)
                vector = v * LANES + lane
                if row + r < mValues.shape[1] and vector * VECTOR < mValues.shape[3]:
                    out = cute.recast_tensor(pairs, FP8)
                    cute.autovec_copy(out, cute.local_tile(target, (VECTOR,), (vector,)))

    @cute.jit
    def transpose(
        self,
        values: cute.Tensor,
        divisor: Divisor,
        pairs: cute.Tensor,
        seqlen: Int32,
        place: tuple,
        thread: Int32,
    ):
        """To shared memory; what is behind the last row becomes 0."""
        row, lane = self.rows.first_row(place[1], thread), thread % LANES
        exists = Int32(0xFFFF) if row + 1 < seqlen else Int32(0xFF)
        exists = exists if row < seqlen else Int32(0)
        for v in cutlass.range_constexpr(self.rows.vectors):
            vector = v * LANES + lane
            chunk = (thread // 32) ^ (vector % 8)
            start = vector * VECTOR * (ROWS // 2) + chunk * 8 + thread % 32 // LANES
            for e in cutlass.range_constexpr(VECTOR):
                low, high = (divisor.divide(values[e, v, r]) for r in range(2))
                pairs[start + e * (ROWS // 2)] = to_fp8(low, high) & Uint16(exists)

    @cute.jit
    def store_columns(self, pairs: cute.Tensor, mValues: cute.Tensor, place: tuple, thread: Int32):
        head, block, batch = place
        chunks = ROWS // 16
        for i in cutlass.range_constexpr(self.cfg.columns * chunks // self.cfg.threads):
            column, chunk = (i * self.cfg.threads + thread) // chunks, thread % chunks
            stored = column * chunks + (chunk ^ (column // VECTOR % 8))
            out = cute.make_rmem_tensor((8,), Uint16)
            cute.autovec_copy(cute.local_tile(pairs, (8,), (stored,)), out)
            of_column = block * chunks + chunk
            if column < mValues.shape[2] and of_column * 16 < mValues.shape[3]:
                target = cute.local_tile(mValues[batch, head, column, None], (16,), (of_column,))
                cute.autovec_copy(cute.recast_tensor(out, FP8), target)


class AbsMax:
    def __init__(self, config: AbsMaxConfig):
        self.cfg = config
        self.rows = Rows(config.dtype, config.columns)

    def example_arguments(self) -> tuple:
        shape = tuple(cute.sym_int32() for _ in range(2))
        tops = make_fake_tensor(Int32, shape, (cute.sym_int64(), cute.sym_int64()), assumed_align=4)
        return (strided(self.rows.dtype, 4), tops, *self.rows.example_arguments())

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,
        mTops: cute.Tensor,
        mean: Int64,
        group: Int32,
        rotation_size: Int32,
        signs: Int64,
        stream: cuda.CUstream,
    ):
        """mTops (batch, heads / group): zeros; then the bits of the greatest magnitudes."""
        rotation = Rotation(rotation_size, signs)
        self.kernel(mX, mTops, mean, group, rotation).launch(
            grid=self.rows.grid(mX), block=[self.cfg.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self, mX: cute.Tensor, mTops: cute.Tensor, mean: Int64, group: Int32, rotation: Rotation
    ):
        thread = cute.arch.thread_idx()[0]
        place = cute.arch.block_idx()
        head, _, batch = place
        shared = one_of_each_warp(SmemAllocator())
        values = self.rows.load(mX, place, mean, rotation, thread)
        low, high = self.rows.tops(values, mX.shape[3], shared, thread)
        if thread == 0:
            target = cute.domain_offset((batch, head // group), mTops).iterator
            cute.arch.inline_ptx(
                "red.relaxed.gpu.global.max.s32 [{$r0}], {$r1};",
                read_only_args=[target.toint(), greater(low, high).bitcast(Int32)],
            )


class ColumnSums:
    """Deterministic: a block adds 256 rows of a head in an order that only columns change."""

    def __init__(self, config: ColumnSumsConfig):
        self.cfg = config
        self.dtype = DTYPES[config.dtype]

    def example_arguments(self) -> tuple:
        shape = (*(cute.sym_int32() for _ in range(3)), cute.sym_int32(divisibility=VECTOR))
        stride = (*(cute.sym_int64(divisibility=VECTOR) for _ in range(3)), 1)
        return (strided(self.dtype, 4), make_fake_tensor(Float32, shape, stride, assumed_align=16))

    @cute.jit
    def __call__(self, mX: cute.Tensor, mSums: cute.Tensor, stream: cuda.CUstream):
        """mX (batch, seqlen, heads, columns), mSums (chunks of 256 rows, batch, heads, columns)."""
        chunks, batch, heads, _ = mSums.shape
        self.kernel(mX, mSums).launch(
            grid=[heads, chunks, batch], block=[self.cfg.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mSums: cute.Tensor):
        head, chunk, entry = cute.arch.block_idx()
        thread, columns = cute.arch.thread_idx()[0], mSums.shape[3]
        vectors = columns // VECTOR
        at_once = self.cfg.threads // vectors
        row, vector = thread // vectors, thread % vectors

        sums = self.sum_rows(mX[entry, None, head, None], chunk, row, vector, at_once)
        layout = cute.make_layout(self.cfg.threads * VECTOR)
        shared = SmemAllocator().allocate_tensor(Float32, layout, byte_alignment=16)
        cute.autovec_copy(sums, cute.local_tile(shared, (VECTOR,), (thread,)))
        cute.arch.sync_threads()
        if thread < columns:
            total = Float32(0.0)
            for i in cutlass.range(at_once, unroll=8):
                total += shared[i * columns + thread]
            mSums[chunk, entry, head, thread] = total

    @cute.jit
    def sum_rows(self, x: cute.Tensor, chunk: Int32, row: Int32, vector: Int32, at_once: Int32):
        """(VECTOR,) float32: this thread's rows of `chunk`; not read from threads left over."""
        sums = cute.make_rmem_tensor((VECTOR,), Float32)
        sums.fill(0.0)
        end = minimum((chunk + 1) * SUM_ROWS, x.shape[0])
        first, step = chunk * SUM_ROWS + row, AHEAD * at_once
        for i in cutlass.range((SUM_ROWS + step - 1) // step, unroll=1):
            loaded = cute.make_rmem_tensor((VECTOR, AHEAD), self.dtype)
            for j in cutlass.range_constexpr(AHEAD):
                place = minimum(first + i * step + j * at_once, x.shape[0] - 1)
                source = cute.local_tile(x[place, None], (VECTOR,), (vector,))
                cute.autovec_copy(source, loaded[None, j])
            values = widen(loaded)
            for j in cutlass.range_constexpr(AHEAD):
                exists = first + i * step + j * at_once < end
                for e in cutlass.range_constexpr(VECTOR):
                    sums[e] = sums[e] + (values[e, j] if exists else Float32(0.0))
        return sums
