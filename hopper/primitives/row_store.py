"""Storing an accumulator whose warps hold 16 rows each: every warp stores its own, no barrier."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync, warp, warpgroup
from hopper_attention.cute_kernels.primitives.fragments import PackedFragment, rows_and_columns
from hopper_attention.hopper.primitives.tma import partition


@dataclass(frozen=True)
class RowStore:
    """Stores of (rows, columns) tiles of 16 bits, in swizzle spans of the tile they overwrite."""

    dtype: Any
    rows: int
    columns: int
    span: int
    """Columns of one TMA store."""

    @property
    def tile(self) -> tuple[int, int]:
        """One TMA store."""
        return (16, self.span)

    def tma(self, tensor: cute.Tensor) -> cpasync.TmaInfo:
        """For `tensor` (rows, columns, head, batch) in global memory."""
        layout = cute.tile_to_shape(swizzle_atom(self.dtype, self.span), self.tile, (0, 1))
        op = cpasync.CopyBulkTensorTileS2GOp()
        return cpasync.make_tiled_tma_atom(op, tensor, layout, self.tile)

    @cute.jit
    def store(
        self,
        acc: cute.Tensor,
        mma: cute.TiledMma,
        shared: cute.Tensor,
        tma: cpasync.TmaInfo,
        target: cute.Tensor,
        place: tuple,
        thread: Int32,
        exact: cutlass.Constexpr,
    ):
        """acc to `target` (rows, columns, head, batch) through `shared`.

        `place`: (block of rows, head, sequence).  `exact`: rows behind the sequence are somebody
        else's, so a warp whose rows end with it stores from registers.
        """
        block, head, sequence = place
        out = PackedFragment.like(acc, self.dtype)
        out.convert(acc)
        of_warp = cute.arch.make_warp_uniform(thread // 32)
        end = block * self.rows + 16 * of_warp + 16
        if cutlass.const_expr(exact):
            if end <= sequence.length:
                self.store_by_tma(out, mma, shared, tma, place, thread, of_warp)
            else:
                self.store_elements(out, mma, target, place, thread)
        else:
            self.store_by_tma(out, mma, shared, tma, place, thread, of_warp)

    @cute.jit
    def store_by_tma(
        self,
        out: PackedFragment,
        mma: cute.TiledMma,
        shared: cute.Tensor,
        tma: cpasync.TmaInfo,
        place: tuple,
        thread: Int32,
        of_warp: Int32,
    ):
        block, head, sequence = place
        stmatrix = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype)
        copy = cute.make_tiled_copy_C(stmatrix, mma)
        cute.copy(copy, copy.retile(out.view), copy.get_slice(thread).partition_D(shared))
        cute.arch.fence_proxy("async.shared", space="cta")  # by every writer, then the barrier
        cute.arch.sync_warp()

        target = cute.domain_offset(
            (sequence.offset, 0), tma.tma_tensor[None, None, head, sequence.batch]
        )
        row = block * (self.rows // 16) + of_warp
        s, g = partition(
            tma,
            cute.local_tile(shared, self.tile, (of_warp, None)),
            cute.local_tile(target, self.tile, (row, None)),
        )
        with cute.arch.elect_one():
            for j in cutlass.range_constexpr(self.columns // self.span):
                cute.copy(tma.atom, s[None, j], g[None, j])
            cute.arch.cp_async_bulk_commit_group()
            # Shared memory may be given up only when the store has read it.
            cute.arch.cp_async_bulk_wait_group(0, read=True)
        cute.arch.sync_warp()

    @cute.jit
    def store_elements(
        self,
        out: PackedFragment,
        mma: cute.TiledMma,
        target: cute.Tensor,
        place: tuple,
        thread: Int32,
    ):
        """Pairs of columns from registers, as far as rows and columns exist."""
        block, head, sequence = place
        identity = cute.make_identity_tensor((self.rows, self.columns))
        coordinates = rows_and_columns(mma.get_slice(thread).partition_C(identity))
        pairs = out.rows_and_pairs
        columns = target.shape[1]
        for i in cutlass.range_constexpr(cute.size(pairs, mode=[0])):
            row = block * self.rows + coordinates[i, 0][0]
            if row < sequence.length:
                line = target[sequence.offset + row, None, head, sequence.batch]
                for j in cutlass.range_constexpr(cute.size(pairs, mode=[1])):
                    column = coordinates[i, 2 * j][1]
                    if column < columns:
                        start = cute.recast_ptr((line.iterator + column).align(4), dtype=Int32)
                        cute.make_tensor(start, cute.make_layout(1))[0] = pairs[i, j]


def swizzle_atom(dtype, span: int):
    """Layout atom of 8 rows by `span` columns of 16 bits, columns contiguous."""
    kinds = warpgroup.SmemLayoutAtomKind
    kind = {64: kinds.K_SW128, 32: kinds.K_SW64, 16: kinds.K_SW32}[span]
    return warpgroup.make_smem_layout_atom(kind, dtype)


def widest_span(columns: int) -> int:
    """Columns of the widest swizzle that divides `columns`."""
    return next(span for span in (64, 32, 16) if columns % span == 0)
