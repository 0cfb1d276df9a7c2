"""y[block] = x: two blocks of a cluster load half of x each and multicast it to both."""

import cuda.bindings.driver as cuda
import cutlass
from common import export, matrix
from cutlass import cute
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

TILE = (16, 64)


class Multicast:
    @cute.jit
    def __call__(self, mX: cute.Tensor, mY: cute.Tensor, stream: cuda.CUstream):
        layout = cute.make_ordered_layout(TILE, order=(1, 0))
        op = cpasync.CopyBulkTensorTileG2SMulticastOp()
        load = cpasync.make_tiled_tma_atom(op, mX, layout, TILE, num_multicast=2)
        self.kernel(load, layout, mY).launch(
            grid=[2, 1, 1], block=[32, 1, 1], cluster=[2, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, load: cpasync.TmaInfo, layout: cute.Layout, mY: cute.Tensor):
        @cute.struct
        class Storage:
            full: cute.struct.MemRange[cutlass.Int64, 1]
            tile: cute.struct.Align[
                cute.struct.MemRange[cutlass.Float32, cute.cosize(layout)], 1024
            ]

        storage = SmemAllocator().allocate(Storage)
        sX = storage.tile.get_tensor(layout)
        full = storage.full.data_ptr()
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        with cute.arch.elect_one():
            cute.arch.mbarrier_init(full, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.cluster_arrive_relaxed()
        cute.arch.cluster_wait()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(
                full, cute.size_in_bytes(cutlass.Float32, layout)
            )
        gX = cute.local_tile(load.tma_tensor, TILE, (0, 0))
        groups = cute.group_modes(sX, 0, 2), cute.group_modes(gX, 0, 2)
        shared, source = cpasync.tma_partition(load.atom, rank, cute.make_layout(2), *groups)
        cute.copy(load.atom, source, shared, tma_bar_ptr=full, mcast_mask=cutlass.Int16(3))
        cute.arch.mbarrier_wait(full, 0)
        lane = cute.arch.lane_idx()
        for row in cutlass.range_constexpr(TILE[0]):
            for half in cutlass.range_constexpr(2):
                mY[rank * TILE[0] + row, half * 32 + lane] = sX[row, half * 32 + lane]
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()


export(Multicast(), "multicast", matrix(cutlass.Float32), matrix(cutlass.Float32))
