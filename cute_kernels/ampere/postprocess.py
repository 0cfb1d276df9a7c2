"""After backward on Ampere: dQ from the workspace, scaled and rounded.

A block takes 128 rows of one head, each warp 16 of them, which it reads as an accumulator
(dq_bands.py) and stores as rows (row_store.py), 32 columns at a time.  Bound by memory.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_tensor
from hopper_attention.cute_kernels.ampere.config import MATRIX, AmperePostprocessConfig
from hopper_attention.cute_kernels.ampere.mma import Coordinates, accumulator
from hopper_attention.cute_kernels.ampere.row_store import store_rounded
from hopper_attention.cute_kernels.backward import workspace
from hopper_attention.cute_kernels.conventions import WORKSPACE_ROWS
from hopper_attention.cute_kernels.primitives.arguments import QueryAddresses, example
from hopper_attention.cute_kernels.primitives.arithmetic import minimum
from hopper_attention.cute_kernels.primitives.types import DTYPES, strided
from hopper_attention.cute_kernels.scheduling.sequence import Lengths
from hopper_attention.cute_kernels.scheduling.tile_scheduler import VarlenScheduler

COLUMNS = 32
"""At a time."""
ELEMENTS = MATRIX * COLUMNS


class AmperePostprocess:
    def __init__(self, config: AmperePostprocessConfig):
        self.cfg = config
        self.dtype = DTYPES[config.dtype]
        assert config.threads // 32 * MATRIX == WORKSPACE_ROWS

    def example_arguments(self) -> tuple:
        shape = (*(cute.sym_int32() for _ in range(3)), cute.sym_int32(divisibility=ELEMENTS))
        stride = (*(cute.sym_int64(divisibility=4) for _ in range(3)), 1)
        dq = make_fake_tensor(Float32, shape, stride, assumed_align=16)
        addresses = example(QueryAddresses, lambda: Int64(0))
        return (dq, strided(self.dtype, 4), Float32(1.0), addresses, Int32(1))

    @cute.jit
    def __call__(
        self,
        dq_workspace: cute.Tensor,
        dq: cute.Tensor,
        softmax_scale: Float32,
        addresses: QueryAddresses,
        num_sequences: Int32,
        stream: cuda.CUstream,
    ):
        entries, seqlen_q, heads, _ = dq.shape
        queries = Lengths(*addresses, seqlen_q)
        rows = entries * seqlen_q
        scheduler = VarlenScheduler(queries, num_sequences, heads, rows, WORKSPACE_ROWS)
        self.kernel(dq_workspace, dq, softmax_scale, queries, scheduler).launch(
            grid=[scheduler.tiles, 1, 1], block=[self.cfg.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        dq_workspace: cute.Tensor,
        mdQ: cute.Tensor,
        softmax_scale: Float32,
        queries: Lengths,
        scheduler: Any,
    ):
        """`dq_workspace`: (entries, heads, 16 rows, their elements)."""
        tile = scheduler.tile(cute.arch.block_idx()[0])
        first = tile.m_block * WORKSPACE_ROWS
        first += cute.arch.make_warp_uniform(cute.arch.warp_idx()) * MATRIX
        sequence = queries.of(minimum(tile.batch, scheduler.batch - 1))
        if tile.batch < scheduler.batch and first < sequence.length:
            start = workspace.first_row(queries.cu_seqlens != 0, sequence, tile.batch)
            band = dq_workspace[sequence.batch, tile.head, (start + first) // MATRIX, None]
            lane = cute.arch.lane_idx()

            def target(row):
                line = mdQ[sequence.batch, sequence.offset + row, tile.head, None]
                return row < sequence.length, line

            acc = accumulator(MATRIX, COLUMNS)
            for part in cutlass.range(band.shape[0] // ELEMENTS, unroll=1):
                for i in cutlass.range_constexpr(cute.size(acc)):
                    acc[i] = band[part * ELEMENTS + 32 * i + lane] * softmax_scale
                store_rounded(acc, Coordinates(first, lane, part * COLUMNS), target, self.dtype)
