"""y = 2 x + 1 of an fp16 matrix: TMA into shared memory, arithmetic there, TMA out.

One tile of 32 x 32 elements a block with a 64-byte swizzle, one warp.  The tile is changed with
ordinary loads and stores, so a proxy fence must come before the store by TMA.
"""

import cuda.bindings.driver as cuda
import cutlass
from common import export, matrix
from cutlass import cute
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.memory import SmemAllocator

TILE = (32, 32)


class Scale:
    @cute.jit
    def __call__(self, mX: cute.Tensor, mY: cute.Tensor, stream: cuda.CUstream):
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW64, cutlass.Float16)
        layout = cute.tile_to_shape(atom, TILE, order=(0, 1))
        load = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), mX, layout, TILE)
        store = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), mY, layout, TILE)
        grid = [cute.ceil_div(mX.shape[i], TILE[i]) for i in (0, 1)]
        self.kernel(load, store, layout).launch(grid=grid, block=[32, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, load: cpasync.TmaInfo, store: cpasync.TmaInfo, layout: cute.ComposedLayout):
        @cute.struct
        class Storage:
            full: cute.struct.MemRange[cutlass.Int64, 1]
            tile: cute.struct.Align[
                cute.struct.MemRange[cutlass.Float16, cute.cosize(layout)], 1024
            ]

        storage = SmemAllocator().allocate(Storage)
        sX = storage.tile.get_tensor(layout.outer, swizzle=layout.inner)
        full = storage.full.data_ptr()
        block = cute.arch.block_idx()[:2]
        whole = cute.make_layout(1)

        def partition(info):
            gX = cute.local_tile(info.tma_tensor, TILE, block)
            groups = cute.group_modes(sX, 0, 2), cute.group_modes(gX, 0, 2)
            return cpasync.tma_partition(info.atom, 0, whole, *groups)

        with cute.arch.elect_one():
            cute.arch.mbarrier_init(full, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(
                full, cute.size_in_bytes(cutlass.Float16, layout)
            )
        shared, source = partition(load)
        cute.copy(load.atom, source, shared, tma_bar_ptr=full)
        cute.arch.mbarrier_wait(full, 0)
        row = cute.arch.lane_idx()
        for column in cutlass.range_constexpr(TILE[1]):
            value = sX[row, column].to(cutlass.Float32)
            sX[row, column] = (value * 2.0 + 1.0).to(cutlass.Float16)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_threads()
        shared, target = partition(store)
        with cute.arch.elect_one():
            cute.copy(store.atom, shared, target)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)


export(Scale(), "scale", matrix(cutlass.Float16), matrix(cutlass.Float16))
