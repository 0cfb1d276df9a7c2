"""Backward attention on sm_90a: dK, dV and the sum that becomes dQ.

    P = exp(softmax_scale * Q K^T - LSE)     dP = dO V^T      delta = dLSE - rowsum(dO * O)
    dS = P * (dP + delta)                    dV = P^T dO      dK = softmax_scale * dS^T Q
    dQ = softmax_scale * dS K                (FlashAttention-2, arXiv 2307.08691, section 3.2)

A block takes `tile_n` keys of one key head, and for every query head of its group the blocks of
`tile_m` query rows that see them: dK and dV stay in registers over all of these, so that grouped
heads cost no workspace and no atomics.  dQ is summed over the key blocks in a float32 workspace
(cute_kernels/workspace.py, hopper/dq_tile.py); hopper/preprocess.py goes before, postprocess.py after.

Layouts    Q, dO (batch, seqlen_q, heads, d); K, V, dK, dV (batch, seqlen_k, heads_kv, d); 16 bits,
           last dimension contiguous, other strides any multiple of 16 bytes.
           S and dP are computed transposed, keys in rows: P^T and dS^T are then, in registers, A
           operands of dV and dK.  Only dS goes through shared memory, for dQ, which needs the keys
           of both warpgroups.

Roles      warp 0          issues every load              warp 1   adds dQ to global memory
           warpgroup 1, 2  consumers, 64 keys each, and half of dQ; registers: config.py

Pipelines  name    stages    full                         empty
           K, V    1         1 arrival + bytes            never
           Q       2         1 arrival + bytes, with LSE  8 arrivals: dK of the block is done
           dO      2         the same, with delta         8 arrivals: dV of the block is done
           dS      2         8 arrivals, one a warp       by itself: see below
           dQ w    1         barrier DQ_FULL + w          barrier DQ_EMPTY + w; 128 + 32 threads

           A warp writes dS(i) over dS(i - 2) when it has waited for dQ(i - 1), which was issued
           when all had written dS(i - 1), hence waited for dQ(i - 2).

Timeline   of a consumer and row block i ("|" where it waits):

             issue S(i) | dS(i-1) of all warps, issue dQ(i-1), dK(i-1)
             | S(i), P(i) = exp | dQ(i-1), store | dK(i-1), release Q(i-1), round P(i)
             issue dP(i), dV(i) | both, release dO(i) | dS(i), round, store

           The exponentials run under dQ and dK of the block before; where one consumer computes
           dS, the other has WGMMAs under way.  More at a time would be better and does not
           fit: ptxas keeps a fragment that WGMMA has touched alive as a whole, and if they
           exceed the registers it waits after every WGMMA (docs/tuning.md).

Turns      With a semaphore (one counter a block of dQ) key blocks add to dQ in ascending order, and
           the result has the same bits every time.  Blocks start in ascending order, so
           that whoever waits, waits for a block that has started.

Shared memory: barriers, LSE and delta, Q, dO, K (dK), V (dV), dS, dQ; `shared_memory_bytes`.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, Optional

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.cute.runtime import make_fake_tensor
from cutlass.memory import SmemAllocator
from hopper_attention.cute_kernels import workspace
from hopper_attention.cute_kernels.arithmetic import ceil_div, maximum, minimum
from hopper_attention.cute_kernels.fragments import (
    PackedFragment,
    as_a_operand,
    compute_before,
    pin,
    rows_and_columns,
)
from hopper_attention.cute_kernels.mask import Mask
from hopper_attention.cute_kernels.row_order import RowOrder
from hopper_attention.cute_kernels.semaphore import Semaphore
from hopper_attention.cute_kernels.sequence import EqualLengths, Lengths, Sequence
from hopper_attention.cute_kernels.softmax import LOG2_E, cap
from hopper_attention.cute_kernels.tile_scheduler import DenseScheduler, VarlenScheduler
from hopper_attention.cute_kernels.types import DTYPES, row_statistics, strided
from hopper_attention.cute_kernels.visibility import BlockRange, Visibility
from hopper_attention.hopper import wgmma
from hopper_attention.hopper.config import STAGES, BackwardConfig
from hopper_attention.hopper.dq_tile import DqTile
from hopper_attention.hopper.row_store import RowStore, swizzle_atom, widest_span
from hopper_attention.hopper.tails import clear_tail
from hopper_attention.hopper.tma import add_bulk, load_row, load_stage, partition, permute
from hopper_attention.hopper.turns import consumer_warpgroup, opaque


class Barrier(IntEnum):
    """Named barriers of a block; 0 is __syncthreads."""

    CONSUMERS = 1
    """All consumer threads."""
    DQ_EMPTY = 2
    """DQ_EMPTY + w: warpgroup w may write its part of dQ."""
    DQ_FULL = 4
    """DQ_FULL + w: it has written it."""


@dataclass(frozen=True)
class Problem:
    """What all roles know of the launch."""

    queries: Any
    """EqualLengths or Lengths, by `BackwardConfig.varlen`."""
    keys: Any
    qhead_per_kvhead: Int32
    scale: Float32
    """softmax_scale."""
    scale_log2: Float32
    """Of the scores that exp sees: after softcap if there is one."""
    softcap: Any
    """(inner, outer) of `softmax.cap`, or None."""
    window: Any
    """(left, right, chunk) of `Visibility`, or None where the mask is not local."""
    turns: Semaphore


@dataclass(frozen=True)
class Workspace:
    """As cute_kernels/workspace.py describes; dQ (entries, heads, row blocks, elements)."""

    lse: cute.Tensor
    delta: cute.Tensor
    dq: cute.Tensor


@dataclass(frozen=True)
class Gradients:
    """dK (seqlen_k, d, heads_kv, batch) and dV, and the descriptors of their stores."""

    dk: cute.Tensor
    dv: cute.Tensor
    tma_dk: cpasync.TmaInfo
    tma_dv: cpasync.TmaInfo


@dataclass(frozen=True)
class Tma:
    """Descriptors of the loads, with their atoms."""

    q: cpasync.TmaInfo
    do: cpasync.TmaInfo
    k: cpasync.TmaInfo
    v: cpasync.TmaInfo


@dataclass(frozen=True)
class Mmas:
    sdp: cute.TiledMma
    """S^T = K Q^T and dP^T = V dO^T, from shared memory."""
    dv: cute.TiledMma
    """dV = P^T dO with P^T from registers."""
    dk: cute.TiledMma
    dq: cute.TiledMma


@dataclass(frozen=True)
class Work:
    """One block: its keys, and the rows that see them."""

    n_block: Int32
    head_kv: Int32
    queries: Sequence
    keys: Sequence
    visibility: Visibility
    order: RowOrder
    workspace_row: Int32
    """Where the sequence's rows start in the workspace."""


