"""The launch, a block's work and its loads, which both backward kernels share.

hopper/backward/kernel.py serves head dims up to 128, hopper/backward/kernel_wide.py those above.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Optional

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_fake_tensor
from hopper_attention.cute_kernels.backward import workspace
from hopper_attention.cute_kernels.backward.dq_semaphore import DqSemaphore
from hopper_attention.cute_kernels.backward.row_order import RowOrder
from hopper_attention.cute_kernels.masks.visible_range import BlockRange, MaskRange
from hopper_attention.cute_kernels.primitives.arguments import (
    BackwardOperands,
    SequenceAddresses,
    Window,
    WorkspaceStatistics,
    example,
)
from hopper_attention.cute_kernels.primitives.arithmetic import ceil_div, maximum, minimum
from hopper_attention.cute_kernels.primitives.types import DTYPES, row_statistics, strided
from hopper_attention.cute_kernels.scheduling.sequence import EqualLengths, Lengths, Sequence
from hopper_attention.cute_kernels.scheduling.tile_scheduler import DenseScheduler, VarlenScheduler
from hopper_attention.cute_kernels.softmax.online import LOG2_E
from hopper_attention.hopper.backward.config import BACKWARD_STAGES
from hopper_attention.hopper.backward.dq_tile import DqTile
from hopper_attention.hopper.primitives.named_barriers import consumer_warpgroup
from hopper_attention.hopper.primitives.row_store import RowStore, swizzle_atom, widest_span
from hopper_attention.hopper.primitives.tma import load_row, load_stage, partition, permute
from hopper_attention.hopper.primitives.zero_fill import zero_fill_rows

CONSUMERS = 2
CONSUMER_THREADS = CONSUMERS * 128


class DqBarrier(IntEnum):
    """Named barriers of both kernels, behind their own.

    Between the warp that waits for lower key blocks, in global memory, and the consumers.  Each
    consumer has its own MAY_ADD: the two of kernel_wide.py add dQ of a row block in different
    steps, and with one barrier for both each could wait for the other for ever.
    """

    MAY_ADD = 4
    """MAY_ADD + w: it is this block's turn to add to a block of dQ; consumer w may."""
    ADDED = MAY_ADD + CONSUMERS
    """Both consumers have added."""


MAY_ADD_THREADS = 128 + 32
"""A consumer and the warp that waits for lower key blocks."""
ADDED_THREADS = CONSUMER_THREADS + 32


@dataclass(frozen=True)
class Problem:
    """Everything that all roles know of the launch."""

    queries: Any
    """EqualLengths or Lengths, by `BackwardConfig.varlen`."""
    keys: Any
    qhead_per_kvhead: Int32
    scale: Float32
    """softmax_scale."""
    scale_log2: Float32
    """The factor of the scores that exp sees: after softcap if there is one."""
    softcap: Any
    """(inner, outer) of `softmax.online.cap`, or None."""
    window: Any
    """(left, right, chunk) of `MaskRange`, or None where the mask is not local."""
    dq_semaphore: DqSemaphore


@dataclass(frozen=True)
class Workspace:
    """cute_kernels/backward/workspace.py has the layout; dQ (entries, heads, row blocks,
    elements)."""

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
class Work:
    """One block: its keys, and the rows that see them."""

    n_block: Int32
    head_kv: Int32
    queries: Sequence
    keys: Sequence
    mask_range: MaskRange
    order: RowOrder
    workspace_row: Int32
    """The workspace's row at which the sequence starts."""


def stage_of(number: Int32, stages: int = BACKWARD_STAGES) -> pipeline.PipelineState:
    """The state of row block `number` in a pipeline of 2 or 4 stages, for its consumers."""
    phase = number >> stages.bit_length() - 1 & 1
    return pipeline.PipelineState(stages, Int32(0), number & stages - 1, phase)


@dataclass(frozen=True)
class Launch:
    """Everything that a kernel is launched with."""

    tma: Tma
    saved: Workspace
    gradients: Gradients
    problem: Problem
    scheduler: Any


