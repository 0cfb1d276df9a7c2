"""D[m, n] = sum_k A[m, k] B[n, k] as on sm_80: cp.async in stages, ldmatrix, mma.sync.

Whole tiles only.  Four warps share a 64 x 64 tile; each iteration commits a group, an empty one at
the end, so that wait_group counts the same everywhere.
"""

import cuda.bindings.driver as cuda
import cutlass
from common import export, matrix
from cutlass import BFloat16, Float32, cute
from cutlass.cute.nvgpu import cpasync, warp
from cutlass.memory import SmemAllocator

M, N, K = 64, 64, 32
STAGES = 3


class Ampere:
    @cute.jit
    def __call__(self, mA: cute.Tensor, mB: cute.Tensor, mD: cute.Tensor, stream: cuda.CUstream):
        atom = cute.make_composed_layout(
            cute.make_swizzle(2, 3, 3), 0, cute.make_layout((8, K), stride=(K, 1))
        )
        layout = cute.tile_to_shape(atom, (M, K, STAGES), order=(0, 1, 2))
        op = warp.MmaF16BF16Op(BFloat16, Float32, (16, 8, 16))
        mma = cute.make_tiled_mma(op, (4, 1, 1), permutation_mnk=(64, 16, 16))
        grid = [mD.shape[0] // M, mD.shape[1] // N, 1]
        self.kernel(mma, mA, mB, mD, layout).launch(grid=grid, block=[128, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, mma: cute.TiledMma, mA, mB, mD, layout: cute.ComposedLayout):
        allocator = SmemAllocator()
        sA = allocator.allocate_tensor(BFloat16, layout, 128)
        sB = allocator.allocate_tensor(BFloat16, layout, 128)
        thread = cute.arch.thread_idx()[0]
        m_block, n_block, _ = cute.arch.block_idx()
        gA = cute.local_tile(mA, (M, K), (m_block, None))
        gB = cute.local_tile(mB, (N, K), (n_block, None))
        k_tiles = cute.size(gA, mode=[2])

        copy = cute.make_copy_atom(
            cpasync.CopyG2SOp(cpasync.LoadCacheMode.GLOBAL), BFloat16, num_bits_per_copy=128
        )
        threads = cute.make_ordered_layout((32, 4), order=(1, 0))
        copies = cute.make_tiled_copy_tv(copy, threads, cute.make_layout((1, 8))).get_slice(thread)
        sources = copies.partition_S(gA), copies.partition_S(gB)
        targets = copies.partition_D(sA), copies.partition_D(sB)

        for stage in cutlass.range_constexpr(STAGES - 1):
            if stage < k_tiles:
                for i in cutlass.range_constexpr(2):
                    source = sources[i][None, None, None, stage]
                    cute.copy(copy, source, targets[i][None, None, None, stage])
            cute.arch.cp_async_commit_group()

        mine = mma.get_slice(thread)
        rA = mma.make_fragment_A(mine.partition_A(sA[None, None, 0]))
        rB = mma.make_fragment_B(mine.partition_B(sB[None, None, 0]))
        acc = cute.make_rmem_tensor(mma.partition_shape_C((M, N)), Float32)
        acc.fill(0.0)
        matrices = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), BFloat16)
        load_a = cute.make_tiled_copy_A(matrices, mma).get_slice(thread)
        load_b = cute.make_tiled_copy_B(matrices, mma).get_slice(thread)
        for k in cutlass.range(k_tiles, unroll=1):
            cute.arch.cp_async_wait_group(STAGES - 2)
            cute.arch.sync_threads()
            following = k + STAGES - 1
            if following < k_tiles:
                for i in cutlass.range_constexpr(2):
                    source = sources[i][None, None, None, following]
                    cute.copy(copy, source, targets[i][None, None, None, following % STAGES])
            cute.arch.cp_async_commit_group()
            stage = k % STAGES
            cute.copy(matrices, load_a.partition_S(sA)[None, None, None, stage], load_a.retile(rA))
            cute.copy(matrices, load_b.partition_S(sB)[None, None, None, stage], load_b.retile(rB))
            cute.gemm(mma, acc, rA, rB, acc)
        cute.arch.cp_async_wait_group(0)
        cute.autovec_copy(acc, mine.partition_C(cute.local_tile(mD, (M, N), (m_block, n_block))))


export(Ampere(), "ampere", matrix(BFloat16), matrix(BFloat16), matrix(Float32))