@dataclass(frozen=True)
class Tiles:
    """Shared memory; Q, dO, dS, LSE and delta with stages."""

    q: cute.Tensor
    do: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    ds: cute.Tensor
    dq: cute.Pointer
    lse: cute.Tensor
    delta: cute.Tensor
    keys: cute.Tensor
    """Int32: where dK and dV go, kept here because the main loop has no registers to spare."""


@dataclass(frozen=True)
class Pipelines:
    q: pipeline.PipelineTmaAsync
    do: pipeline.PipelineTmaAsync
    k: pipeline.PipelineTmaAsync
    v: pipeline.PipelineTmaAsync
    ds: cute.Pointer
    """Barriers of the stages of dS: full."""


@dataclass(frozen=True)
class Fragments:
    """Of one consumer thread: descriptors of shared tiles; registers."""

    k: cute.Tensor
    v: cute.Tensor
    q: cute.Tensor
    do: cute.Tensor
    do_columns: cute.Tensor
    """dO as the B operand of dV: rows are the K mode."""
    q_columns: cute.Tensor
    k_columns: cute.Tensor
    ds: cute.Tensor
    p: PackedFragment
    packed_ds: PackedFragment
    acc_dk: cute.Tensor
    acc_dv: cute.Tensor


@dataclass(frozen=True)
class Thread:
    """Of one consumer thread: its places."""

    index: Int32
    """Among the consumers."""
    warpgroup: Int32
    coordinates: cute.Tensor
    """(rows, columns) -> (key, query) in the tile."""
    copy_ds: cute.TiledCopy
    ds: cute.Tensor
    """Where its part of dS^T goes, with stages."""


def stage_of(number: Int32) -> pipeline.PipelineState:
    """Where row block `number` is, in every pipeline of two stages, for its consumers."""
    return pipeline.PipelineState(STAGES, Int32(0), number & 1, number >> 1 & 1)


