"""y = x by TMA, in and out of shared memory: every rank with plain layouts, every swizzle.

One block of one warp a tile of the first mode; the other modes are one tile, partly out of bounds.
"""

import cuda.bindings.driver as cuda
import cutlass
from common import export
from cutlass import cute
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.runtime import make_fake_tensor
from cutlass.memory import SmemAllocator

TILE = (2, 3, 2, 4, 32)
ATOMS = warpgroup.SmemLayoutAtomKind
SWIZZLES = {0: ATOMS.K_INTER, 32: ATOMS.K_SW32, 64: ATOMS.K_SW64, 128: ATOMS.K_SW128}


class Copy:
    def __init__(self, tile, swizzle=None):
        self.tile, self.swizzle = tile, swizzle

    @cute.jit
    def __call__(self, mX: cute.Tensor, mY: cute.Tensor, stream: cuda.CUstream):
        order = tuple(reversed(range(len(self.tile))))
        if cutlass.const_expr(self.swizzle is None):
            layout = cute.make_ordered_layout(self.tile, order=order)
        else:
            atom = warpgroup.make_smem_layout_atom(SWIZZLES[self.swizzle], cutlass.Float16)
            layout = cute.tile_to_shape(atom, self.tile, order=(0, 1))
        load = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), mX, layout, self.tile)
        store = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(), mY, layout, self.tile
        )
        grid = [cute.ceil_div(mX.shape[0], self.tile[0]), 1, 1]
        self.kernel(load, store, layout).launch(grid=grid, block=[32, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, load: cpasync.TmaInfo, store: cpasync.TmaInfo, layout):
        @cute.struct
        class Storage:
            full: cute.struct.MemRange[cutlass.Int64, 1]
            tile: cute.struct.Align[
                cute.struct.MemRange[cutlass.Float16, cute.cosize(layout)], 1024
            ]

        storage = SmemAllocator().allocate(Storage)
        if cutlass.const_expr(self.swizzle is None):
            sX = storage.tile.get_tensor(layout)
        else:
            sX = storage.tile.get_tensor(layout.outer, swizzle=layout.inner)
        full = storage.full.data_ptr()
        rank = len(self.tile)
        block = (cute.arch.block_idx()[0],) + (0,) * (rank - 1)

        def partition(info):
            gX = cute.local_tile(info.tma_tensor, self.tile, block)
            groups = cute.group_modes(sX, 0, rank), cute.group_modes(gX, 0, rank)
            return cpasync.tma_partition(info.atom, 0, cute.make_layout(1), *groups)

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
        shared, target = partition(store)
        with cute.arch.elect_one():
            cute.copy(store.atom, shared, target)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)


def tensor(rank: int):
    shape = [cute.sym_int32() for _ in range(rank - 1)] + [cute.sym_int32(divisibility=8)]
    stride = [cute.sym_int64(divisibility=8) for _ in range(rank - 1)] + [1]
    return make_fake_tensor(cutlass.Float16, tuple(shape), tuple(stride), assumed_align=16)


for rank in range(1, 6):
    tile = TILE[-rank:]
    export(Copy(tile), f"tma_rank{rank}", tensor(rank), tensor(rank))
for swizzle in SWIZZLES:
    tile = 32, max(swizzle, 64) // 2
    export(Copy(tile, swizzle), f"tma_swizzle{swizzle}", tensor(2), tensor(2))
