"""Means of columns over sequences, for quantize.py: sums of 256 rows, then sums of those.

Deterministic: each block adds in an order that only the number of columns changes.  Every sequence
has chunks of its own, which lie as blocks do among V's columns (columns.py).
"""

from dataclasses import dataclass
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_tensor
from cutlass.memory import SmemAllocator
from hopper_attention.cute_kernels.arithmetic import ceil_div, maximum, minimum
from hopper_attention.cute_kernels.hadamard import VECTOR
from hopper_attention.cute_kernels.quantize_rows import widen
from hopper_attention.cute_kernels.sequence import Lengths, Sequence
from hopper_attention.cute_kernels.types import DTYPES, strided
from hopper_attention.hopper.config import ColumnMeansConfig, ColumnSumsConfig

SUM_ROWS = 256
"""Of a chunk."""
AHEAD = 4
"""Rows of a thread that are loaded before they are added; `unroll=4` crashes the compiler."""


def chunks_of():
    """(batch, chunks, heads, columns) float32."""
    shape = (*(cute.sym_int32() for _ in range(3)), cute.sym_int32(divisibility=VECTOR))
    stride = (*(cute.sym_int64(divisibility=VECTOR) for _ in range(3)), 1)
    return make_fake_tensor(Float32, shape, stride, assumed_align=16)


def first_chunk(sequence: Sequence, index: Int32) -> Int32:
    return sequence.offset // SUM_ROWS + index - sequence.batch


@dataclass(frozen=True)
class Team:
    """A block's threads: together they add as many rows at once as there are threads for."""

    shared: cute.Tensor
    """(threads * VECTOR,) float32"""
    threads: Any
    thread: Int32
    columns: Int32

    @staticmethod
    def of(threads: int, columns: Int32) -> "Team":
        layout = cute.make_layout(threads * VECTOR)
        shared = SmemAllocator().allocate_tensor(Float32, layout, byte_alignment=16)
        return Team(shared, threads, cute.arch.thread_idx()[0], columns)

    @cute.jit
    def sum_rows(self, x: cute.Tensor, first: Int32, rows: Int32) -> Float32:
        """Of rows [first, first + rows) of x, the sum of column `thread`, if there is one."""
        at_once = self.threads // (self.columns // VECTOR)
        sums = self.own_rows(x, first, rows, at_once)
        cute.autovec_copy(sums, cute.local_tile(self.shared, (VECTOR,), (self.thread,)))
        cute.arch.sync_threads()
        total = Float32(0.0)
        if self.thread < self.columns:
            for i in cutlass.range(at_once, unroll=8):
                total += self.shared[i * self.columns + self.thread]
        return total

    @cute.jit
    def own_rows(self, x: cute.Tensor, first: Int32, rows: Int32, at_once: Int32):
        """(VECTOR,) float32: every `at_once`th row; not read from threads left over."""
        sums = cute.make_rmem_tensor((VECTOR,), Float32)
        sums.fill(0.0)
        vectors = self.columns // VECTOR
        row, vector = self.thread // vectors, self.thread % vectors
        step = AHEAD * at_once
        for i in cutlass.range((rows + step - 1) // step, unroll=1):
            loaded = cute.make_rmem_tensor((VECTOR, AHEAD), x.element_type)
            for j in cutlass.range_constexpr(AHEAD):
                place = first + minimum(row + i * step + j * at_once, rows - 1)
                source = cute.local_tile(x[place, None], (VECTOR,), (vector,))
                cute.autovec_copy(source, loaded[None, j])
            values = widen(loaded)
            for j in cutlass.range_constexpr(AHEAD):
                exists = row + i * step + j * at_once < rows
                for e in cutlass.range_constexpr(VECTOR):
                    sums[e] = sums[e] + (values[e, j] if exists else Float32(0.0))
        return sums


class ColumnSums:
    def __init__(self, config: ColumnSumsConfig):
        self.cfg = config

    def example_arguments(self) -> tuple:
        lengths = (Int64(0), Int64(0), Int32(1), Int32(1))
        return (strided(DTYPES[self.cfg.dtype], 4), chunks_of(), *lengths)

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,
        mSums: cute.Tensor,
        cu_seqlens: Int64,
        seqused: Int64,
        sequences: Int32,
        max_seqlen: Int32,
        stream: cuda.CUstream,
    ):
        """mX (batch, seqlen, heads, columns), mSums (batch, chunks, heads, columns)."""
        lengths = Lengths(cu_seqlens, seqused, mX.shape[1])
        self.kernel(mX, mSums, lengths).launch(
            grid=[mX.shape[2], ceil_div(max_seqlen, SUM_ROWS), sequences],
            block=[self.cfg.threads, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mSums: cute.Tensor, lengths: Lengths):
        head, chunk, index = cute.arch.block_idx()
        sequence, team = lengths.of(index), Team.of(self.cfg.threads, mX.shape[3])
        rows = minimum(sequence.length - chunk * SUM_ROWS, SUM_ROWS)
        if rows > 0:
            x = mX[sequence.batch, None, head, None]
            total = team.sum_rows(x, sequence.offset + chunk * SUM_ROWS, rows)
            if team.thread < team.columns:
                place = first_chunk(sequence, index) + chunk
                mSums[sequence.batch, place, head, team.thread] = total


class ColumnMeans:
    def __init__(self, config: ColumnMeansConfig):
        self.cfg = config

    def example_arguments(self) -> tuple:
        shape = tuple(cute.sym_int32() for _ in range(3))
        stride = (cute.sym_int64(), cute.sym_int64(), 1)
        means = make_fake_tensor(Float32, shape, stride, assumed_align=4)
        return (chunks_of(), means, Int64(0), Int64(0), Int32(1))

    @cute.jit
    def __call__(
        self,
        mSums: cute.Tensor,
        mMeans: cute.Tensor,
        cu_seqlens: Int64,
        seqused: Int64,
        padded: Int32,
        stream: cuda.CUstream,
    ):
        """mSums of ColumnSums; mMeans (sequences, heads, columns), 0 of a sequence without rows."""
        sequences, heads, _ = mMeans.shape
        self.kernel(mSums, mMeans, Lengths(cu_seqlens, seqused, padded)).launch(
            grid=[heads, sequences, 1], block=[self.cfg.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, mSums: cute.Tensor, mMeans: cute.Tensor, lengths: Lengths):
        head, index, _ = cute.arch.block_idx()
        sequence, team = lengths.of(index), Team.of(self.cfg.threads, mSums.shape[3])
        chunks = mSums[sequence.batch, None, head, None]
        count = ceil_div(sequence.length, SUM_ROWS)
        total = team.sum_rows(chunks, first_chunk(sequence, index), count)
        if team.thread < team.columns:
            mMeans[index, head, team.thread] = total / Float32(maximum(sequence.length, 1))
