"""Before backward: statistics of every query row; the workspace for dQ becomes 0.

delta = dLSE - rowsum(dO * O), and LSE in the exp2 domain, as workspace.py lays them out.  One pass
over O and dO, bound by memory: eight lanes read a row, 16 bytes each at a time, four rows at once.
A block takes 128 rows of one head and clears their dQ as well.
"""

from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_tensor
from hopper_attention.cute_kernels.backward import workspace
from hopper_attention.cute_kernels.backward.config import PreprocessConfig
from hopper_attention.cute_kernels.conventions import WORKSPACE_ROWS
from hopper_attention.cute_kernels.primitives.arguments import (
    QueryAddresses,
    WorkspaceStatistics,
    example,
)
from hopper_attention.cute_kernels.primitives.arithmetic import minimum
from hopper_attention.cute_kernels.primitives.types import DTYPES, row_statistics, strided
from hopper_attention.cute_kernels.scheduling.sequence import Lengths
from hopper_attention.cute_kernels.scheduling.tile_scheduler import VarlenScheduler
from hopper_attention.cute_kernels.softmax.online import LOG2_E, add

LANES = 8
"""Lanes that read a row."""


class OutputAndGradient(NamedTuple):
    """O and its gradient, (batch, seqlen_q, heads, head_dim_v)."""

    out: cute.Tensor
    dout: cute.Tensor


class Statistics(NamedTuple):
    """The log-sum-exp and its gradient, (batch, heads, seqlen_q) float32."""

    lse: cute.Tensor
    dlse: cute.Tensor


class Preprocess:
    def __init__(self, config: PreprocessConfig):
        self.cfg = config
        self.dtype = DTYPES[config.dtype]
        self.rows = config.threads // LANES
        """Rows of a pass of the block."""
        self.passes = WORKSPACE_ROWS // self.rows

    def example_arguments(self) -> tuple:
        shape = (*(cute.sym_int32() for _ in range(3)), cute.sym_int32(divisibility=32))
        stride = (*(cute.sym_int64(divisibility=4) for _ in range(3)), 1)
        dq = make_fake_tensor(Float32, shape, stride, assumed_align=16)
        return (
            example(OutputAndGradient, lambda: strided(self.dtype, 4)),
            example(Statistics, row_statistics),
            Int32(0),
            example(WorkspaceStatistics, lambda: row_statistics(4)),
            dq,
            example(QueryAddresses, lambda: Int64(0)),
            Int32(1),
        )

    @cute.jit
    def __call__(
        self,
        outputs: OutputAndGradient,
        statistics: Statistics,
        with_dlse: Int32,
        saved_rows: WorkspaceStatistics,
        dq_workspace: cute.Tensor,
        addresses: QueryAddresses,
        num_sequences: Int32,
        stream: cuda.CUstream,
    ):
        entries, seqlen_q, heads, _ = outputs.out.shape
        queries = Lengths(*addresses, seqlen_q)
        rows = entries * seqlen_q
        scheduler = VarlenScheduler(queries, num_sequences, heads, rows, WORKSPACE_ROWS)
        saved = (*saved_rows, dq_workspace)
        self.kernel(*outputs, *statistics, with_dlse, saved, queries, scheduler).launch(
            grid=[scheduler.tiles, 1, 1], block=[self.cfg.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mO: cute.Tensor,
        mdO: cute.Tensor,
        mLSE: cute.Tensor,
        mdLSE: cute.Tensor,
        with_dlse: Int32,
        saved: tuple,
        queries: Lengths,
        scheduler: Any,
    ):
        tile = scheduler.tile(cute.arch.block_idx()[0])
        if tile.batch < scheduler.batch:
            sequence = queries.of(tile.batch)
            entry, head = sequence.batch, tile.head
            first = workspace.first_row(queries.cu_seqlens != 0, sequence, tile.batch)
            thread = cute.arch.thread_idx()[0]
            row, lane = tile.m_block * WORKSPACE_ROWS + thread // LANES, thread % LANES
            last = sequence.offset + sequence.length - 1
            sums = self.row_sums(
                mO[entry, None, head, None], mdO[entry, None, head, None],
                sequence.offset + row, last, lane,
            )  # fmt: skip
            lse_saved, delta_saved, dq_saved = saved
            for i in cutlass.range_constexpr(self.passes):
                here = row + i * self.rows
                place = sequence.offset + here
                total = cute.arch.warp_reduction(sums[i], add, threads_in_group=LANES)
                if lane == 0:
                    lse, delta = Float32.inf, Float32(0.0)
                    if place <= last:
                        natural = mLSE[entry, head, place]
                        # A row without keys or sink may have NaN as dLSE: that of log(0).
                        if natural != -Float32.inf:
                            lse, delta = natural * LOG2_E, -total
                            if with_dlse != 0:
                                delta += mdLSE[entry, head, place]
                    lse_saved[entry, head, first + here] = lse
                    delta_saved[entry, head, first + here] = delta
                self.clear(dq_saved[entry, head, first + here, None], lane)

    @cute.jit
    def row_sums(self, o: cute.Tensor, do: cute.Tensor, row: Int32, last: Int32, lane: Int32):
        """This lane's share of rowsum(dO * O) of its rows (passes,)."""
        sums = cute.make_rmem_tensor((self.passes,), Float32)
        sums.fill(0.0)
        vectors = o.shape[1] // 8
        for j in cutlass.range((vectors + LANES - 1) // LANES, unroll=1):
            vector = j * LANES + lane
            for i in cutlass.range_constexpr(self.passes):
                place = (minimum(row + i * self.rows, last), minimum(vector, vectors - 1))
                product = self.dot(o, do, *place)
                sums[i] = sums[i] + (product if vector < vectors else 0.0)
        return sums

    def dot(self, o: cute.Tensor, do: cute.Tensor, row: Int32, vector: Int32) -> Float32:
        values = []
        for tensor in (o, do):
            loaded = cute.make_rmem_tensor((8,), self.dtype)
            cute.autovec_copy(cute.local_tile(tensor[row, None], (8,), (vector,)), loaded)
            values.append(loaded.load().to(Float32))
        return (values[0] * values[1]).reduce(cute.ReductionOp.ADD, Float32(0.0), 0)

    @cute.jit
    def clear(self, row: cute.Tensor, lane: Int32):
        zeros = cute.make_rmem_tensor((4,), Float32)
        zeros.fill(0.0)
        for j in cutlass.range(row.shape[0] // (4 * LANES), unroll=1):
            cute.autovec_copy(zeros, cute.local_tile(row, (4,), (j * LANES + lane,)))
