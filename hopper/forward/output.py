"""Storing forward's results: O through shared memory or from registers, and the LSE."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import cpasync, warp
from hopper_attention.cute_kernels.primitives.fragments import (
    PackedFragment,
    converted_pair,
    rows_and_columns,
)
from hopper_attention.hopper.forward.config import ForwardConfig
from hopper_attention.hopper.forward.roles import (
    Mmas,
    Problem,
    Work,
    consumer_thread,
    coordinates_of,
)
from hopper_attention.hopper.primitives.row_store import swizzle_atom, widest_span
from hopper_attention.hopper.primitives.tma import partition


@dataclass(frozen=True)
class Output:
    """O's place in shared memory and how each warp stores its 16 rows from there, or directly."""

    cfg: ForwardConfig
    dtype: Any
    others: tuple = (Float32,)

    @property
    def types(self) -> tuple:
        """Types of O in memory: the first by TMA, any from registers (`Problem.output_type`)."""
        return (self.dtype, *self.others)

    @property
    def span(self) -> int:
        """Columns of one swizzle span."""
        return widest_span(self.cfg.head_dim_v)

    @property
    def tile(self) -> tuple[int, int]:
        """One TMA store."""
        return (16, self.span)

    def layout(self):
        """(tile_m, dv, stages) in shared memory."""
        cfg = self.cfg
        o = cute.tile_to_shape(
            swizzle_atom(self.dtype, self.span), (cfg.tile_m, cfg.head_dim_v), (0, 1)
        )
        # Over Q its stages are as far apart as Q's, which may be wider.
        stages, width = (cfg.q_stages, cfg.head_dim) if cfg.output_over_q else (1, cfg.head_dim_v)
        shape, stride = (*o.outer.shape, stages), (*o.outer.stride, cfg.tile_m * width)
        return cute.make_composed_layout(o.inner, o.offset, cute.make_layout(shape, stride=stride))

    def tma(self, mO: cute.Tensor) -> cpasync.TmaInfo:
        """For O (seqlen_q, dv, heads, batch)."""
        layout = cute.tile_to_shape(swizzle_atom(self.dtype, self.span), self.tile, (0, 1))
        return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), mO, layout, self.tile)

    @cute.jit
    def store_lse(self, lse: cute.Tensor, mLSE: cute.Tensor, mmas: Mmas, work: Work):
        queries, rows = work.queries, work.rows
        coordinates = coordinates_of(mmas.qk, (self.cfg.tile_m, self.cfg.tile_n))
        for i in cutlass.range_constexpr(cute.size(lse)):
            row, column = coordinates[i, 0]
            position = rows.position(row)
            if column == 0 and position < queries.length:
                mLSE[queries.batch, rows.head(row), queries.offset + position] = lse[i]

    @cute.jit
    def store(
        self,
        acc_o: cute.Tensor,
        mma_pv: cute.TiledMma,
        sO: cute.Tensor,
        tma_o: cpasync.TmaInfo,
        mO: cute.Tensor,
        problem: Problem,
        work: Work,
    ):
        """Each warp its 16 rows: through shared memory by TMA, or, where it cannot, directly.

        It cannot where not all rows exist, where they are of several heads, and for other types.
        """
        cfg = self.cfg
        rows = cute.arch.make_warp_uniform(cute.arch.warp_idx()) - 4
        whole = problem.output_type == 0
        if const_expr(cfg.varlen):
            end = work.rows.first_row + 16 * rows + 16
            whole = whole and end <= work.queries.length
        if const_expr(cfg.packs_heads):
            whole = whole and problem.group == 1
        if whole:
            out = PackedFragment.like(acc_o, self.dtype)
            out.convert(acc_o)
            self.store_rows(out, mma_pv, sO, tma_o, work, rows)
        for number in cutlass.range_constexpr(0 if cfg.varlen else 1, len(self.types)):
            if problem.output_type == number and not whole:
                self.store_elements(acc_o, mma_pv, mO, work, self.types[number])

    @cute.jit
    def store_rows(
        self,
        out: PackedFragment,
        mma_pv: cute.TiledMma,
        sO: cute.Tensor,
        tma_o: cpasync.TmaInfo,
        work: Work,
        rows: Int32,
    ):
        """The warp's 16 rows through shared memory, one TMA store a swizzle span."""
        cfg, tile = self.cfg, work.tile
        if const_expr(not cfg.output_over_q):  # else the one before was waited for to release Q
            self.finish()
        stmatrix = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype)
        copy = cute.make_tiled_copy_C(stmatrix, mma_pv)
        thread_copy = copy.get_slice(consumer_thread())
        cute.copy(copy, copy.retile(out.view), thread_copy.partition_D(sO))
        cute.arch.fence_proxy("async.shared", space="cta")  # by every writer, then the barrier
        cute.arch.sync_warp()

        mO = tma_o.tma_tensor[None, None, tile.head, work.queries.batch]
        mO = cute.domain_offset((work.queries.offset, 0), mO)
        g_rows = tile.m_block * (cfg.tile_m // self.tile[0]) + rows
        sO, gO = partition(
            tma_o,
            cute.local_tile(sO, self.tile, (rows, None)),
            cute.local_tile(mO, self.tile, (g_rows, None)),
        )
        with cute.arch.elect_one():
            for j in cutlass.range_constexpr(cfg.head_dim_v // self.tile[1]):
                cute.copy(tma_o.atom, sO[None, j], gO[None, j])
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def store_elements(
        self,
        acc_o: cute.Tensor,
        mma_pv: cute.TiledMma,
        mO: cute.Tensor,
        work: Work,
        dtype: cutlass.Constexpr,
    ):
        """Pairs of columns from registers, as far as rows and columns exist."""
        cfg, queries, rows = self.cfg, work.queries, work.rows
        coordinates = coordinates_of(mma_pv, (cfg.tile_m, cfg.head_dim_v))
        out = rows_and_columns(acc_o)
        columns = mO.shape[1] * self.dtype.width // dtype.width
        for i in cutlass.range_constexpr(cute.size(out, mode=[0])):
            position = rows.position(coordinates[i, 0][0])
            if position < queries.length:
                head = rows.head(coordinates[i, 0][0])
                gO = mO[queries.offset + position, None, head, queries.batch].iterator.toint()
                for j in cutlass.range_constexpr(0, cute.size(out, mode=[1]), 2):
                    column = coordinates[i, j][1]
                    if column < columns:
                        pair = converted_pair(out[i, j], out[i, j + 1], dtype)
                        address = gO + column * (dtype.width // 8)
                        target = cute.make_ptr(
                            pair.element_type,
                            address,
                            cute.AddressSpace.gmem,
                            assumed_align=2 * dtype.width // 8,
                        )
                        cute.autovec_copy(pair, cute.make_tensor(target, pair.layout))

    @cute.jit
    def finish(self):
        """Wait until this warp's store of O has read shared memory."""
        with cute.arch.elect_one():
            cute.arch.cp_async_bulk_wait_group(0, read=True)
        cute.arch.sync_warp()
