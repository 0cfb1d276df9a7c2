"""Means of columns over sequences, for quantize.py: sums of 256 rows, then sums of those.

Deterministic: each block adds in an order that only the number of columns changes.  Every sequence
has chunks of its own, which lie as blocks do among V's columns (v_layout.py).
"""

from dataclasses import dataclass
from typing import Any, Optional

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_tensor
from cutlass.memory import SmemAllocator
from hopper_attention.cute_kernels.conventions import SUM_ROWS
from hopper_attention.cute_kernels.primitives.arguments import RowAddresses, example
from hopper_attention.cute_kernels.primitives.arithmetic import ceil_div, maximum, minimum
from hopper_attention.cute_kernels.primitives.types import DTYPES, strided
from hopper_attention.cute_kernels.quantization.config import ColumnMeansConfig, ColumnSumsConfig
from hopper_attention.cute_kernels.quantization.rotary import (
    Embedding,
    Rotary,
    RotaryCounts,
    RotaryTables,
)
from hopper_attention.cute_kernels.quantization.vectors import VECTOR, widen
from hopper_attention.cute_kernels.scheduling.sequence import Lengths, Sequence

AHEAD = 4
"""Rows of a thread that are loaded before they are added; `unroll=4` crashes the compiler.

With a rotary embedding, for which registers would run out, one.
"""


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

    @property
    def at_once(self):
        return self.threads // (self.columns // VECTOR)

    @staticmethod
    def of(threads: int, columns: Int32) -> "Team":
        layout = cute.make_layout(threads * VECTOR)
        shared = SmemAllocator().allocate_tensor(Float32, layout, byte_alignment=16)
        return Team(shared, threads, cute.arch.thread_idx()[0], columns)

    @cute.jit
    def sum_rows(
        self, x: cute.Tensor, first: Int32, rows: Int32, embedding: Optional[Embedding]
    ) -> Float32:
        """Add rows [first, first + rows) of x, in column `thread`, if there is one."""
        sums = cute.make_rmem_tensor((VECTOR,), Float32)
        sums.fill(0.0)
        if cutlass.const_expr(embedding is None):
            self.add_rows(sums, x, first, rows, None, AHEAD)
        elif embedding.rotary.dim > 0:
            self.add_rows(sums, x, first, rows, embedding, 1)
        else:
            self.add_rows(sums, x, first, rows, None, AHEAD)
        cute.autovec_copy(sums, cute.local_tile(self.shared, (VECTOR,), (self.thread,)))
        cute.arch.sync_threads()
        total = Float32(0.0)
        if self.thread < self.columns:
            for i in cutlass.range(self.at_once, unroll=8):
                total += self.shared[i * self.columns + self.thread]
        return total

    @cute.jit
    def add_rows(
        self,
        sums: cute.Tensor,
        x: cute.Tensor,
        first: Int32,
        rows: Int32,
        embedding: Optional[Embedding],
        ahead: cutlass.Constexpr,
    ):
        """This thread's rows, `ahead` of them loaded at once; sums of threads left over are not
        read.  The order is always the same."""
        vectors = self.columns // VECTOR
        row, vector = self.thread // vectors, self.thread % vectors
        step = ahead * self.at_once
        for i in cutlass.range((rows + step - 1) // step, unroll=1):
            loaded = cute.make_rmem_tensor((VECTOR, ahead), x.element_type)
            places = [row + i * step + j * self.at_once for j in range(ahead)]
            for j in cutlass.range_constexpr(ahead):
                source = x[first + minimum(places[j], rows - 1), None]
                cute.autovec_copy(cute.local_tile(source, (VECTOR,), (vector,)), loaded[None, j])
            values = widen(loaded)
            for j in cutlass.range_constexpr(ahead):
                if cutlass.const_expr(embedding is not None):
                    place = first + minimum(places[j], rows - 1)
                    embedding.apply(values[None, j], x[place, None], vector, place)
                for e in cutlass.range_constexpr(VECTOR):
                    sums[e] = sums[e] + (values[e, j] if places[j] < rows else Float32(0.0))


class ColumnSums:
    def __init__(self, config: ColumnSumsConfig):
        self.cfg = config

    def example_arguments(self) -> tuple:
        return (
            strided(DTYPES[self.cfg.dtype], 4),
            chunks_of(),
            example(RotaryTables, lambda: Int64(0)),
            example(RotaryCounts, lambda: Int32(1)),
            example(RowAddresses, lambda: Int64(0)),
            Int32(1),
            Int32(1),
        )

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        sums: cute.Tensor,
        tables: RotaryTables,
        rotary: RotaryCounts,
        addresses: RowAddresses,
        sequences: Int32,
        max_seqlen: Int32,
        stream: cuda.CUstream,
    ):
        """x (batch, seqlen, heads, columns), sums (batch, chunks, heads, columns).

        Rows are turned by the rotary embedding before they are added.
        """
        lengths = Lengths(*addresses, x.shape[1])
        self.kernel(x, sums, Rotary.create(tables, rotary), lengths).launch(
            grid=[x.shape[2], ceil_div(max_seqlen, SUM_ROWS), sequences],
            block=[self.cfg.threads, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mSums: cute.Tensor, rotary: Rotary, lengths: Lengths):
        head, chunk, index = cute.arch.block_idx()
        sequence, team = lengths.of(index), Team.of(self.cfg.threads, mX.shape[3])
        rows = minimum(sequence.length - chunk * SUM_ROWS, SUM_ROWS)
        if rows > 0:
            x = mX[sequence.batch, None, head, None]
            first = sequence.offset + chunk * SUM_ROWS
            total = team.sum_rows(x, first, rows, rotary.of(sequence, index))
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
        return (chunks_of(), means, example(RowAddresses, lambda: Int64(0)), Int32(1))

    @cute.jit
    def __call__(
        self,
        sums: cute.Tensor,
        means: cute.Tensor,
        addresses: RowAddresses,
        padded: Int32,
        stream: cuda.CUstream,
    ):
        """sums of ColumnSums; means (sequences, heads, columns), 0 of a sequence without rows."""
        sequences, heads, _ = means.shape
        self.kernel(sums, means, Lengths(*addresses, padded)).launch(
            grid=[heads, sequences, 1], block=[self.cfg.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, mSums: cute.Tensor, mMeans: cute.Tensor, lengths: Lengths):
        head, index, _ = cute.arch.block_idx()
        sequence, team = lengths.of(index), Team.of(self.cfg.threads, mSums.shape[3])
        chunks = mSums[sequence.batch, None, head, None]
        count = ceil_div(sequence.length, SUM_ROWS)
        total = team.sum_rows(chunks, first_chunk(sequence, index), count, None)
        if team.thread < team.columns:
            mMeans[index, head, team.thread] = total / Float32(maximum(sequence.length, 1))