class Backward:
    """The kernel of one `BackwardConfig`: `__call__` on the host, `kernel` and roles on a GPU."""

    def __init__(self, config: BackwardConfig):
        self.cfg = config
        self.dtype = DTYPES[config.dtype]
        self.dq_tile = DqTile(self.dtype, config.tile_m, config.head_dim)
        # K is read by rows and, for dQ, by columns of one warpgroup's share.
        self.spans = {
            "q": widest_span(config.head_dim),
            "do": widest_span(config.head_dim_v),
            "k": widest_span(self.dq_tile.columns),
            "v": widest_span(config.head_dim_v),
        }
        rows = config.tile_n
        self.store_dk = RowStore(self.dtype, rows, config.head_dim, self.spans["k"])
        self.store_dv = RowStore(self.dtype, rows, config.head_dim_v, self.spans["v"])

    def example_arguments(self) -> tuple:
        """What `__call__` is compiled for, without the stream."""
        shape = tuple(cute.sym_int32() for _ in range(3)) + (2 * self.dq_tile.elements,)
        stride = (*(cute.sym_int64(divisibility=4) for _ in range(3)), 1)
        dq = make_fake_tensor(Float32, shape, stride, assumed_align=16)
        operands = tuple(strided(self.dtype, 4) for _ in range(4))
        gradients = (strided(self.dtype, 4), strided(self.dtype, 4))
        softcap = Float32(1.0) if self.cfg.softcap else None
        window = (Int32(1),) * 3 if self.cfg.mask == "local" else (None,) * 3
        lengths = (Int64(0),) * 4 + (Int32(1),) if self.cfg.varlen else (None,) * 5
        saved = (row_statistics(4), row_statistics(4), dq)
        return (*operands, *saved, *gradients, Float32(1.0), softcap, *window, *lengths, Int64(0))

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mdO: cute.Tensor,
        lse_workspace: cute.Tensor,
        delta_workspace: cute.Tensor,
        dq_workspace: cute.Tensor,
        mdK: cute.Tensor,
        mdV: cute.Tensor,
        softmax_scale: Float32,
        softcap: Optional[Float32],
        window_left: Optional[Int32],
        window_right: Optional[Int32],
        attention_chunk: Optional[Int32],
        cu_seqlens_q: Optional[Int64],
        cu_seqlens_k: Optional[Int64],
        seqused_q: Optional[Int64],
        seqused_k: Optional[Int64],
        num_sequences: Optional[Int32],
        dq_semaphore: Int64,
        stream: cuda.CUstream,
    ):
        cfg = self.cfg
        _, seqlen_q, heads, _ = mQ.shape
        entries, seqlen_k, heads_kv, _ = mK.shape
        group = heads // heads_kv
        mQ, mK, mV, mdO, mdK, mdV = (  # (s, d, h, b)
            permute(t, (1, 3, 2, 0)) for t in (mQ, mK, mV, mdO, mdK, mdV)
        )
        tma = Tma(
            self.load_tma(mQ, "q"), self.load_tma(mdO, "do"),
            self.load_tma(mK, "k"), self.load_tma(mV, "v"),
        )  # fmt: skip
        gradients = Gradients(mdK, mdV, self.store_dk.tma(mdK), self.store_dv.tma(mdV))
        if const_expr(cfg.varlen):
            queries = Lengths(cu_seqlens_q, seqused_q, seqlen_q)
            keys = Lengths(cu_seqlens_k, seqused_k, seqlen_k)
            rows = entries * seqlen_k
            scheduler = VarlenScheduler(keys, num_sequences, heads_kv, rows, cfg.tile_n)
        else:
            queries, keys = EqualLengths(seqlen_q), EqualLengths(seqlen_k)
            row_bytes = (cfg.head_dim + cfg.head_dim_v) * 2 + cfg.head_dim * 4
            scheduler = DenseScheduler.create(
                seqlen_k, seqlen_q * group, heads_kv, heads_kv, entries, cfg.tile_n, row_bytes
            )
        capped, scale = None, softmax_scale
        if const_expr(cfg.softcap):
            capped, scale = (2.0 * LOG2_E * softmax_scale / softcap, softcap), Float32(1.0)
        window = None
        if const_expr(cfg.mask == "local"):
            window = (window_left, window_right, attention_chunk)
        turns = Semaphore(dq_semaphore, heads, dq_workspace.shape[2])
        problem = Problem(
            queries, keys, group, softmax_scale, scale * LOG2_E, capped, window, turns
        )
        saved = Workspace(lse_workspace, delta_workspace, dq_workspace)
        self.kernel(tma, saved, gradients, problem, scheduler, self.tiled_mmas()).launch(
            grid=[scheduler.tiles, 1, 1], block=[cfg.threads, 1, 1], min_blocks_per_mp=1, stream=stream
        )

    def load_tma(self, tensor: cute.Tensor, name: str) -> cpasync.TmaInfo:
        layout = cute.select(self.shared_layouts()[name], mode=[0, 1])
        op, (rows, columns, _) = cpasync.CopyBulkTensorTileG2SOp(), self.tile_shapes()[name]
        return cpasync.make_tiled_tma_atom(op, tensor, layout, (rows, columns))

    def tiled_mmas(self) -> Mmas:
        cfg, dtype, k, mn = self.cfg, self.dtype, OperandMajorMode.K, OperandMajorMode.MN
        make, warpgroups = sm90.make_trivial_tiled_mma, (self.cfg.warpgroups, 1, 1)
        registers = warpgroup.OperandSource.RMEM
        return Mmas(
            make(dtype, dtype, k, k, Float32, warpgroups, (64, cfg.tile_m)),
            make(dtype, dtype, k, mn, Float32, warpgroups, (64, cfg.head_dim_v), registers),
            make(dtype, dtype, k, mn, Float32, warpgroups, (64, cfg.head_dim), registers),
            self.dq_tile.mma,
        )

    def tile_shapes(self) -> dict[str, tuple[int, int, int]]:
        """(rows, columns, stages) of the 16-bit tiles in shared memory."""
        cfg = self.cfg
        return {
            "q": (cfg.tile_m, cfg.head_dim, STAGES),
            "do": (cfg.tile_m, cfg.head_dim_v, STAGES),
            "k": (cfg.tile_n, cfg.head_dim, 1),
            "v": (cfg.tile_n, cfg.head_dim_v, 1),
            "ds": (cfg.tile_m, cfg.tile_n, STAGES),
        }

    def shared_layouts(self) -> dict[str, Any]:
        """Swizzled layouts, rows of columns that are contiguous within a span."""
        spans = {**self.spans, "ds": 64}  # what one warpgroup writes of dS
        return {
            name: cute.tile_to_shape(swizzle_atom(self.dtype, spans[name]), shape, (0, 1, 2))
            for name, shape in self.tile_shapes().items()
        }

    def shared_storage(self):
        cfg, layouts = self.cfg, self.shared_layouts()

        def barriers(stages):
            return cute.struct.MemRange[cutlass.Int64, stages]

        def buffer(dtype, size, align=1024):
            return cute.struct.Align[cute.struct.MemRange[dtype, size], align]

        def tile(name):
            return buffer(self.dtype, cute.cosize(layouts[name]))

        @cute.struct
        class Storage:
            q_barriers: barriers(2 * STAGES)
            do_barriers: barriers(2 * STAGES)
            k_barriers: barriers(2)
            v_barriers: barriers(2)
            ds_barriers: barriers(STAGES)
            keys: cute.struct.MemRange[Int32, 5]
            lse: buffer(Float32, cfg.tile_m * STAGES, 128)
            delta: buffer(Float32, cfg.tile_m * STAGES, 128)
            q: tile("q")
            do: tile("do")
            k: tile("k")
            v: tile("v")
            ds: tile("ds")
            dq: buffer(Float32, 2 * self.dq_tile.elements)

        return Storage

    @cute.kernel
    def kernel(
        self,
        tma: Tma,
        saved: Workspace,
        gradients: Gradients,
        problem: Problem,
        scheduler: Any,
        mmas: Mmas,
    ):
        cfg = self.cfg
        storage_type = self.shared_storage()
        assert storage_type.__sizeof__() == cfg.shared_memory_bytes, storage_type.__sizeof__()
        storage = SmemAllocator().allocate(storage_type)
        tiles = self.make_tiles(storage)
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_index == 0:
            for info in (tma.q, tma.k, tma.do, tma.v, gradients.tma_dk, gradients.tma_dv):
                cpasync.prefetch_descriptor(info.atom)
        work = self.find_work(problem, scheduler)
        if warp_index == 0:
            self.note_keys(tiles.keys, work)
        pipelines = self.make_pipelines(storage, warp_index)
        if warp_index < 4:
            cute.arch.setmaxregister_decrease(cfg.registers.producer)
            if warp_index == 0:
                if work.order.count > 0:
                    self.load(tma, tiles, pipelines, problem, saved, work)
            if warp_index == 1:
                self.add_dq(tiles, problem, saved, work)
        else:
            cute.arch.setmaxregister_increase(cfg.registers.consumer)
            self.consume(mmas, tiles, pipelines, problem, work, gradients)

    def make_tiles(self, storage) -> Tiles:
        layouts = self.shared_layouts()

        def tile(name):
            return getattr(storage, name).get_tensor(layouts[name].outer, swizzle=layouts[name].inner)

        def statistics(buffer, stages):
            return buffer.get_tensor(cute.make_layout((self.cfg.tile_m, stages)))

        return Tiles(
            tile("q"), tile("do"), tile("k"), tile("v"), tile("ds"), storage.dq.data_ptr(),
            statistics(storage.lse, STAGES), statistics(storage.delta, STAGES),
            storage.keys.get_tensor(cute.make_layout(5)),
        )  # fmt: skip

    def make_pipelines(self, storage, warp_index: Int32) -> Pipelines:
        cfg = self.cfg
        group, thread = pipeline.CooperativeGroup, pipeline.Agent.Thread

        def make(name, extra=0, last=False):
            rows, columns, stages = self.tile_shapes()[name]
            return pipeline.PipelineTmaAsync.create(
                num_stages=stages,
                producer_group=group(thread),
                consumer_group=group(thread, 4 * cfg.warpgroups),
                tx_count=rows * columns * 2 + extra,
                barrier_storage=getattr(storage, f"{name}_barriers").data_ptr(),
                defer_sync=not last,  # the last one fences and synchronises for all
            )

        ds = storage.ds_barriers.data_ptr()
        self.initialise(ds, warp_index)
        statistics = 4 * cfg.tile_m
        q, do, k = make("q", statistics), make("do", statistics), make("k")
        return Pipelines(q, do, k, make("v", last=True), ds)

    @cute.jit
    def initialise(self, ds_barriers: cute.Pointer, warp_index: Int32):
        if warp_index == 0:
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(STAGES):
                    cute.arch.mbarrier_init(ds_barriers + stage, 4 * self.cfg.warpgroups)

    @cute.jit
    def find_work(self, problem: Problem, scheduler: Any) -> Work:
        cfg = self.cfg
        tile = scheduler.tile(cute.arch.block_idx()[0])
        batch = tile.batch
        if const_expr(cfg.varlen):
            batch = minimum(batch, scheduler.batch - 1)
        queries, keys = problem.queries.of(batch), problem.keys.of(batch)
        # First keys first; not below 0 for a number left over, whatever sequence it looks at.
        n_block = maximum(ceil_div(keys.length, cfg.tile_n) - 1 - tile.m_block, 0)
        packed = False
        if const_expr(cfg.varlen):
            # A number left over: no keys.
            length = keys.length if tile.batch < scheduler.batch else Int32(0)
            keys = Sequence(keys.batch, keys.offset, length)
            packed = problem.queries.cu_seqlens != 0
        window = problem.window if const_expr(cfg.mask == "local") else ()
        visibility = Visibility(cfg.mask, queries.length, keys.length, *window)
        blocks = BlockRange.of_viewers(visibility.viewers, n_block, cfg.tile_n, cfg.tile_m)
        if const_expr(cfg.varlen):
            end = blocks.end if keys.length > 0 else blocks.first
            blocks = BlockRange(
                blocks.first, end, minimum(blocks.unmasked_first, end),
                minimum(blocks.unmasked_end, end),
            )  # fmt: skip
        shift = n_block * (cfg.tile_n // cfg.tile_m) % maximum(
            blocks.unmasked_end - blocks.unmasked_first, 1
        )
        order = RowOrder(blocks, shift if problem.turns.address == 0 else Int32(0))
        row = workspace.first_row(packed, queries, batch)
        return Work(n_block, tile.head, queries, keys, visibility, order, row)

    def note_keys(self, note: cute.Tensor, work: Work) -> None:
        keys = work.keys
        values = (work.n_block, work.head_kv, keys.batch, keys.offset, keys.length)
        for i, value in enumerate(values):
            note[i] = Int32(value)

    @cute.jit
    def load(
        self,
        tma: Tma,
        tiles: Tiles,
        pipelines: Pipelines,
        problem: Problem,
        saved: Workspace,
        work: Work,
    ):
        """Producer warp: K and Q of the first rows, V and dO, then Q and dO row block by row block."""
        cfg, queries, keys = self.cfg, work.queries, work.keys
        head_kv, first_block = work.head_kv, work.workspace_row // cfg.tile_m

        def source(info, sequence, head, columns, rows, block):
            m = cute.domain_offset((sequence.offset, 0), info.tma_tensor[None, None, head, sequence.batch])
            return cute.local_tile(m, (rows, columns), (block, 0))

        k_source = source(tma.k, keys, head_kv, cfg.head_dim, cfg.tile_n, work.n_block)
        v_source = source(tma.v, keys, head_kv, cfg.head_dim_v, cfg.tile_n, work.n_block)
        sK, gK = partition(tma.k, tiles.k, k_source)
        sV, gV = partition(tma.v, tiles.v, v_source)
        q_state, do_state, once = (
            pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, stages)
            for stages in (STAGES, STAGES, 1)
        )
        load_stage(pipelines.k, once, tma.k.atom, gK, sK)
        for h in cutlass.range(problem.qhead_per_kvhead, unroll=1):
            head = head_kv * problem.qhead_per_kvhead + h
            q_source = source(tma.q, queries, head, cfg.head_dim, cfg.tile_m, None)
            do_source = source(tma.do, queries, head, cfg.head_dim_v, cfg.tile_m, None)
            sQ, gQ = partition(tma.q, tiles.q, q_source)
            sdO, gdO = partition(tma.do, tiles.do, do_source)
            lse = cute.local_tile(saved.lse[queries.batch, head, None], (cfg.tile_m,), (None,))
            delta = cute.local_tile(saved.delta[queries.batch, head, None], (cfg.tile_m,), (None,))
            for i in cutlass.range(work.order.count, unroll=1):
                m_block = work.order.block(i)
                load_stage(pipelines.q, q_state, tma.q.atom, gQ[None, m_block], sQ)
                full = pipelines.q.producer_get_barrier(q_state)
                load_row(lse[None, first_block + m_block], tiles.lse[None, q_state.index], full)
                q_state.advance()
                if i == 0 and h == 0:
                    load_stage(pipelines.v, once, tma.v.atom, gV, sV)
                load_stage(pipelines.do, do_state, tma.do.atom, gdO[None, m_block], sdO)
                full = pipelines.do.producer_get_barrier(do_state)
                load_row(delta[None, first_block + m_block], tiles.delta[None, do_state.index], full)
                do_state.advance()

    @cute.jit
    def add_dq(self, tiles: Tiles, problem: Problem, saved: Workspace, work: Work):
        """Second warp: what the consumers leave of dQ is added to the workspace, in turns or not."""
        cfg, tile = self.cfg, self.dq_tile
        first_block = work.workspace_row // cfg.tile_m
        lane = cute.arch.lane_idx()
        for h in cutlass.range(problem.qhead_per_kvhead, unroll=1):
            head = work.head_kv * problem.qhead_per_kvhead + h
            for i in cutlass.range(work.order.count, unroll=1):
                m_block = work.order.block(i)
                place = (work.queries.batch, head, first_block + m_block)
                start = saved.dq[(*place, None)].iterator
                for w in cutlass.range_constexpr(cfg.warpgroups):
                    if lane == 0:
                        # All but the last copy have read: that of w, one round ago, has.
                        cute.arch.cp_async_bulk_wait_group(1, read=True)
                    cute.arch.sync_warp()
                    cute.arch.barrier_arrive(barrier_id=Barrier.DQ_EMPTY + w, number_of_threads=160)
                    cute.arch.barrier(barrier_id=Barrier.DQ_FULL + w, number_of_threads=160)
                    if lane == 0:
                        if const_expr(w == 0):
                            if problem.turns.address != 0:
                                earlier = BlockRange.of(
                                    work.visibility, m_block, cfg.tile_m, cfg.tile_n
                                )
                                problem.turns.wait(place, work.n_block - earlier.first)
                        part = w * tile.elements
                        add_bulk(tiles.dq + part, start + part, 4 * tile.elements)
                        cute.arch.cp_async_bulk_commit_group()
                if lane == 0 and problem.turns.address != 0:
                    cute.arch.cp_async_bulk_wait_group(0)
                    problem.turns.give(place)
        if lane == 0:
            cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def consume(
        self,
        mmas: Mmas,
        tiles: Tiles,
        pipelines: Pipelines,
        problem: Problem,
        work: Work,
        gradients: Gradients,
    ):
        """Consumer warpgroup: dK and dV of 64 keys, its half of every dQ."""
        cfg = self.cfg
        index = cute.arch.thread_idx()[0] - 128
        thread, fragments = self.make_thread(index, mmas, tiles), self.make_fragments(mmas, tiles)
        for acc in (fragments.acc_dk, fragments.acc_dv):
            acc.fill(0.0)
            pin(acc)  # else the zeros are moved behind the fence of the first WGMMA
        if work.order.count > 0:
            self.differentiate(mmas, tiles, pipelines, problem, work, fragments, thread)
        for i in cutlass.range_constexpr(cute.size(fragments.acc_dk)):
            fragments.acc_dk[i] = fragments.acc_dk[i] * problem.scale
        # Not the index from above: nothing derived from it shall occupy registers in the main loop.
        index, note = opaque(index), tiles.keys
        place = (note[0], note[1], Sequence(note[2], note[3], note[4]))
        # dV where the same 16 rows of V were: only this warp read them.
        sV, sK = tiles.v[None, None, 0], tiles.k[None, None, 0]
        self.store_dv.store(
            fragments.acc_dv, mmas.dv, sV, gradients.tma_dv, gradients.dv, place, index, cfg.varlen
        )
        # dK where K was, which both warpgroups read for dQ.
        cute.arch.barrier(barrier_id=Barrier.CONSUMERS, number_of_threads=256)
        self.store_dk.store(
            fragments.acc_dk, mmas.dk, sK, gradients.tma_dk, gradients.dk, place, index, cfg.varlen
        )

    def make_thread(self, index: Int32, mmas: Mmas, tiles: Tiles) -> Thread:
        cfg = self.cfg
        identity = cute.make_identity_tensor((cfg.tile_n, cfg.tile_m))
        coordinates = rows_and_columns(mmas.sdp.get_slice(index).partition_C(identity))
        stmatrix = cute.make_copy_atom(warp.StMatrix8x8x16bOp(True, 4), self.dtype)
        copy = cute.make_tiled_copy_C(stmatrix, mmas.sdp)
        target = copy.get_slice(index).partition_D(permute(tiles.ds, (1, 0, 2)))
        return Thread(index, consumer_warpgroup(), coordinates, copy, target)

    def make_fragments(self, mmas: Mmas, tiles: Tiles) -> Fragments:
        cfg = self.cfg
        # Descriptors from the warpgroup's first thread: warp-uniform, so in uniform registers.
        first = consumer_warpgroup() * 128
        sdp, dv, dk, dq = (m.get_slice(first) for m in (mmas.sdp, mmas.dv, mmas.dk, mmas.dq))
        sK, sV = tiles.k[None, None, 0], tiles.v[None, None, 0]
        transposed = (1, 0, 2)
        acc = cute.make_rmem_tensor(mmas.sdp.partition_shape_C((cfg.tile_n, cfg.tile_m)), Float32)
        shape_dk = mmas.dk.partition_shape_C((cfg.tile_n, cfg.head_dim))
        shape_dv = mmas.dv.partition_shape_C((cfg.tile_n, cfg.head_dim_v))
        return Fragments(
            k=mmas.sdp.make_fragment_A(sdp.partition_A(sK)),
            v=mmas.sdp.make_fragment_A(sdp.partition_A(sV)),
            q=mmas.sdp.make_fragment_B(sdp.partition_B(tiles.q)),
            do=mmas.sdp.make_fragment_B(sdp.partition_B(tiles.do)),
            do_columns=mmas.dv.make_fragment_B(dv.partition_B(permute(tiles.do, transposed))),
            q_columns=mmas.dk.make_fragment_B(dk.partition_B(permute(tiles.q, transposed))),
            k_columns=mmas.dq.make_fragment_B(dq.partition_B(permute(sK, (1, 0)))),
            ds=mmas.dq.make_fragment_A(dq.partition_A(tiles.ds)),
            p=PackedFragment.like(acc, self.dtype),
            packed_ds=PackedFragment.like(acc, self.dtype),
            acc_dk=cute.make_rmem_tensor(shape_dk, Float32),
            acc_dv=cute.make_rmem_tensor(shape_dv, Float32),
        )

    @cute.jit
    def differentiate(
        self,
        mmas: Mmas,
        tiles: Tiles,
        pipelines: Pipelines,
        problem: Problem,
        work: Work,
        fragments: Fragments,
        thread: Thread,
    ):
        """All row blocks of all heads of the group; dK (unscaled) and dV are complete after it."""
        cfg, order = self.cfg, work.order
        mask = Mask(work.visibility.viewers, thread.coordinates, work.n_block * cfg.tile_n, cfg.tile_m)
        once = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
        pipelines.k.consumer_wait(once)
        if const_expr(cfg.varlen):
            self.clear(tiles.k, "k", 0, work.keys.length - work.n_block * cfg.tile_n, thread)
        step = partial(self.step, mmas, tiles, pipelines, problem, work, fragments, thread, once)
        step(Int32(0), mask, order.block(Int32(0)), first=True)
        number = Int32(1)
        start = Int32(1)
        for _ in cutlass.range(problem.qhead_per_kvhead, unroll=1):
            if const_expr(cfg.mask == "local"):
                for i in cutlass.range(start, order.unmasked_begin, unroll=1):
                    step(number, mask, order.block(i), first=False)
                    number += 1
            for i in cutlass.range(maximum(start, order.unmasked_begin), order.unmasked_end, unroll=1):
                m_block = order.block(i) if const_expr(cfg.varlen) else None
                step(number, None, m_block, first=False)
                number += 1
            for i in cutlass.range(maximum(start, order.unmasked_end), order.count, unroll=1):
                step(number, mask, order.block(i), first=False)
                number += 1
            start = Int32(0)
        self.finish(mmas, tiles, pipelines, fragments, thread, number - 1)

    @cute.jit
    def step(
        self,
        mmas: Mmas,
        tiles: Tiles,
        pipelines: Pipelines,
        problem: Problem,
        work: Work,
        fragments: Fragments,
        thread: Thread,
        once: pipeline.PipelineState,
        number: Int32,
        mask: Optional[Mask],
        m_block: Optional[Int32],
        first: cutlass.Constexpr,
    ):
        """Row block i, and dQ, dK of row block i - 1 unless `first`.

        number: i, counted over all heads.
        """
        cfg, fr, state, before = self.cfg, fragments, stage_of(number), stage_of(number - 1)
        acc = cute.make_rmem_tensor(mmas.sdp.partition_shape_C((cfg.tile_n, cfg.tile_m)), Float32)
        rows = None
        if const_expr(cfg.varlen):
            rows = work.queries.length - m_block * cfg.tile_m
        pipelines.q.consumer_wait(state)
        if const_expr(cfg.varlen):
            self.clear(tiles.q, "q", state.index, rows, thread)
        wgmma.issue(mmas.sdp, acc, fr.k, fr.q[None, None, None, state.index], accumulate=False)
        if const_expr(not first):
            acc_dq = self.issue_dq_dk(mmas, pipelines, fragments, before)
            warpgroup.wait_group(2)
        else:
            warpgroup.wait_group(0)
        pin(acc)
        exponentiate = partial(
            self.exponentiate, acc, fr.p, tiles.lse[None, state.index], problem, thread, mask, m_block
        )
        if const_expr(not cfg.softcap):
            exponentiate()
        if const_expr(not first):
            if const_expr(not cfg.softcap):
                compute_before(acc, problem.scale_log2)
            warpgroup.wait_group(1)
            pin(acc_dq)
            self.hand_over_dq(acc_dq, tiles, thread)
            warpgroup.wait_group(0)
            pipelines.q.consumer_release(before)
        if const_expr(cfg.softcap):
            exponentiate()  # only now: there are registers for it since dQ is gone
        else:
            fr.p.convert(acc)
        if const_expr(first):
            pipelines.v.consumer_wait(once)
            if const_expr(cfg.varlen):
                self.clear(tiles.v, "v", 0, work.keys.length - work.n_block * cfg.tile_n, thread)
        pipelines.do.consumer_wait(state)
        if const_expr(cfg.varlen):
            self.clear(tiles.do, "do", state.index, rows, thread)
        acc_dp = cute.make_rmem_tensor_like(acc)
        self.start_with_delta(acc_dp, tiles.delta[None, state.index], thread)
        do_block = fr.do[None, None, None, state.index]
        wgmma.issue(mmas.sdp, acc_dp, fr.v, do_block, accumulate=True)
        do_columns = fr.do_columns[None, None, None, state.index]
        wgmma.issue(mmas.dv, fr.acc_dv, as_a_operand(fr.p.view), do_columns, accumulate=True)
        warpgroup.wait_group(0)
        pin(acc_dp)
        pipelines.do.consumer_release(state)
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc_dp[i] = acc[i] * acc_dp[i]
        fr.packed_ds.convert(acc_dp)
        self.hand_over_ds(pipelines, fragments, thread, state)

    @cute.jit
    def issue_dq_dk(
        self,
        mmas: Mmas,
        pipelines: Pipelines,
        fragments: Fragments,
        state: pipeline.PipelineState,
    ) -> cute.Tensor:
        """dQ and dK of a row block whose dS is on its way; returns dQ's accumulator."""
        fr, acc_dq = fragments, self.dq_tile.accumulator()
        cute.arch.mbarrier_wait(pipelines.ds + state.index, state.phase)
        ds_block = fr.ds[None, None, None, state.index]
        wgmma.issue(mmas.dq, acc_dq, ds_block, fr.k_columns, accumulate=False)
        q_columns = fr.q_columns[None, None, None, state.index]
        wgmma.issue(mmas.dk, fr.acc_dk, as_a_operand(fr.packed_ds.view), q_columns, accumulate=True)
        return acc_dq

    @cute.jit
    def exponentiate(
        self,
        acc: cute.Tensor,
        p: PackedFragment,
        lse: cute.Tensor,
        problem: Problem,
        thread: Thread,
        mask: Optional[Mask],
        m_block: Optional[Int32],
    ):
        """S^T becomes P^T in place; with softcap it goes to `p`, and stays here times the slope."""
        scores = rows_and_columns(acc)
        lse_of_columns = self.load_columns(lse, thread)
        if const_expr(self.cfg.softcap):
            cap(scores, *problem.softcap)
        if const_expr(mask is not None):
            mask.apply(scores, m_block)
        capped = cute.make_rmem_tensor_like(acc)
        capped.store(acc.load())
        for i in cutlass.range_constexpr(cute.size(scores, mode=[0])):
            for j in cutlass.range_constexpr(cute.size(scores, mode=[1])):
                exponent = scores[i, j] * problem.scale_log2 - lse_of_columns[j]
                scores[i, j] = cute.math.exp2(exponent, fastmath=True)
        if const_expr(self.cfg.softcap):
            p.convert(acc)
            inverse = cute.arch.rcp_approx(problem.softcap[1])
            for i in cutlass.range_constexpr(cute.size(acc)):
                tanh = capped[i] * inverse
                # Not below 0: a masked score is -inf.
                acc[i] = acc[i] * cute.arch.fmax(1.0 - tanh * tanh, Float32(0.0))

    @cute.jit
    def start_with_delta(self, acc_dp: cute.Tensor, delta: cute.Tensor, thread: Thread):
        """dP accumulates onto delta: adding it costs nothing."""
        sums, of_columns = rows_and_columns(acc_dp), self.load_columns(delta, thread)
        for i in cutlass.range_constexpr(cute.size(sums, mode=[0])):
            for j in cutlass.range_constexpr(cute.size(sums, mode=[1])):
                sums[i, j] = of_columns[j]
        pin(acc_dp)  # copies come before the fence of the WGMMA

    def load_columns(self, statistics: cute.Tensor, thread: Thread) -> cute.Tensor:
        """What is known of this thread's columns: pairs of adjacent ones, every 8."""
        layout = cute.make_layout((2, self.cfg.tile_m // 8), stride=(1, 8))
        start = (statistics.iterator + thread.coordinates[0, 0][1]).align(8)
        values = cute.make_rmem_tensor((2, self.cfg.tile_m // 8), Float32)
        cute.autovec_copy(cute.make_tensor(start, layout), values)
        return values

    @cute.jit
    def hand_over_ds(
        self,
        pipelines: Pipelines,
        fragments: Fragments,
        thread: Thread,
        state: pipeline.PipelineState,
    ):
        """dS^T, rounded, stays in registers for dK and goes to shared memory for dQ."""
        source = thread.copy_ds.retile(fragments.packed_ds.view)
        cute.copy(thread.copy_ds, source, thread.ds[None, None, None, state.index])
        cute.arch.fence_proxy("async.shared", space="cta")  # by every writer, then the barrier
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(pipelines.ds + state.index)

    @cute.jit
    def hand_over_dq(self, acc_dq: cute.Tensor, tiles: Tiles, thread: Thread):
        tile, w = self.dq_tile, thread.warpgroup
        cute.arch.barrier(barrier_id=Barrier.DQ_EMPTY + w, number_of_threads=160)
        target = tile.of_thread(tiles.dq, w, thread.index - w * 128)
        cute.autovec_copy(tile.as_vectors(acc_dq), target)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier_arrive(barrier_id=Barrier.DQ_FULL + w, number_of_threads=160)

    @cute.jit
    def finish(
        self,
        mmas: Mmas,
        tiles: Tiles,
        pipelines: Pipelines,
        fragments: Fragments,
        thread: Thread,
        number: Int32,
    ):
        """dQ and dK of the last row block; everything is waited for."""
        acc_dq = self.issue_dq_dk(mmas, pipelines, fragments, stage_of(number))
        warpgroup.wait_group(1)
        pin(acc_dq)
        self.hand_over_dq(acc_dq, tiles, thread)
        warpgroup.wait_group(0)
        pin(fragments.acc_dv)
        pin(fragments.acc_dk)

    @cute.jit
    def clear(self, tile: cute.Tensor, name: cutlass.Constexpr, stage, valid: Int32, thread: Thread):
        rows, columns, _ = self.tile_shapes()[name]
        start = tile.iterator + stage * (rows * columns)
        clear_tail(
            start, (rows, columns), self.spans[name], valid, thread.index, 256, Barrier.CONSUMERS
        )