class BackwardCommon:
    """Everything that both kernels do alike, for a BackwardConfig or WideBackwardConfig."""

    def __init__(self, config: Any):
        self.cfg = config
        self.dtype = DTYPES[config.dtype]
        self.dq_tile = DqTile(self.dtype, config.tile_m, config.head_dim)
        # K is read by rows and, for dQ, by columns of one warpgroup's share.
        self.spans = {
            "q": widest_span(config.head_dim),
            "do": widest_span(config.head_dim_v),
            "k": widest_span(self.dq_tile.columns),
            "v": widest_span(config.head_dim_v),
            "ds": 64,  # what one warpgroup writes
        }
        rows = config.tile_n
        self.store_dk = RowStore(self.dtype, rows, config.head_dim, self.spans["k"])
        self.store_dv = RowStore(self.dtype, rows, config.head_dim_v, self.spans["v"])

    def example_arguments(self) -> tuple:
        """Arguments that `__call__` is compiled for, without the stream."""
        shape = tuple(cute.sym_int32() for _ in range(3)) + (2 * self.dq_tile.elements,)
        stride = (*(cute.sym_int64(divisibility=4) for _ in range(3)), 1)
        dq = make_fake_tensor(Float32, shape, stride, assumed_align=16)
        return (
            example(BackwardOperands, lambda: strided(self.dtype, 4)),
            example(WorkspaceStatistics, lambda: row_statistics(4)),
            dq,
            Float32(1.0),
            Float32(1.0) if self.cfg.softcap else None,
            example(Window, lambda: Int32(1)) if self.cfg.mask == "local" else None,
            example(SequenceAddresses, lambda: Int64(0)) if self.cfg.varlen else None,
            Int32(1),
            Int64(0),
        )

    def prepare(
        self,
        operands: BackwardOperands,
        saved: Workspace,
        softmax_scale: Float32,
        softcap: Optional[Float32],
        window: Optional[Window],
        addresses: Optional[SequenceAddresses],
        num_sequences: Int32,
        dq_semaphore: Int64,
    ) -> Launch:
        """Make descriptors, the problem and the order of the blocks, on the host."""
        cfg = self.cfg
        _, seqlen_q, heads, _ = operands.q.shape
        entries, seqlen_k, heads_kv, _ = operands.k.shape
        group = heads // heads_kv
        mQ, mK, mV, mdO, mdK, mdV = (permute(t, (1, 3, 2, 0)) for t in operands)  # (s, d, h, b)
        tma = Tma(
            self.load_tma(mQ, "q"), self.load_tma(mdO, "do"),
            self.load_tma(mK, "k"), self.load_tma(mV, "v"),
        )  # fmt: skip
        gradients = Gradients(mdK, mdV, self.store_dk.tma(mdK), self.store_dv.tma(mdV))
        if cfg.varlen:
            queries = Lengths(addresses.cu_seqlens_q, addresses.seqused_q, seqlen_q)
            keys = Lengths(addresses.cu_seqlens_k, addresses.seqused_k, seqlen_k)
            rows = entries * seqlen_k
            scheduler = VarlenScheduler(keys, num_sequences, heads_kv, rows, cfg.tile_n)
        else:
            queries, keys = EqualLengths(seqlen_q), EqualLengths(seqlen_k)
            row_bytes = (cfg.head_dim + cfg.head_dim_v) * 2 + cfg.head_dim * 4
            scheduler = DenseScheduler.create(
                seqlen_k, seqlen_q * group, heads_kv, heads_kv, entries, cfg.tile_n, row_bytes
            )
        capped, scale = None, softmax_scale
        if cfg.softcap:
            capped, scale = (2.0 * LOG2_E * scale / softcap, softcap), Float32(1.0)
        semaphore = DqSemaphore(dq_semaphore, heads, saved.dq.shape[2])
        problem = Problem(
            queries, keys, group, softmax_scale, scale * LOG2_E, capped, window, semaphore
        )
        return Launch(tma, saved, gradients, problem, scheduler)

    def load_tma(self, tensor: cute.Tensor, name: str) -> cpasync.TmaInfo:
        layout = cute.select(self.shared_layouts()[name], mode=[0, 1])
        op, (rows, columns, _) = cpasync.CopyBulkTensorTileG2SOp(), self.tile_shapes()[name]
        return cpasync.make_tiled_tma_atom(op, tensor, layout, (rows, columns))

    def tile_shapes(self) -> dict[str, tuple[int, int, int]]:
        """(rows, columns, stages) of the 16-bit tiles in shared memory."""
        cfg = self.cfg
        return {
            "q": (cfg.tile_m, cfg.head_dim, cfg.q_stages),
            "do": (cfg.tile_m, cfg.head_dim_v, BACKWARD_STAGES),
            "k": (cfg.tile_n, cfg.head_dim, 1),
            "v": (cfg.tile_n, cfg.head_dim_v, 1),
            "ds": (cfg.tile_m, cfg.tile_n, BACKWARD_STAGES),
        }

    def shared_layouts(self) -> dict[str, Any]:
        """Swizzled layouts, rows of columns that are contiguous within a span."""
        return {
            name: cute.tile_to_shape(swizzle_atom(self.dtype, self.spans[name]), shape, (0, 1, 2))
            for name, shape in self.tile_shapes().items()
        }

    def barriers(self, name: str):
        """Storage: full and empty of every stage."""
        return cute.struct.MemRange[cutlass.Int64, 2 * self.tile_shapes()[name][2]]

    def buffer(self, dtype, size: int, align: int = 1024):
        return cute.struct.Align[cute.struct.MemRange[dtype, size], align]

    def tile(self, name: str):
        return self.buffer(self.dtype, cute.cosize(self.shared_layouts()[name]))

    def input_tiles(self, storage) -> dict[str, cute.Tensor]:
        layouts = self.shared_layouts()
        tiles = {
            name: getattr(storage, name).get_tensor(
                layouts[name].outer, swizzle=layouts[name].inner
            )
            for name in ("q", "do", "k", "v")
        }
        for name, stages in (("lse", self.cfg.q_stages), ("delta", BACKWARD_STAGES)):
            statistics = cute.make_layout((self.cfg.tile_m, stages))
            tiles[name] = getattr(storage, name).get_tensor(statistics)
        return {**tiles, "keys": storage.keys.get_tensor(cute.make_layout(5))}

    def input_pipelines(self, storage) -> dict[str, pipeline.PipelineTmaAsync]:
        """Pipelines of Q with LSE, dO with delta, K, V; the block is synchronised after it."""
        group, thread = pipeline.CooperativeGroup, pipeline.Agent.Thread

        def make(name: str, last: bool = False):
            rows, columns, stages = self.tile_shapes()[name]
            statistics = 4 * self.cfg.tile_m if name in ("q", "do") else 0
            return pipeline.PipelineTmaAsync.create(
                num_stages=stages,
                producer_group=group(thread),
                consumer_group=group(thread, 8),
                tx_count=rows * columns * 2 + statistics,
                barrier_storage=getattr(storage, f"{name}_barriers").data_ptr(),
                defer_sync=not last,  # the last one fences and synchronises for all
            )

        return {"q": make("q"), "do": make("do"), "k": make("k"), "v": make("v", last=True)}

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
        mask_range = MaskRange(cfg.mask, queries.length, keys.length, *window)
        blocks = BlockRange.of_keys(mask_range.transposed, n_block, cfg.tile_n, cfg.tile_m)
        if const_expr(cfg.varlen):
            end = blocks.end if keys.length > 0 else blocks.first
            blocks = BlockRange(
                blocks.first, end, minimum(blocks.unmasked_first, end),
                minimum(blocks.unmasked_end, end),
            )  # fmt: skip
        shift = (
            n_block
            * (cfg.tile_n // cfg.tile_m)
            % maximum(blocks.unmasked_end - blocks.unmasked_first, 1)
        )
        order = RowOrder(blocks, shift if problem.dq_semaphore.address == 0 else Int32(0))
        row = workspace.first_row(packed, queries, batch)
        return Work(n_block, tile.head, queries, keys, mask_range, order, row)

    @cute.jit
    def order_dq_adds(self, problem: Problem, work: Work):
        """Second warp, where key blocks add to dQ in ascending order."""
        cfg, lane = self.cfg, cute.arch.lane_idx()
        first_block = work.workspace_row // cfg.tile_m
        for h in cutlass.range(problem.qhead_per_kvhead, unroll=1):
            head = work.head_kv * problem.qhead_per_kvhead + h
            for i in cutlass.range(work.order.count, unroll=1):
                m_block = work.order.block(i)
                place = (work.queries.batch, head, first_block + m_block)
                if lane == 0:
                    earlier = BlockRange.of(work.mask_range, m_block, cfg.tile_m, cfg.tile_n)
                    problem.dq_semaphore.wait(place, work.n_block - earlier.first)
                cute.arch.sync_warp()
                for consumer in cutlass.range_constexpr(CONSUMERS):
                    cute.arch.barrier_arrive(
                        barrier_id=DqBarrier.MAY_ADD + consumer, number_of_threads=MAY_ADD_THREADS
                    )
                cute.arch.barrier(barrier_id=DqBarrier.ADDED, number_of_threads=ADDED_THREADS)
                if lane == 0:
                    problem.dq_semaphore.signal(place)

    def address_of_dq(
        self, saved: Workspace, work: Work, head: Int32, m_block: Int32, index: Int32
    ) -> Int64:
        """The address of the first element that thread `index` of a consumer has of dQ."""
        block = work.workspace_row // self.cfg.tile_m + m_block
        start = saved.dq[work.queries.batch, head, block, None].iterator
        return self.dq_tile.of_thread(start, consumer_warpgroup(), index).iterator.toint()

    @cute.jit
    def add_dq(self, acc: cute.Tensor, address: Int64, problem: Problem):
        """Each consumer adds its share of dQ from registers, in order or not."""
        if problem.dq_semaphore.address != 0:
            own = consumer_warpgroup() + DqBarrier.MAY_ADD
            cute.arch.barrier(barrier_id=own, number_of_threads=MAY_ADD_THREADS)
        self.dq_tile.add(acc, address)
        if problem.dq_semaphore.address != 0:
            cute.arch.fence_acq_rel_gpu()
            cute.arch.barrier_arrive(barrier_id=DqBarrier.ADDED, number_of_threads=ADDED_THREADS)

    def save_keys(self, target: cute.Tensor, work: Work) -> None:
        keys = work.keys
        values = (work.n_block, work.head_kv, keys.batch, keys.offset, keys.length)
        for i, value in enumerate(values):
            target[i] = Int32(value)

    @cute.jit
    def load(
        self,
        tma: Tma,
        tiles: Any,
        pipelines: Any,
        problem: Problem,
        saved: Workspace,
        work: Work,
    ):
        """Producer warp: K and the first Q, V and the first dO, then Q and dO, block by block."""
        cfg, queries, keys = self.cfg, work.queries, work.keys
        head_kv, first_block = work.head_kv, work.workspace_row // cfg.tile_m

        def source(info, sequence, head, columns, rows, block):
            m = info.tma_tensor[None, None, head, sequence.batch]
            m = cute.domain_offset((sequence.offset, 0), m)
            return cute.local_tile(m, (rows, columns), (block, 0))

        k_source = source(tma.k, keys, head_kv, cfg.head_dim, cfg.tile_n, work.n_block)
        v_source = source(tma.v, keys, head_kv, cfg.head_dim_v, cfg.tile_n, work.n_block)
        sK, gK = partition(tma.k, tiles.k, k_source)
        sV, gV = partition(tma.v, tiles.v, v_source)
        q_state, do_state, once = (
            pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, stages)
            for stages in (cfg.q_stages, BACKWARD_STAGES, 1)
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
                of_stage = tiles.delta[None, do_state.index]
                load_row(delta[None, first_block + m_block], of_stage, full)
                do_state.advance()

    @cute.jit
    def zero_fill(
        self,
        tile: cute.Tensor,
        name: cutlass.Constexpr,
        stage: Any,
        valid: Int32,
        thread: Int32,
        barrier: cutlass.Constexpr,
    ):
        """Both consumers zero the rows from `valid` of a stage of the tile `name`."""
        rows, columns, _ = self.tile_shapes()[name]
        start = tile.iterator + stage * (rows * columns)
        zero_fill_rows(
            start, (rows, columns), self.spans[name], valid, thread, CONSUMER_THREADS, barrier
        )
