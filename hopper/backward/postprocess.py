"""After backward: dQ from the workspace, scaled and rounded.

A block takes one block of rows of one head.  Its threads read the elements that a thread of the
backward kernel left (dq_tile.py): 16 bytes a thread, coalesced.  Through shared memory they
become rows, stored 16 bytes a thread as far as rows and columns exist.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import warp
from cutlass.cute.runtime import make_fake_tensor
from cutlass.memory import SmemAllocator
from hopper_attention.cute_kernels.backward import workspace
from hopper_attention.cute_kernels.primitives.arguments import QueryAddresses, example
from hopper_attention.cute_kernels.primitives.fragments import PackedFragment
from hopper_attention.cute_kernels.primitives.types import DTYPES, strided
from hopper_attention.cute_kernels.scheduling.sequence import Lengths, Sequence
from hopper_attention.cute_kernels.scheduling.tile_scheduler import VarlenScheduler
from hopper_attention.hopper.backward.config import PostprocessConfig
from hopper_attention.hopper.backward.dq_tile import DqTile
from hopper_attention.hopper.primitives.row_store import swizzle_atom, widest_span


class Postprocess:
    def __init__(self, config: PostprocessConfig):
        self.cfg = config
        self.dtype = DTYPES[config.dtype]
        self.tile = DqTile(self.dtype, config.tile_m, config.head_dim)

    def example_arguments(self) -> tuple:
        shape = (*(cute.sym_int32() for _ in range(3)), 2 * self.tile.elements)
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
        scheduler = VarlenScheduler(queries, num_sequences, heads, rows, self.cfg.tile_m)
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
        tile_m, head_dim = self.cfg.tile_m, self.cfg.head_dim
        tile = scheduler.tile(cute.arch.block_idx()[0])
        if tile.batch < scheduler.batch:
            sequence = queries.of(tile.batch)
            first = workspace.first_row(queries.cu_seqlens != 0, sequence, tile.batch)
            block = first // tile_m + tile.m_block
            thread = cute.arch.thread_idx()[0]

            source = dq_workspace[sequence.batch, tile.head, block, None].iterator
            acc = self.tile.accumulator()
            vectors = self.tile.of_thread(source, thread // 128, thread % 128)
            cute.autovec_copy(vectors, self.tile.as_vectors(acc))
            for i in cutlass.range_constexpr(cute.size(acc)):
                acc[i] = acc[i] * softmax_scale
            out = PackedFragment.like(acc, self.dtype)
            out.convert(acc)

            atom = swizzle_atom(self.dtype, widest_span(self.tile.columns))
            layout = cute.tile_to_shape(atom, (tile_m, head_dim), (0, 1))
            shared = SmemAllocator().allocate_tensor(
                self.dtype, layout.outer, byte_alignment=1024, swizzle=layout.inner
            )
            mma = self.tile.mma
            stmatrix = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype)
            copy = cute.make_tiled_copy_C(stmatrix, mma)
            cute.copy(copy, copy.retile(out.view), copy.get_slice(thread).partition_D(shared))
            cute.arch.sync_threads()
            self.store(shared, mdQ, tile.m_block, tile.head, sequence, thread)

    @cute.jit
    def store(
        self,
        shared: cute.Tensor,
        mdQ: cute.Tensor,
        m_block: Int32,
        head: Int32,
        sequence: Sequence,
        thread: Int32,
    ):
        tile_m, vectors = self.cfg.tile_m, self.cfg.head_dim // 8
        columns = mdQ.shape[3]
        for i in cutlass.range_constexpr(tile_m * vectors // self.cfg.threads):
            index = i * self.cfg.threads + thread
            row, vector = index // vectors, index % vectors
            place = m_block * tile_m + row
            if place < sequence.length and vector * 8 < columns:
                values = cute.make_rmem_tensor((8,), self.dtype)
                cute.autovec_copy(cute.local_tile(shared, (1, 8), (row, vector))[0, None], values)
                target = mdQ[sequence.batch, sequence.offset + place, head, None]
                cute.autovec_copy(values, cute.local_tile(target, (8,), (vector,)))
