"""Forward attention on sm_90a: O = softmax(softmax_scale * Q K^T) V and its log-sum-exp.

FlashAttention-3's structure (arXiv 2407.08608); a block takes `tile_m` query rows of one head.

Layouts    Q, O (batch, seqlen_q, heads, d); K, V (batch, seqlen_k, heads_kv, d); bf16 or fp16, last
           dimension contiguous, other strides any multiple of 16 bytes.  LSE (batch, heads,
           seqlen_q) float32, natural log.  Query head h reads key head h // (heads / heads_kv).

Roles      warpgroup 0     producer; its first warp issues every load, the others idle
           warpgroup 1..W  consumers, 64 query rows each; registers by `setmaxnreg` (config.py)

Pipelines  name  stages  full                   empty
           Q     1       1 arrival + bytes      never: one tile a block
           K, V  2 each  1 arrival + bytes      4 W arrivals, one a consumer warp

Timeline   of consumer w, key blocks j from the last to the first ("token": named barrier TURN + w)

             wait K, issue S(last) = Q K | wait S | mask, softmax, P = convert
             for j:  token | issue S = Q K(j) | issue O += P V(j+1) | pass token
                     wait S, release K(j) | mask, softmax | wait O, release V(j+1) | P, rescale O
             issue O += P V(0) | 1 / row_sum, LSE | wait O | convert, store

           The token orders the consumers' issue: one's softmax runs under the others' GEMMs.
           Within a consumer, softmax of block j runs under O += P V(j+1).

Store      each warp writes its 16 rows of O where its 16 rows of Q were (only its own WGMMAs read
           them, and it has waited for those) and stores them by TMA: no barrier.

Shared memory: barriers, Q (O), `stages` K, `stages` V; `ForwardConfig.shared_memory_bytes`.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Optional

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.cute.runtime import make_fake_tensor
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum
from hopper_attention.cute_kernels.arithmetic import minimum
from hopper_attention.cute_kernels.block_range import BlockRange
from hopper_attention.cute_kernels.fragments import (
    PackedFragment,
    as_a_operand,
    finish_before,
    pin,
    rows_and_columns,
)
from hopper_attention.cute_kernels.mask import Mask
from hopper_attention.cute_kernels.softmax import LOG2_E, OnlineSoftmax, scale_rows
from hopper_attention.cute_kernels.tile_scheduler import Tile, TileScheduler
from hopper_attention.hopper import wgmma
from hopper_attention.hopper.config import ForwardConfig

DTYPES = {"bf16": cutlass.BFloat16, "fp16": cutlass.Float16}

STORE_TILE = (16, 64)
"""Rows of one warp, columns of one 128-byte swizzle span."""


class Barrier(IntEnum):
    """Named barriers of a block; 0 is __syncthreads."""

    TURN = 1
    """TURN + w: consumer w may issue its GEMMs."""


@dataclass(frozen=True)
class Problem:
    """What all roles know of the launch."""

    seqlen_q: Int32
    seqlen_k: Int32
    qhead_per_kvhead: Int32
    scale_log2: Float32


@dataclass(frozen=True)
class Tma:
    """Descriptors with their atoms: loads of Q, K, V, the store of O."""

    q: cpasync.TmaInfo
    k: cpasync.TmaInfo
    v: cpasync.TmaInfo
    o: cpasync.TmaInfo


@dataclass(frozen=True)
class Mmas:
    """S = Q K^T from shared memory; O = P V with P from registers."""

    qk: cute.TiledMma
    pv: cute.TiledMma


@dataclass(frozen=True)
class Work:
    """One tile: its place, and the key blocks it attends to."""

    tile: Tile
    blocks: BlockRange


@dataclass(frozen=True)
class Tiles:
    """Shared memory: Q, later O, (tile_m, d); K (tile_n, d, stages); V (d, tile_n, stages)."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor


@dataclass(frozen=True)
class Pipelines:
    q: pipeline.PipelineTmaAsync
    k: pipeline.PipelineTmaAsync
    v: pipeline.PipelineTmaAsync


@dataclass(frozen=True)
class Fragments:
    """Of one consumer thread: descriptors of Q, K, V; registers of P, S, O."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    p: PackedFragment
    acc_s: cute.Tensor
    acc_o: cute.Tensor


class Forward:
    """The kernel of one `ForwardConfig`: `__call__` on the host, `kernel` and roles on a GPU."""

    def __init__(self, config: ForwardConfig):
        self.cfg = config
        self.dtype = DTYPES[config.dtype]

    def example_arguments(self) -> tuple:
        """What `__call__` is compiled for, without the stream."""
        n = 128 // self.dtype.width

        def operand():
            shape = (*(cute.sym_int32() for _ in range(3)), self.cfg.head_dim)
            stride = (*(cute.sym_int64(divisibility=n) for _ in range(3)), 1)
            return make_fake_tensor(self.dtype, shape, stride, assumed_align=16)

        lse_shape = tuple(cute.sym_int32() for _ in range(3))
        lse_stride = (cute.sym_int64(), cute.sym_int64(), 1)
        lse = make_fake_tensor(Float32, lse_shape, lse_stride, assumed_align=4)
        return operand(), operand(), operand(), operand(), lse, Float32(1.0)

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        softmax_scale: Float32,
        stream: cuda.CUstream,
    ):
        cfg = self.cfg
        batch, seqlen_q, heads, _ = mQ.shape
        _, seqlen_k, heads_kv, _ = mK.shape
        mQ, mK, mO = (permute(t, (1, 3, 2, 0)) for t in (mQ, mK, mO))  # (s, d, h, b)
        mV = permute(mV, (3, 1, 2, 0))  # (d, s, h, b): N and K of the second GEMM

        layout_q, layout_k, layout_v, layout_o = self.shared_layouts()
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        make = cpasync.make_tiled_tma_atom
        tma = Tma(
            make(load, mQ, layout_q, (cfg.tile_m, cfg.head_dim)),
            make(load, mK, layout_k, (cfg.tile_n, cfg.head_dim)),
            make(load, mV, layout_v, (cfg.head_dim, cfg.tile_n)),
            make(store, mO, layout_o, STORE_TILE),
        )
        key_bytes = 2 * cfg.head_dim * self.dtype.width // 8
        scheduler = TileScheduler.create(
            seqlen_q, seqlen_k, heads, heads_kv, batch, cfg.tile_m, key_bytes
        )
        problem = Problem(seqlen_q, seqlen_k, heads // heads_kv, softmax_scale * LOG2_E)
        self.kernel(tma, mLSE, problem, scheduler, self.tiled_mmas()).launch(
            grid=[scheduler.blocks, 1, 1], block=[cfg.threads, 1, 1], stream=stream
        )

    def tiled_mmas(self) -> Mmas:
        cfg, dtype, k, mn = self.cfg, self.dtype, OperandMajorMode.K, OperandMajorMode.MN
        make, warpgroups = sm90.make_trivial_tiled_mma, (self.cfg.warpgroups, 1, 1)
        registers = warpgroup.OperandSource.RMEM
        return Mmas(
            make(dtype, dtype, k, k, Float32, warpgroups, (64, cfg.tile_n)),
            make(dtype, dtype, k, mn, Float32, warpgroups, (64, cfg.head_dim), registers),
        )

    def shared_layouts(self) -> tuple:
        """Of Q; of K and V with their stages; of one TMA store of O."""
        cfg, row, column = self.cfg, LayoutEnum.ROW_MAJOR, LayoutEnum.COL_MAJOR
        qk = (cfg.tile_m, cfg.tile_n, cfg.head_dim)
        pv = (cfg.tile_m, cfg.head_dim, cfg.tile_n)
        q = cute.select(sm90.make_smem_layout_a(row, qk, self.dtype, 1), mode=[0, 1])
        k = sm90.make_smem_layout_b(row, qk, self.dtype, cfg.stages)
        v = sm90.make_smem_layout_b(column, pv, self.dtype, cfg.stages)
        swizzle = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.dtype)
        return q, k, v, cute.tile_to_shape(swizzle, STORE_TILE, order=(0, 1))

    @cute.kernel
    def kernel(
        self,
        tma: Tma,
        mLSE: cute.Tensor,
        problem: Problem,
        scheduler: TileScheduler,
        mmas: Mmas,
    ):
        cfg = self.cfg
        storage_type = self.shared_storage()
        assert storage_type.__sizeof__() == cfg.shared_memory_bytes, storage_type.__sizeof__()
        storage = SmemAllocator().allocate(storage_type)
        layout_q, layout_k, layout_v, _ = self.shared_layouts()
        tiles = Tiles(
            storage.q.get_tensor(layout_q.outer, swizzle=layout_q.inner),
            storage.k.get_tensor(layout_k.outer, swizzle=layout_k.inner),
            storage.v.get_tensor(layout_v.outer, swizzle=layout_v.inner),
        )
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_index == 0:
            for info in (tma.q, tma.k, tma.v, tma.o):
                cpasync.prefetch_descriptor(info.atom)
        pipelines = self.make_pipelines(storage)

        tile = scheduler.tile(cute.arch.block_idx()[0])
        blocks = BlockRange.of(
            tile.m_block, problem.seqlen_q, problem.seqlen_k, cfg.tile_m, cfg.tile_n, cfg.causal
        )
        work = Work(tile, blocks)
        if warp_index < 4:
            cute.arch.setmaxregister_decrease(cfg.registers.producer)
            if warp_index == 0 and blocks.count > 0:
                self.load(tma, tiles, pipelines, problem, work)
        else:
            cute.arch.setmaxregister_increase(cfg.registers.consumer)
            self.consume(mmas, tma.o, mLSE, tiles, pipelines, problem, work)

    def shared_storage(self):
        cfg = self.cfg
        layout_q, layout_k, layout_v, _ = self.shared_layouts()

        def buffer(layout):
            return cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layout)], 1024]

        @cute.struct
        class Storage:
            q_barriers: cute.struct.MemRange[cutlass.Int64, 2]
            k_barriers: cute.struct.MemRange[cutlass.Int64, 2 * cfg.stages]
            v_barriers: cute.struct.MemRange[cutlass.Int64, 2 * cfg.stages]
            q: buffer(layout_q)
            k: buffer(layout_k)
            v: buffer(layout_v)

        return Storage

    def make_pipelines(self, storage) -> Pipelines:
        cfg, row_bytes = self.cfg, self.cfg.head_dim * self.dtype.width // 8
        group, thread = pipeline.CooperativeGroup, pipeline.Agent.Thread

        def make(barriers, stages, rows, last=False):
            return pipeline.PipelineTmaAsync.create(
                num_stages=stages,
                producer_group=group(thread),
                consumer_group=group(thread, 4 * cfg.warpgroups),
                tx_count=rows * row_bytes,
                barrier_storage=barriers.data_ptr(),
                defer_sync=not last,  # the last one fences and synchronises for all
            )

        return Pipelines(
            make(storage.q_barriers, 1, cfg.tile_m),
            make(storage.k_barriers, cfg.stages, cfg.tile_n),
            make(storage.v_barriers, cfg.stages, cfg.tile_n, last=True),
        )

    @cute.jit
    def load(self, tma: Tma, tiles: Tiles, pipelines: Pipelines, problem: Problem, work: Work):
        """Producer warp: K(last), Q, then K(j), V(j + 1) downwards, then V(0)."""
        cfg, tile = self.cfg, work.tile
        head_kv = tile.head // problem.qhead_per_kvhead
        mQ = tma.q.tma_tensor[None, None, tile.head, tile.batch]
        mK = tma.k.tma_tensor[None, None, head_kv, tile.batch]
        mV = tma.v.tma_tensor[None, None, head_kv, tile.batch]
        gQ = cute.local_tile(mQ, (cfg.tile_m, cfg.head_dim), (tile.m_block, 0))
        gK = cute.local_tile(mK, (cfg.tile_n, cfg.head_dim), (None, 0))
        gV = cute.local_tile(mV, (cfg.head_dim, cfg.tile_n), (0, None))
        sQ, gQ = partition(tma.q, tiles.q, gQ)
        sK, gK = partition(tma.k, tiles.k, gK)
        sV, gV = partition(tma.v, tiles.v, gV)
        q, k, v = pipelines.q, pipelines.k, pipelines.v
        q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1)
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, cfg.stages)
        v_state = k_state.clone()

        last = work.blocks.count - 1
        load_stage(k, k_state, tma.k.atom, gK[None, last], sK)
        k_state.advance()
        q.producer_acquire(q_state)
        cute.copy(tma.q.atom, gQ, sQ, tma_bar_ptr=q.producer_get_barrier(q_state))
        for i in cutlass.range(last, unroll=1):
            load_stage(k, k_state, tma.k.atom, gK[None, last - 1 - i], sK)
            k_state.advance()
            load_stage(v, v_state, tma.v.atom, gV[None, last - i], sV)
            v_state.advance()
        load_stage(v, v_state, tma.v.atom, gV[None, 0], sV)
        v_state.advance()
        # A block must not exit while its consumers may still arrive on the empty barriers.
        k.producer_tail(k_state)
        v.producer_tail(v_state)

    @cute.jit
    def consume(
        self,
        mmas: Mmas,
        tma_o: cpasync.TmaInfo,
        mLSE: cute.Tensor,
        tiles: Tiles,
        pipelines: Pipelines,
        problem: Problem,
        work: Work,
    ):
        """Consumer warpgroup: 64 rows of S, softmax and O."""
        cfg = self.cfg
        thread = cute.arch.thread_idx()[0] - 128
        # Descriptors from the warpgroup's first thread: warp-uniform, so in uniform registers.
        first = consumer_warpgroup() * 128
        uniform_qk, uniform_pv = mmas.qk.get_slice(first), mmas.pv.get_slice(first)
        shape_s = mmas.qk.partition_shape_C((cfg.tile_m, cfg.tile_n))
        shape_o = mmas.pv.partition_shape_C((cfg.tile_m, cfg.head_dim))
        acc_s = cute.make_rmem_tensor(shape_s, Float32)
        fragments = Fragments(
            q=mmas.qk.make_fragment_A(uniform_qk.partition_A(tiles.q)),
            k=mmas.qk.make_fragment_B(uniform_qk.partition_B(tiles.k)),
            v=mmas.pv.make_fragment_B(uniform_pv.partition_B(tiles.v)),
            p=PackedFragment.like(acc_s, self.dtype),
            acc_s=acc_s,
            acc_o=cute.make_rmem_tensor(shape_o, Float32),
        )
        identity = cute.make_identity_tensor((cfg.tile_m, cfg.tile_n))
        mask = Mask(
            coordinates=rows_and_columns(mmas.qk.get_slice(thread).partition_C(identity)),
            first_row=work.tile.m_block * cfg.tile_m,
            seqlen_q=problem.seqlen_q,
            seqlen_k=problem.seqlen_k,
            causal=cfg.causal,
            tile_n=cfg.tile_n,
        )
        softmax = OnlineSoftmax.create(2, problem.scale_log2)
        fragments.acc_o.fill(0.0)
        if work.blocks.count > 0:
            self.attend(mmas, fragments, pipelines, softmax, mask, work.blocks)
        self.store_lse(softmax.lse, mLSE, mask, work.tile)
        self.store_output(fragments.acc_o, mmas.pv, tiles.q, tma_o, work.tile)

    @cute.jit
    def attend(
        self,
        mmas: Mmas,
        fragments: Fragments,
        pipelines: Pipelines,
        softmax: OnlineSoftmax,
        mask: Mask,
        blocks: BlockRange,
    ):
        """All key blocks, last to first; leaves the normalised O in acc_o, the LSE in softmax."""
        acc_s, acc_o = fragments.acc_s, fragments.acc_o
        scores = rows_and_columns(acc_s)
        q_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.cfg.stages)
        v_state = k_state.clone()  # one block behind: V uses the stage that K used before
        turns = Turns(consumer_warpgroup(), self.cfg.warpgroups)
        turns.start()

        last = blocks.count - 1
        pipelines.q.consumer_wait(q_state)
        pipelines.k.consumer_wait(k_state)
        k_block = fragments.k[None, None, None, k_state.index]
        wgmma.issue(mmas.qk, acc_s, fragments.q, k_block, accumulate=False)
        warpgroup.wait_group(0)
        pin(acc_s)
        pipelines.k.consumer_release(k_state)
        k_state.advance()
        mask.apply(scores, last)
        softmax.step(scores, first=True, masked=True)
        fragments.p.convert(acc_s)

        step = partial(self.step, mmas, fragments, pipelines, softmax, turns)
        unmasked = minimum(blocks.unmasked, last)
        if const_expr(self.cfg.causal):
            for i in cutlass.range(last - unmasked, unroll=1):
                k_state, v_state = step(k_state, v_state, mask, last - 1 - i)
        for _ in cutlass.range(unmasked, unroll=1):
            k_state, v_state = step(k_state, v_state, None, None)

        pipelines.v.consumer_wait(v_state)
        v_block = fragments.v[None, None, None, v_state.index]
        wgmma.issue(mmas.pv, acc_o, as_a_operand(fragments.p.view), v_block, accumulate=True)
        inverse = softmax.finish()
        warpgroup.wait_group(0)
        pin(acc_o)
        pipelines.v.consumer_release(v_state)
        scale_rows(rows_and_columns(acc_o), inverse)

    @cute.jit
    def step(
        self,
        mmas: Mmas,
        fragments: Fragments,
        pipelines: Pipelines,
        softmax: OnlineSoftmax,
        turns: "Turns",
        k_state: pipeline.PipelineState,
        v_state: pipeline.PipelineState,
        mask: Optional[Mask],
        n_block: Optional[Int32],
    ):
        """S and softmax of one key block beside O += P V of the block before; states advanced."""
        acc_s, acc_o = fragments.acc_s, fragments.acc_o
        k_block = fragments.k[None, None, None, k_state.index]
        v_block = fragments.v[None, None, None, v_state.index]
        pipelines.k.consumer_wait(k_state)
        turns.wait()
        wgmma.issue(mmas.qk, acc_s, fragments.q, k_block, accumulate=False)
        pipelines.v.consumer_wait(v_state)
        wgmma.issue(mmas.pv, acc_o, as_a_operand(fragments.p.view), v_block, accumulate=True)
        turns.give()
        warpgroup.wait_group(1)
        pin(acc_s)
        pipelines.k.consumer_release(k_state)
        scores = rows_and_columns(acc_s)
        if const_expr(mask is not None):
            mask.apply(scores, n_block)
        rescale = softmax.step(scores, first=False, masked=mask is not None)
        finish_before(softmax.row_sum)
        warpgroup.wait_group(0)
        pin(acc_o)
        pipelines.v.consumer_release(v_state)
        fragments.p.convert(acc_s)
        scale_rows(rows_and_columns(acc_o), rescale)
        following = k_state.clone()
        following.advance()
        return following, k_state

    @cute.jit
    def store_lse(self, lse: cute.Tensor, mLSE: cute.Tensor, mask: Mask, tile: Tile):
        gLSE = mLSE[tile.batch, tile.head, None]
        for i in cutlass.range_constexpr(cute.size(lse)):
            row, column = mask.coordinates[i, 0]
            if column == 0 and mask.first_row + row < mask.seqlen_q:
                gLSE[mask.first_row + row] = lse[i]

    @cute.jit
    def store_output(
        self,
        acc_o: cute.Tensor,
        mma_pv: cute.TiledMma,
        sO: cute.Tensor,
        tma_o: cpasync.TmaInfo,
        tile: Tile,
    ):
        """Each warp: 16 rows through shared memory, then one TMA store for every 64 columns."""
        cfg = self.cfg
        thread = cute.arch.thread_idx()[0] - 128
        out = PackedFragment.like(acc_o, self.dtype)
        out.convert(acc_o)
        stmatrix = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype)
        copy = cute.make_tiled_copy_C(stmatrix, mma_pv)
        cute.copy(copy, copy.retile(out.view), copy.get_slice(thread).partition_D(sO))
        cute.arch.fence_proxy("async.shared", space="cta")  # by every writer, then the barrier
        cute.arch.sync_warp()

        rows = cute.arch.make_warp_uniform(cute.arch.warp_idx()) - 4
        mO = tma_o.tma_tensor[None, None, tile.head, tile.batch]
        g_rows = tile.m_block * (cfg.tile_m // STORE_TILE[0]) + rows
        sO, gO = partition(
            tma_o,
            cute.local_tile(sO, STORE_TILE, (rows, None)),
            cute.local_tile(mO, STORE_TILE, (g_rows, None)),
        )
        with cute.arch.elect_one():
            for j in cutlass.range_constexpr(cfg.head_dim // STORE_TILE[1]):
                cute.copy(tma_o.atom, sO[None, j], gO[None, j])
            cute.arch.cp_async_bulk_commit_group()
            # Shared memory must outlive the store's reads.
            cute.arch.cp_async_bulk_wait_group(0, read=True)


@dataclass(frozen=True)
class Turns:
    """Ping-pong: consumers issue their GEMMs in turn, 0, 1, ..., 0, ...

    Barrier TURN + w completes when consumer w waits for its turn and the one before has given it.
    """

    own: Int32
    """Index of this consumer warpgroup."""
    warpgroups: cutlass.Constexpr

    @cute.jit
    def start(self):
        if self.own == self.warpgroups - 1:
            self.give()

    @cute.jit
    def wait(self):
        cute.arch.barrier(barrier_id=Barrier.TURN + self.own, number_of_threads=256)

    @cute.jit
    def give(self):
        following = self.own + 1 if self.own < self.warpgroups - 1 else 0
        cute.arch.barrier_arrive(barrier_id=Barrier.TURN + following, number_of_threads=256)


def consumer_warpgroup() -> Int32:
    """Index of the calling consumer warpgroup, warp-uniform."""
    return cute.arch.make_warp_uniform(cute.arch.warp_idx()) // 4 - 1


def permute(tensor: cute.Tensor, modes: tuple[int, ...]) -> cute.Tensor:
    return cute.make_tensor(tensor.iterator, cute.select(tensor.layout, mode=list(modes)))


def partition(tma: cpasync.TmaInfo, s: cute.Tensor, g: cute.Tensor):
    """(shared, global) with the tile's two modes merged, as `cute.copy` takes them."""
    s, g = cute.group_modes(s, 0, 2), cute.group_modes(g, 0, 2)
    return cpasync.tma_partition(tma.atom, 0, cute.make_layout(1), s, g)


@cute.jit
def load_stage(pipe, state, atom, source, stages):
    """By a whole warp: wait until the stage is free, then fill it.  The caller advances."""
    pipe.producer_acquire(state)
    full = pipe.producer_get_barrier(state)
    cute.copy(atom, source, stages[None, state.index], tma_bar_ptr=full)
