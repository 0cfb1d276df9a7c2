"""D[m, n] = sum_k A[m, k] B[n, k]: one TMA producer warp, one consumer warpgroup, two stages.

Instances: f16, bf16, e4m3, e5m2 with both operands K-major; bf16 with A or B MN-major, and with A
in registers.  D is f32, written with ordinary stores and bounds checks.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.pipeline as pipe
import cutlass.utils.hopper_helpers as sm90
from common import export, matrix, pin
from cutlass import cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum


@dataclass(frozen=True)
class Config:
    dtype: type
    b_mn_major: bool = False
    a_mn_major: bool = False
    a_in_registers: bool = False
    stages: int = 2

    @property
    def tile(self):
        return 64, 64, 1024 // self.dtype.width


class Gemm:
    def __init__(self, config: Config):
        self.config = config

    @cute.jit
    def __call__(self, mA: cute.Tensor, mB: cute.Tensor, mD: cute.Tensor, stream: cuda.CUstream):
        config, tile = self.config, self.config.tile
        a_mode, b_mode = (
            OperandMajorMode.MN if mn_major else OperandMajorMode.K
            for mn_major in (config.a_mn_major, config.b_mn_major)
        )
        a_layout, b_layout = (
            LayoutEnum.COL_MAJOR if mode == OperandMajorMode.MN else LayoutEnum.ROW_MAJOR
            for mode in (a_mode, b_mode)
        )
        places = warpgroup.OperandSource
        source = places.RMEM if config.a_in_registers else places.SMEM
        mma = sm90.make_trivial_tiled_mma(
            config.dtype, config.dtype, a_mode, b_mode, cutlass.Float32, (1, 1, 1), (64, tile[1]),
            source,
        )  # fmt: skip
        lA = sm90.make_smem_layout_a(a_layout, tile, config.dtype, config.stages)
        lB = sm90.make_smem_layout_b(b_layout, tile, config.dtype, config.stages)
        load = cpasync.CopyBulkTensorTileG2SOp()
        tma_a = cpasync.make_tiled_tma_atom(load, mA, cute.select(lA, mode=[0, 1]), tile[::2])
        tma_b = cpasync.make_tiled_tma_atom(load, mB, cute.select(lB, mode=[0, 1]), tile[1:])
        grid = [cute.ceil_div(mD.shape[i], tile[i]) for i in (0, 1)]
        kernel = self.kernel(mma, tma_a, tma_b, mD, lA, lB)
        kernel.launch(grid=grid, block=[160, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, mma: cute.TiledMma, tma_a, tma_b, mD: cute.Tensor, lA, lB):
        config, tile = self.config, self.config.tile

        @cute.struct
        class Storage:
            barriers: cute.struct.MemRange[cutlass.Int64, 2 * config.stages]
            a: cute.struct.Align[cute.struct.MemRange[config.dtype, cute.cosize(lA)], 1024]
            b: cute.struct.Align[cute.struct.MemRange[config.dtype, cute.cosize(lB)], 1024]

        storage = SmemAllocator().allocate(Storage)
        sA = storage.a.get_tensor(lA.outer, swizzle=lA.inner)
        sB = storage.b.get_tensor(lB.outer, swizzle=lB.inner)
        nbytes = (cute.cosize(lA) + cute.cosize(lB)) // config.stages * config.dtype.width // 8
        group = pipe.CooperativeGroup
        pipeline = pipe.PipelineTmaAsync.create(
            num_stages=config.stages, producer_group=group(pipe.Agent.Thread),
            consumer_group=group(pipe.Agent.Thread, 4), tx_count=nbytes,
            barrier_storage=storage.barriers.data_ptr(),
        )  # fmt: skip
        m_block, n_block, _ = cute.arch.block_idx()
        gA = cute.local_tile(tma_a.tma_tensor, tile[::2], (m_block, None))
        gB = cute.local_tile(tma_b.tma_tensor, tile[1:], (n_block, None))
        k_tiles = cute.size(gA, mode=[2])
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 4:
            self.load(pipeline, k_tiles, (tma_a, sA, gA), (tma_b, sB, gB))
        else:
            acc = self.consume(pipeline, k_tiles, mma, sA, sB)
            self.store(acc, mma, mD, m_block, n_block)

    @cute.jit
    def load(self, pipeline, k_tiles, *operands):
        state = pipe.make_pipeline_state(pipe.PipelineUserType.Producer, self.config.stages)
        for k in cutlass.range(k_tiles, unroll=1):
            pipeline.producer_acquire(state)
            for info, shared, source in operands:
                s, g = cpasync.tma_partition(
                    info.atom, 0, cute.make_layout(1), cute.group_modes(shared, 0, 2),
                    cute.group_modes(source, 0, 2),
                )  # fmt: skip
                barrier = pipeline.producer_get_barrier(state)
                cute.copy(info.atom, g[None, k], s[None, state.index], tma_bar_ptr=barrier)
            state.advance()
        pipeline.producer_tail(state)

    @cute.jit
    def consume(self, pipeline, k_tiles, mma, sA, sB):
        thread = mma.get_slice(cute.arch.thread_idx()[0])
        tA = thread.partition_A(sA)
        if cutlass.const_expr(self.config.a_in_registers):
            rA = mma.make_fragment_A(tA[None, None, None, 0])
        else:
            rA = mma.make_fragment_A(tA)
        rB = mma.make_fragment_B(thread.partition_B(sB))
        acc = cute.make_rmem_tensor(mma.partition_shape_C(self.config.tile[:2]), cutlass.Float32)
        state = pipe.make_pipeline_state(pipe.PipelineUserType.Consumer, self.config.stages)
        mma.set(warpgroup.Field.ACCUMULATE, False)
        for _ in cutlass.range(k_tiles, unroll=1):
            pipeline.consumer_wait(state)
            if cutlass.const_expr(self.config.a_in_registers):
                cute.autovec_copy(tA[None, None, None, state.index], rA)
            warpgroup.fence()
            for k in cutlass.range_constexpr(cute.size(rB, mode=[2])):
                at = (None, None, k, state.index)
                a_at = at[:3] if self.config.a_in_registers else at
                cute.gemm(mma, acc, rA[a_at], rB[at], acc)
                mma.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
            warpgroup.wait_group(0)
            pipeline.consumer_release(state)
            state.advance()
        pin(acc)
        return acc

    @cute.jit
    def store(self, acc, mma, mD, m_block, n_block):
        tile = self.config.tile[:2]
        thread = mma.get_slice(cute.arch.thread_idx()[0])
        gD = thread.partition_C(cute.local_tile(mD, tile, (m_block, n_block)))
        place = thread.partition_C(cute.make_identity_tensor(tile))
        for i in cutlass.range_constexpr(cute.size(acc)):
            row, column = place[i][0] + m_block * tile[0], place[i][1] + n_block * tile[1]
            if row < mD.shape[0] and column < mD.shape[1]:
                gD[i] = acc[i]


for name, config in {
    "gemm_bf16": Config(cutlass.BFloat16),
    "gemm_bf16_mn": Config(cutlass.BFloat16, b_mn_major=True),
    "gemm_bf16_amn": Config(cutlass.BFloat16, a_mn_major=True),
    "gemm_bf16_rs": Config(cutlass.BFloat16, a_in_registers=True),
    "gemm_f16": Config(cutlass.Float16),
    "gemm_e4m3": Config(cutlass.Float8E4M3FN),
    "gemm_e5m2": Config(cutlass.Float8E5M2),
}.items():
    majors = config.a_mn_major, config.b_mn_major
    operands = (matrix(config.dtype, 0 if mn_major else 1) for mn_major in majors)
    export(Gemm(config), name, *operands, matrix(cutlass.Float32))
