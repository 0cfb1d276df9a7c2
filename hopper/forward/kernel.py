"""Forward attention on sm_90a: O = softmax(softmax_scale * Q K^T) V and its log-sum-exp.

FlashAttention-3's structure (arXiv 2407.08608); a tile is `tile_m` query rows of one head.  Blocks
are persistent: each takes tile after tile from a counter (tile_queue.py).

Layouts    Q, O (batch, seqlen_q, heads, d); K, V (batch, seqlen_k, heads_kv, d); bf16 or fp16, last
           dimension contiguous, other strides any multiple of 16 bytes.  LSE (batch, heads,
           seqlen_q) float32, natural log.  Query head h reads key head h // (heads / heads_kv).
           Columns beyond a tensor's d are loaded as zeros and not stored.
           Packed sequences (varlen) are the rows of one batch entry.  float32 O is passed as
           pairs of 16-bit columns.  Where the heads of a group share tiles (`group`, varlen
           instances only), a tile's rows are `group` heads of each position.

Roles      warpgroup 0     producer; its first warp issues every load, the others idle
           warpgroup 1..W  consumers, 64 query rows each; registers by `setmaxnreg` (config.py)

Pipelines  name  stages  full                   empty: 4 W arrivals, one a consumer warp
           Q     1 or 2  1 arrival + bytes      when O, staged over Q, has been read by its store
           K, V  2 each  1 arrival + bytes      when the WGMMAs that read it are done
           tile  4       1 arrival              at the end of the tile that it describes

Timeline   of the producer and tile t: K(last), Q, K(last - 1), V(last) | find tile t + 1 | K(j),
           V(j + 1) ... V(first).

           of consumer w and tile, key blocks j from last to first (turn: `PingPong`); blocks at
           either end that none of its own 64 rows sees are released unread

             wait K, issue S(last) = Q K | wait S | mask, softmax, P = convert
             for j:  turn | issue S = Q K(j) | issue O += P V(j+1) | end of the turn
                     wait S, release K(j) | mask, maxima | if one has grown: the quads', factors
                     exponentials | wait O, release V(j+1) | P | rescale O, if one has grown
             issue O += P V(first) | 1 / row_sum, LSE | wait O | convert, store

           Q is released at the end, or, if it has two stages, during the next tile's first GEMM.

           Turns order the consumers' issue: one's softmax runs under the others' GEMMs.
           Within a consumer, maxima of block j run under O += P V(j+1), the exponentials behind
           it: ptxas moves the wait up.  Held above the wait they made forward 2 to 5 % slower at
           16k keys, up to 20 % at 1k (H100); the wait before the factors, 3 to 7 % (H200).
           Between tiles nothing stops: the producer is ahead with the next tile's Q and K.

Store      each warp writes its 16 rows of O where its 16 rows of Q were (only its own WGMMAs read
           them, and it has waited for those) and stores them by TMA: no barrier.  Where O is wider
           than Q it has a buffer of its own.  From registers are stored: rows at the end of a
           packed sequence (TMA would overwrite the next one), rows of several heads, and float32.
           Rows of several heads are also loaded without TMA, by the consumers.

Shared memory: barriers, what tiles are, `q_stages` Q (O), `stages` K and V;
`ForwardConfig.shared_memory_bytes`.
"""

from dataclasses import replace
from functools import partial
from typing import Any, Optional

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.hopper_helpers as sm90
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum
from hopper_attention.cute_kernels.masks.apply import Mask
from hopper_attention.cute_kernels.masks.visible_range import BlockRange, MaskRange
from hopper_attention.cute_kernels.primitives.arguments import (
    ForwardCounts,
    ForwardOperands,
    SequenceAddresses,
    TileQueueArguments,
    Window,
    example,
)
from hopper_attention.cute_kernels.primitives.arithmetic import minimum
from hopper_attention.cute_kernels.primitives.fragments import (
    PackedFragment,
    opaque,
    pin,
    rows_and_columns,
)
from hopper_attention.cute_kernels.primitives.memory import read
from hopper_attention.cute_kernels.primitives.types import DTYPES, row_statistics, strided
from hopper_attention.cute_kernels.scheduling.sequence import (
    EqualLengths,
    Lengths,
    Sequence,
    TileRows,
)
from hopper_attention.cute_kernels.scheduling.tile_queue import STAGES as TILE_STAGES
from hopper_attention.cute_kernels.scheduling.tile_queue import TileQueue
from hopper_attention.cute_kernels.scheduling.tile_scheduler import (
    DenseScheduler,
    Tile,
    VarlenScheduler,
)
from hopper_attention.cute_kernels.softmax.online import (
    LOG2_E,
    OnlineSoftmax,
    ScaleGroup,
    cap,
    scale_rows,
)
from hopper_attention.hopper.forward.config import ForwardConfig
from hopper_attention.hopper.forward.output import Output
from hopper_attention.hopper.forward.roles import (
    NO_MORE,
    WORDS,
    Accumulators,
    Fragments,
    Mmas,
    Pipelines,
    Problem,
    Tensors,
    Tiles,
    Tma,
    Work,
    coordinates_of,
    state_after,
)
from hopper_attention.hopper.primitives import wgmma
from hopper_attention.hopper.primitives.named_barriers import (
    NamedBarrier,
    NoPingPong,
    PingPong,
    consumer_warpgroup,
)
from hopper_attention.hopper.primitives.tma import L2Hint, load_stage, partition, permute
from hopper_attention.hopper.primitives.zero_fill import zero_fill_rows

GATHERS = 4
"""Loads of 16 bytes a thread that are under way at the same time where TMA cannot load Q."""


class Forward:
    """The kernel of one `ForwardConfig`: `__call__` on the host, `kernel` and roles on a GPU."""

    def __init__(self, config: ForwardConfig):
        self.cfg = config
        self.dtype = DTYPES[config.dtype]
        self.output = Output(config, self.dtype)

    def example_arguments(self) -> tuple:
        """Arguments that `__call__` is compiled for, without the stream."""
        cfg, number, address = self.cfg, lambda: Int32(1), lambda: Int64(0)
        return (
            example(ForwardOperands, lambda: strided(self.dtype, 4)),
            row_statistics(),
            Float32(1.0),
            Float32(1.0) if cfg.softcap else None,
            Int64(0),
            example(Window, number) if cfg.mask == "local" else None,
            example(SequenceAddresses, address) if cfg.varlen else None,
            example(ForwardCounts, number),
            example(TileQueueArguments, address),
        )

    @cute.jit
    def __call__(
        self,
        operands: ForwardOperands,
        lse: cute.Tensor,
        softmax_scale: Float32,
        softcap: Optional[Float32],
        learnable_sink: Int64,
        window: Optional[Window],
        addresses: Optional[SequenceAddresses],
        counts: ForwardCounts,
        queue: TileQueueArguments,
        stream: cuda.CUstream,
    ):
        mQ, mK, mV, mO = operands
        mQ, mK, mO = (permute(t, (1, 3, 2, 0)) for t in (mQ, mK, mO))  # (s, d, h, b)
        mV = permute(mV, (3, 1, 2, 0))  # (d, s, h, b): N and K of the second GEMM
        operands = ForwardOperands(mQ, mK, mV, mO)
        group = counts.qheads_per_tile if self.cfg.packs_heads else Int32(1)
        self.launch(
            operands, lse, self.capped(softmax_scale, softcap), learnable_sink, window, addresses,
            counts, group, queue, None, stream,
        )  # fmt: skip

    def launch(
        self,
        operands: ForwardOperands,
        mLSE: cute.Tensor,
        scales: tuple,
        learnable_sink: Int64,
        window: Optional[Window],
        addresses: Optional[SequenceAddresses],
        counts: Any,
        group: Int32,
        queue: TileQueueArguments,
        scaling: Any,
        stream: cuda.CUstream,
    ) -> None:
        """`__call__` with Q, K, O as (seqlen, d, heads, batch), V as (d, seqlen, heads, batch).

        `scales` are those of `capped`; `group` query heads share a tile.
        """
        cfg = self.cfg
        mQ, mK, mV, mO = operands
        seqlen_q, _, heads, entries = mQ.shape
        seqlen_k, _, heads_kv, _ = mK.shape
        if cfg.varlen:
            queries = Lengths(addresses.cu_seqlens_q, addresses.seqused_q, seqlen_q)
            keys = Lengths(addresses.cu_seqlens_k, addresses.seqused_k, seqlen_k)
            rows = entries * seqlen_q * group
            scheduler = VarlenScheduler(
                queries, counts.num_sequences, heads // group, rows, cfg.tile_m, group
            )
        else:
            queries, keys = EqualLengths(seqlen_q), EqualLengths(seqlen_k)
            key_bytes = (cfg.head_dim + cfg.head_dim_v) * self.dtype.width // 8
            scheduler = DenseScheduler.create(
                seqlen_q, seqlen_k, heads, heads_kv, entries, cfg.tile_m, key_bytes
            )
        capped, scale = scales
        problem = Problem(
            queries=queries,
            keys=keys,
            group=group,
            tiles_per_kvhead=heads // heads_kv // group,
            scale_log2=scale * LOG2_E,
            softcap=capped,
            window=window,
            sink=learnable_sink,
            scaling=scaling,
            output_type=counts.output_type,
        )
        tensors = Tensors(mQ if cfg.packs_heads else None, mO, mLSE)
        tma = self.tma(operands)
        self.kernel(tma, tensors, problem, scheduler, queue.tile_counter, self.tiled_mmas()).launch(
            grid=[minimum(scheduler.tiles, Int32(queue.max_blocks)), 1, 1],
            block=[cfg.threads, 1, 1],
            stream=stream,
        )

    def tma(self, operands: ForwardOperands) -> Tma:
        """TMA atoms of Q, K and O (seqlen, d, heads, batch) and V (d, seqlen, heads, batch)."""
        cfg = self.cfg
        mQ, mK, mV, mO = operands
        layout_q, layout_k, _, _ = self.shared_layouts()
        layout_v = self.layout_v(cfg.head_dim_v)
        load, make = cpasync.CopyBulkTensorTileG2SOp(), cpasync.make_tiled_tma_atom
        return Tma(
            make(load, mQ, cute.select(layout_q, mode=[0, 1]), (cfg.tile_m, cfg.head_dim)),
            make(load, mK, layout_k, (cfg.tile_n, cfg.head_dim)),
            make(load, mV, layout_v, (cfg.head_dim_v, cfg.tile_n)),
            self.output.tma(mO),
        )

    def capped(self, softmax_scale: Float32, softcap: Optional[Float32]) -> tuple:
        """Factors of `softmax.online.cap`, if there is one, and of the scores after it."""
        if self.cfg.softcap:
            return (2.0 * LOG2_E * softmax_scale / softcap, softcap), Float32(1.0)
        return None, softmax_scale

    def tiled_mmas(self) -> Mmas:
        cfg, dtype, k, mn = self.cfg, self.dtype, OperandMajorMode.K, OperandMajorMode.MN
        make, warpgroups = sm90.make_trivial_tiled_mma, (self.cfg.warpgroups, 1, 1)
        registers = warpgroup.OperandSource.RMEM
        return Mmas(
            make(dtype, dtype, k, k, Float32, warpgroups, (64, cfg.tile_n)),
            make(dtype, dtype, k, mn, Float32, warpgroups, (64, cfg.head_dim_v), registers),
        )

    def shared_layouts(self) -> tuple:
        """Swizzled layouts of Q, K, V and O with their stages."""
        cfg, row = self.cfg, LayoutEnum.ROW_MAJOR
        qk = (cfg.tile_m, cfg.tile_n, cfg.head_dim)
        q = sm90.make_smem_layout_a(row, qk, self.dtype, cfg.q_stages)
        k = sm90.make_smem_layout_b(row, qk, self.dtype, cfg.stages)
        return q, k, self.layout_v(cfg.head_dim_v + cfg.sum_columns), self.output.layout()

    def layout_v(self, columns: int):
        """So many columns of V, (columns, tile_n, stages): N and K of the second GEMM."""
        pv = (self.cfg.tile_m, columns, self.cfg.tile_n)
        return sm90.make_smem_layout_b(LayoutEnum.COL_MAJOR, pv, self.dtype, self.cfg.stages)

    @cute.kernel
    def kernel(
        self,
        tma: Tma,
        tensors: Tensors,
        problem: Problem,
        scheduler: Any,
        tile_counter: Int64,
        mmas: Mmas,
    ):
        cfg = self.cfg
        storage_type = self.shared_storage()
        assert storage_type.__sizeof__() == cfg.shared_memory_bytes, storage_type.__sizeof__()
        storage = SmemAllocator().allocate(storage_type)
        layout_q, layout_k, layout_v, layout_o = self.shared_layouts()
        output = storage.q if cfg.output_over_q else storage.o
        scales = None
        if const_expr(cfg.scale_bytes > 0):
            scales = storage.scales.get_tensor(cute.make_layout((cfg.scale_bytes // 4, cfg.stages)))
        sV = storage.v.get_tensor(layout_v.outer, swizzle=layout_v.inner)
        if const_expr(cfg.sums_in_mma):
            self.fill_ones(storage.v.data_ptr())
            sV = cute.local_tile(sV, (cfg.head_dim_v, cfg.tile_n, cfg.stages), (0, 0, 0))
        tiles = Tiles(
            storage.q.get_tensor(layout_q.outer, swizzle=layout_q.inner),
            storage.k.get_tensor(layout_k.outer, swizzle=layout_k.inner),
            sV,
            output.get_tensor(layout_o.outer, swizzle=layout_o.inner),
            scales,
        )
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_index == 0:
            for info in (tma.q, tma.k, tma.v, tma.o):
                cpasync.prefetch_descriptor(info.atom)
        pipelines = self.make_pipelines(storage, tile_counter)
        if warp_index < 4:
            cute.arch.setmaxregister_decrease(cfg.registers.producer)
            if warp_index == 0:
                self.produce(tma, tiles, pipelines, problem, scheduler)
        else:
            cute.arch.setmaxregister_increase(cfg.registers.consumer)
            v_start = storage.v.data_ptr()
            ping_pong = PingPong.start(cfg.warpgroups) if cfg.ping_pong else NoPingPong()
            self.consume(mmas, tma.o, tensors, tiles, pipelines, problem, v_start, ping_pong)

    # What the kernel for FP8 does otherwise, among others: layout_v, accumulators, factors,
    # issue_pv, wait_pv, rescale, zero_fill_rows.  fill_ones and take_sums are its alone.

    def statistics(self, problem: Problem) -> OnlineSoftmax:
        return OnlineSoftmax.create(2, scale_log2=problem.scale_log2, integer_maxima=True)

    def fragment_p(self, acc_s: cute.Tensor) -> PackedFragment:
        return PackedFragment.like(acc_s, self.dtype)

    def accumulators(self, shape_o: tuple) -> Accumulators:
        acc_o = cute.make_rmem_tensor(shape_o, Float32)
        return Accumulators(acc_o, acc_o, acc_o)

    def load_scales(
        self, problem: Problem, work: Work, tiles: Tiles, pipe: Any, state: Any, n_block: Int32
    ) -> None:
        """Load what comes to shared memory beside a block of K, in the same stage."""

    def scales(self, tiles: Tiles, problem: Problem, work: Work) -> Any:
        """The scales of a tile that `scale_groups` takes; None without FP8."""

    def read_scales(self, scales: Any, stage: Int32, n_block: Int32) -> Any:
        """The scales of a key block in a stage of K; None without FP8."""

    def scale_groups(self, problem: Problem, scales: Any, of_block: Any) -> tuple[ScaleGroup, ...]:
        """Columns of a key block by their scale; `of_block`: from `read_scales`."""
        inner = problem.softcap[0] if self.cfg.softcap else None
        return (ScaleGroup(range(self.cfg.tile_n // 4), problem.scale_log2, inner=inner),)

    def values_offset(self, problem: Problem, work: Work) -> Int32:
        """V's column of a sequence's first key."""
        return work.keys.offset

    def descale_output(self, factors: cute.Tensor, problem: Problem, work: Work) -> None:
        """Scales of V, into the factors of O's rows."""

    @cute.jit
    def find_work(self, problem: Problem, scheduler: Any, number: Int32) -> Work:
        """The producer warp finds its work; lane w what only consumer warpgroup w has to know."""
        cfg = self.cfg
        tile = scheduler.tile(number)
        batch = tile.batch
        if const_expr(cfg.varlen):
            batch = minimum(batch, scheduler.batch - 1)
        queries, keys = problem.queries.of(batch), problem.keys.of(batch)
        if const_expr(cfg.varlen):
            # A number left over: no rows.
            rows = queries.length if tile.batch < scheduler.batch else Int32(0)
            queries = Sequence(queries.batch, queries.offset, rows)
        mask_range, group = self.mask_range(problem, queries, keys), self.group(problem)
        blocks = BlockRange.of(mask_range, tile.m_block, cfg.tile_m, cfg.tile_n, group)
        if const_expr(cfg.varlen):
            end = blocks.end if queries.length > 0 else blocks.first
            blocks = BlockRange(blocks.first, end, blocks.unmasked_first, blocks.unmasked_end)
        warpgroup = minimum(cute.arch.lane_idx(), cfg.warpgroups - 1)
        row_block = tile.m_block * cfg.warpgroups + warpgroup
        own = BlockRange.within(blocks, mask_range, row_block, 64, cfg.tile_n, group)
        head_kv = tile.head // problem.tiles_per_kvhead
        factors = self.factors(problem, tile, batch, head_kv, row_block)
        rows = TileRows(group, tile.head * group, tile.m_block * cfg.tile_m)
        return Work(tile, queries, keys, head_kv, blocks.first, blocks.end, own, factors, rows)

    def factors(
        self, problem: Problem, tile: Tile, batch: Int32, head_kv: Int32, row_block: Int32
    ) -> tuple[Float32, ...]:
        """`Work.factors` of 64 rows."""
        return ()

    def mask_range(self, problem: Problem, queries: Sequence, keys: Sequence) -> MaskRange:
        window = problem.window if self.cfg.mask == "local" else ()
        return MaskRange(self.cfg.mask, queries.length, keys.length, *window)

    def current_work(self, problem: Problem, queue: TileQueue, count: Int32) -> Work:
        """Consumers read the work of their tile number `count`: what the producer has found."""
        return self.read_work(problem, queue, state_after(count, TILE_STAGES), consumer_warpgroup())

    def read_work(
        self, problem: Problem, queue: TileQueue, state: pipeline.PipelineState, warpgroup: Int32
    ) -> Work:
        """Return the work in a slot of the queue, with the blocks of one consumer."""
        cfg = self.cfg
        words = queue.read(state, 0, WORDS)
        own = queue.read(state, WORDS + cfg.own_words * warpgroup, cfg.own_words)
        work = Work.from_words(words, own, self.group(problem), cfg.tile_m)
        if cfg.mask == "local":
            return work
        zero = Int32(0)  # known, it needs no register
        blocks = replace(work.blocks, first=zero, unmasked_first=zero)
        return replace(work, first=zero, blocks=blocks)

    def shared_storage(self):
        cfg = self.cfg
        words = WORDS + cfg.warpgroups * cfg.own_words
        layout_q, layout_k, layout_v, layout_o = self.shared_layouts()

        def buffer(layout, dtype=self.dtype, used=True):
            size = cute.cosize(layout) if used else 0
            return cute.struct.Align[cute.struct.MemRange[dtype, size], 1024]

        @cute.struct
        class Storage:
            q_barriers: cute.struct.MemRange[cutlass.Int64, 2 * cfg.q_stages]
            k_barriers: cute.struct.MemRange[cutlass.Int64, 2 * cfg.stages]
            v_barriers: cute.struct.MemRange[cutlass.Int64, 2 * cfg.stages]
            tile_barriers: cute.struct.MemRange[cutlass.Int64, 2 * TILE_STAGES]
            tile_words: cute.struct.MemRange[Int32, words * TILE_STAGES]
            scales: cute.struct.Align[
                cute.struct.MemRange[Float32, cfg.scale_bytes // 4 * cfg.stages], 16
            ]
            q: buffer(layout_q)
            k: buffer(layout_k)
            v: buffer(layout_v)
            o: buffer(layout_o, self.output.dtype, not cfg.output_over_q)

        return Storage

    def make_pipelines(self, storage, tile_counter: Int64) -> Pipelines:
        cfg, element_bytes = self.cfg, self.dtype.width // 8
        group, thread = pipeline.CooperativeGroup, pipeline.Agent.Thread

        def make(barriers, stages, elements, last=False, more_bytes=0):
            return pipeline.PipelineTmaAsync.create(
                num_stages=stages,
                producer_group=group(thread),
                consumer_group=group(thread, 4 * cfg.warpgroups),
                tx_count=elements * element_bytes + more_bytes,
                barrier_storage=barriers.data_ptr(),
                defer_sync=not last,  # the last one fences and synchronises for all
            )

        k_elements = cfg.tile_n * cfg.head_dim
        words = WORDS + cfg.warpgroups * cfg.own_words
        slots = storage.tile_words.get_tensor(cute.make_layout((words, TILE_STAGES)))
        queue = TileQueue.create(
            tile_counter, slots, storage.tile_barriers.data_ptr(), cfg.warpgroups
        )
        return Pipelines(
            make(storage.q_barriers, cfg.q_stages, cfg.tile_m * cfg.head_dim),
            make(storage.k_barriers, cfg.stages, k_elements, more_bytes=cfg.scale_bytes),
            make(storage.v_barriers, cfg.stages, cfg.tile_n * cfg.head_dim_v, last=True),
            queue,
        )

    @cute.jit
    def produce(
        self, tma: Tma, tiles: Tiles, pipelines: Pipelines, problem: Problem, scheduler: Any
    ):
        """Producer warp: the loads of tile after tile, and what each tile is for the consumers.

        It finds a tile between the first loads of the one before and the others, since both the
        number, from global memory, and what follows from it take longer than consumers could wait.
        """
        q_state, k_state, tile_state = (
            pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, stages)
            for stages in (self.cfg.q_stages, self.cfg.stages, TILE_STAGES)
        )
        queue, number = pipelines.tiles, cute.arch.block_idx()[0]
        work = self.find_work(problem, scheduler, number)  # there are no more blocks than tiles
        queue.publish(tile_state, work.words(), work.own_words())
        while number < scheduler.tiles:
            following = queue.take()
            work = self.read_work(problem, queue, tile_state, Int32(0))
            q_state, k_state, v_state = self.load_first(
                tma, tiles, pipelines, problem, work, q_state, k_state
            )
            number = queue.taken(following)
            tile_state.advance()
            self.publish(problem, scheduler, queue, tile_state, number)
            k_state = self.load_others(tma, tiles, pipelines, problem, work, k_state, v_state)
        tile_state.advance()
        # All that was loaded and published has been consumed before the block counts as finished.
        pipelines.q.producer_tail(q_state)
        pipelines.k.producer_tail(k_state.clone())
        pipelines.v.producer_tail(k_state)
        queue.pipe.producer_tail(tile_state)
        queue.finish()

    @cute.jit
    def publish(
        self,
        problem: Problem,
        scheduler: Any,
        queue: TileQueue,
        state: pipeline.PipelineState,
        number: Int32,
    ):
        """Tell the consumers, and the producer itself, what the tile of a number is."""
        if number < scheduler.tiles:
            work = self.find_work(problem, scheduler, number)
            queue.publish(state, work.words(), work.own_words())
        else:
            queue.publish(state, [Int32(NO_MORE)])

    @cute.jit
    def load_first(
        self,
        tma: Tma,
        tiles: Tiles,
        pipelines: Pipelines,
        problem: Problem,
        work: Work,
        q_state: pipeline.PipelineState,
        k_state: pipeline.PipelineState,
    ):
        """K(last), Q, K(last - 1), V(last): what consumers begin with; the states of Q, K and V.

        Q is loaded for a tile without keys, too: its buffer is where O is staged.
        """
        (sQ, gQ), (sK, gK), (sV, gV) = self.views(tma, tiles, problem, work)
        keep, drop = self.hints()
        k, last, v_state = pipelines.k, work.end - 1, k_state.clone()
        if last >= work.first:
            load_stage(k, k_state, tma.k.atom, gK[None, last], sK, keep)
            self.load_scales(problem, work, tiles, k, k_state, last)
            k_state.advance()
        if self.group(problem) == 1:
            load_stage(pipelines.q, q_state, tma.q.atom, gQ, sQ, drop)
            q_state.advance()
        if last > work.first:
            load_stage(k, k_state, tma.k.atom, gK[None, last - 1], sK, keep)
            self.load_scales(problem, work, tiles, k, k_state, last - 1)
            k_state.advance()
        if last >= work.first:
            load_stage(pipelines.v, v_state, tma.v.atom, gV[None, last], sV, keep)
            v_state.advance()
        return q_state, k_state, v_state

    @cute.jit
    def load_others(
        self,
        tma: Tma,
        tiles: Tiles,
        pipelines: Pipelines,
        problem: Problem,
        work: Work,
        k_state: pipeline.PipelineState,
        v_state: pipeline.PipelineState,
    ):
        """K(j), V(j + 1) downwards, then V(first); the state of K, and of V."""
        _, (sK, gK), (sV, gV) = self.views(tma, tiles, problem, work)
        keep, _ = self.hints()
        k, v, last = pipelines.k, pipelines.v, work.end - 1
        for i in cutlass.range(last - 1 - work.first, unroll=1):
            load_stage(k, k_state, tma.k.atom, gK[None, last - 2 - i], sK, keep)
            self.load_scales(problem, work, tiles, k, k_state, last - 2 - i)
            k_state.advance()
            load_stage(v, v_state, tma.v.atom, gV[None, last - 1 - i], sV, keep)
            v_state.advance()
        if last > work.first:
            load_stage(v, v_state, tma.v.atom, gV[None, work.first], sV, keep)
        return k_state

    def hints(self) -> tuple[L2Hint | None, L2Hint | None]:
        """Return those of K and V, which other tiles read again, and of Q."""
        return (L2Hint.EVICT_LAST, L2Hint.EVICT_FIRST) if self.cfg.l2_hints else (None, None)

    def views(self, tma: Tma, tiles: Tiles, problem: Problem, work: Work) -> tuple:
        """Return of Q, K and V: (stages in shared memory, the tile or its blocks in global one)."""
        cfg, queries, keys, head_kv = self.cfg, work.queries, work.keys, work.head_kv
        mQ = tma.q.tma_tensor[None, None, work.tile.head, queries.batch]
        mK = tma.k.tma_tensor[None, None, head_kv, keys.batch]
        mV = tma.v.tma_tensor[None, None, head_kv, keys.batch]
        mQ = cute.domain_offset((queries.offset, 0), mQ)
        mK = cute.domain_offset((keys.offset, 0), mK)
        mV = cute.domain_offset((0, self.values_offset(problem, work)), mV)
        gQ = cute.local_tile(mQ, (cfg.tile_m, cfg.head_dim), (work.tile.m_block, 0))
        gK = cute.local_tile(mK, (cfg.tile_n, cfg.head_dim), (None, 0))
        gV = cute.local_tile(mV, (cfg.head_dim_v, cfg.tile_n), (0, None))
        return tuple(
            partition(info, shared, part)
            for info, shared, part in (
                (tma.q, tiles.q, gQ), (tma.k, tiles.k, gK), (tma.v, tiles.v, gV)
            )
        )  # fmt: skip

    @cute.jit
    def consume(
        self,
        mmas: Mmas,
        tma_o: cpasync.TmaInfo,
        tensors: Tensors,
        tiles: Tiles,
        pipelines: Pipelines,
        problem: Problem,
        v_start: cute.Pointer,
        ping_pong: PingPong | NoPingPong,
    ):
        """Consumer warpgroup: 64 rows of S, softmax and O, tile after tile."""
        cfg = self.cfg
        # Descriptors from the warpgroup's first thread: warp-uniform, so in uniform registers.
        first = consumer_warpgroup() * 128
        uniform_qk, uniform_pv = mmas.qk.get_slice(first), mmas.pv.get_slice(first)
        shape_s = mmas.qk.partition_shape_C((cfg.tile_m, cfg.tile_n))
        shape_o = mmas.pv.partition_shape_C((cfg.tile_m, cfg.head_dim_v))
        acc_s = cute.make_rmem_tensor(shape_s, Float32)
        accumulators = self.accumulators(shape_o)
        fragments = Fragments(
            q=wgmma.Operand.of(uniform_qk.partition_A(tiles.q)),
            k=wgmma.Operand.of(uniform_qk.partition_B(tiles.k)),
            v=wgmma.Operand.of(uniform_pv.partition_B(tiles.v)),
            p=self.fragment_p(acc_s),
            acc_s=acc_s,
            acc_o=accumulators.o,
            acc_total=accumulators.total,
            acc_pv=accumulators.pv,
        )
        softmax = self.statistics(problem)
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, cfg.stages)
        queue, count = pipelines.tiles, Int32(0)
        late = Boolean(False)  # whether the Q of the tile before is still to be released
        queue.pipe.consumer_wait(state_after(count, TILE_STAGES))
        while queue.read(state_after(count, TILE_STAGES), 0, 1)[0] != NO_MORE:
            q_state = state_after(count, cfg.q_stages)
            work = self.current_work(problem, queue, count)
            softmax.reset()
            fragments.acc_total.fill(0.0)
            fragments.acc_pv.fill(0.0)
            group = self.group(problem)
            if const_expr(cfg.packs_heads):
                if group != 1:
                    self.gather_queries(tensors.q, tiles.q[None, None, q_state.index], work)
            if group == 1:
                pipelines.q.consumer_wait(q_state)
            k_state = self.skip_behind(pipelines, ping_pong, v_start, work, k_state)
            if work.blocks.end > work.blocks.first:
                k_state = self.attend(
                    mmas, fragments, tiles, pipelines, softmax, ping_pong, problem, work, v_start,
                    count, k_state, late,
                )  # fmt: skip
            else:
                if late:
                    self.release_queries(pipelines.q, state_after(count - 1, cfg.q_stages))
                softmax.finish(self.read_sinks(mmas, problem, work))

            # Looked up again, and not kept in registers that the main loop needs.
            work, q_state = (
                self.current_work(problem, queue, count),
                state_after(count, cfg.q_stages),
            )
            self.output.store_lse(softmax.lse, tensors.lse, mmas, work)
            sO = tiles.o[None, None, q_state.index if cfg.output_over_q else 0]
            self.output.store(fragments.acc_o, mmas.pv, sO, tma_o, tensors.o, problem, work)
            if const_expr(cfg.releases_late):
                late = group == 1
            elif group == 1:
                self.release_queries(pipelines.q, q_state)
            queue.release(state_after(count, TILE_STAGES))
            count += 1
            queue.pipe.consumer_wait(state_after(count, TILE_STAGES))
        queue.release(state_after(count, TILE_STAGES))
        if late:
            self.release_queries(pipelines.q, state_after(count - 1, cfg.q_stages))
        if const_expr(not cfg.output_over_q):  # else the last release has waited
            self.output.finish()  # shared memory is not the block's any more when it ends

    @cute.jit
    def skip_behind(
        self,
        pipelines: Pipelines,
        ping_pong: PingPong | NoPingPong,
        v_start: cute.Pointer,
        work: Work,
        k_state: pipeline.PipelineState,
    ):
        """The tile's last blocks, where tiles begin, if none of this consumer's rows sees them.

        So it is under a causal mask, and with rows behind the last query.
        """
        behind = work.end - work.blocks.end
        if const_expr(self.cfg.varlen):
            if behind > 0:  # else `attend` does this
                valid = work.keys.length - (work.end - 1) * self.cfg.tile_n
                self.zero_fill_rows(pipelines.v, k_state, v_start, valid)
        return self.skip(pipelines, ping_pong, work.blocks, behind, k_state)

    @cute.jit
    def skip(
        self,
        pipelines: Pipelines,
        ping_pong: PingPong | NoPingPong,
        own: BlockRange,
        count: Int32,
        k_state: pipeline.PipelineState,
    ):
        """Release so many of the tile's blocks unread, each in this consumer's turn.

        A tile's first block is attended to without a turn; if none is, the first that is skipped
        stands for it.  (Where it is known that one is, this is tested all the same: without it
        ptxas keeps no stage in uniform registers, 73 instructions a block of a local mask.)
        """
        attends, pass_turn = own.end > own.first, ping_pong.pass_turn
        for i in cutlass.range(opaque(count), unroll=1):
            if i > 0 or attends:
                pass_turn()
            for pipe in (pipelines.k, pipelines.v):
                pipe.consumer_wait(k_state)
                pipe.consumer_release(k_state)
            k_state.advance()
        return k_state

    @cute.jit
    def attend(
        self,
        mmas: Mmas,
        fragments: Fragments,
        tiles: Tiles,
        pipelines: Pipelines,
        softmax: OnlineSoftmax,
        ping_pong: PingPong | NoPingPong,
        problem: Problem,
        work: Work,
        v_start: cute.Pointer,
        count: Int32,
        k_state: pipeline.PipelineState,
        late: Boolean,
    ):
        """All key blocks, last to first; leaves the normalised O in acc_o, the LSE in softmax.

        `late`: the Q of the tile before is still to be released.
        Returns the state of K, and of V, behind the last block.
        """
        cfg, blocks, acc_s, acc_o = self.cfg, work.blocks, fragments.acc_s, fragments.acc_o
        v_state = k_state.clone()  # one block behind: V uses the stage that K used before
        q_block = fragments.q.stage(state_after(count, cfg.q_stages).index)
        mask_range = self.mask_range(problem, work.queries, work.keys)
        coordinates = coordinates_of(mmas.qk, (cfg.tile_m, cfg.tile_n))
        mask = Mask(mask_range, coordinates, work.rows, cfg.tile_n)

        last = blocks.end - 1
        scales = self.scales(tiles, problem, work)
        pipelines.k.consumer_wait(k_state)
        k_block = fragments.k.stage(k_state.index)
        wgmma.issue(acc_s, q_block, k_block, accumulate=False)
        if late:
            self.release_queries(pipelines.q, state_after(count - 1, cfg.q_stages))
        of_block = self.read_scales(scales, k_state.index, last)
        warpgroup.wait_group(0)
        pin(acc_s)
        groups = self.scale_groups(problem, scales, of_block)
        pipelines.k.consumer_release(k_state)
        scores = self.masked_scores(acc_s, problem, groups, mask, last)
        softmax.begin(softmax.maxima(scores, groups, masked=True))
        k_state.advance()
        softmax.exponentiate(scores, groups, first=True)
        fragments.p.convert(acc_s)
        if const_expr(cfg.varlen):
            self.zero_fill_rows(pipelines.v, v_state, v_start, work.keys.length - last * cfg.tile_n)

        step = partial(
            self.step, fragments, q_block, pipelines, softmax, ping_pong, problem, scales
        )
        unmasked_end = minimum(blocks.unmasked_end, last)
        unmasked_first = minimum(blocks.unmasked_first, last)
        if const_expr(cfg.mask != "full"):
            for i in cutlass.range(opaque(last - unmasked_end), unroll=1):
                k_state, v_state = step(k_state, v_state, mask, last - 1 - i)
        for i in cutlass.range(opaque(unmasked_end - unmasked_first), unroll=1):
            k_state, v_state = step(k_state, v_state, None, unmasked_end - 1 - i)
        if const_expr(cfg.mask == "local"):
            blocks = self.current_work(problem, pipelines.tiles, count).blocks
            for i in cutlass.range(opaque(unmasked_first - blocks.first), unroll=1):
                k_state, v_state = step(k_state, v_state, mask, unmasked_first - 1 - i)

        pipelines.v.consumer_wait(v_state)
        self.issue_pv(fragments, fragments.v.stage(v_state.index), problem, blocks.first)
        work = self.current_work(problem, pipelines.tiles, count)
        if const_expr(cfg.sums_in_mma):
            self.wait_pv(fragments, problem, Int32(0))
            self.take_sums(fragments, softmax)
        factors = softmax.finish(self.read_sinks(mmas, problem, work))
        if const_expr(not cfg.sums_in_mma):
            self.wait_pv(fragments, problem, Int32(0))
        pipelines.v.consumer_release(v_state)
        if const_expr(cfg.mask == "local"):
            before = work.blocks.first - work.first
            k_state = self.skip(pipelines, ping_pong, work.blocks, before, k_state)
        self.descale_output(factors, problem, work)
        scale_rows(rows_and_columns(acc_o), factors)
        return k_state

    @cute.jit
    def step(
        self,
        fragments: Fragments,
        q_block: cute.Tensor,
        pipelines: Pipelines,
        softmax: OnlineSoftmax,
        ping_pong: PingPong | NoPingPong,
        problem: Problem,
        scales: Any,
        k_state: pipeline.PipelineState,
        v_state: pipeline.PipelineState,
        mask: Optional[Mask],
        n_block: Int32,
    ):
        """S and softmax of one key block beside O += P V of the block before; states advanced."""
        acc_s, masked = fragments.acc_s, mask is not None
        k_block = fragments.k.stage(k_state.index)
        v_block = fragments.v.stage(v_state.index)
        k_ready = pipelines.k.consumer_try_wait(k_state)  # beside V's: either takes a while
        v_ready = pipelines.v.consumer_try_wait(v_state)
        pipelines.k.consumer_wait(k_state, k_ready)
        ping_pong.wait()
        of_block = self.read_scales(scales, k_state.index, n_block)
        wgmma.issue(acc_s, q_block, k_block, accumulate=False)
        pipelines.v.consumer_wait(v_state, v_ready)
        self.issue_pv(fragments, v_block, problem, n_block + 1)
        ping_pong.signal()
        warpgroup.wait_group(1)
        pin(acc_s)
        groups = self.scale_groups(problem, scales, of_block)
        pipelines.k.consumer_release(k_state)
        scores = self.masked_scores(acc_s, problem, groups, mask, n_block)
        maxima = softmax.maxima(scores, groups, masked)
        factors, grown = cute.make_rmem_tensor_like(maxima), softmax.exceeded_by(maxima, masked)
        if grown:
            softmax.raise_to(maxima, factors, scores, groups, masked)
        softmax.exponentiate(scores, groups, first=False)
        self.wait_pv(fragments, problem, n_block + 1)
        pipelines.v.consumer_release(v_state)
        fragments.p.convert(acc_s)
        if grown:
            self.rescale(fragments, factors)
        following = k_state.clone()
        following.advance()
        return following, k_state

    @cute.jit
    def issue_pv(
        self, fragments: Fragments, v_block: wgmma.Operand, problem: Problem, n_block: Int32
    ):
        wgmma.issue(fragments.acc_pv, fragments.p, v_block, accumulate=True)

    @cute.jit
    def wait_pv(self, fragments: Fragments, problem: Problem, n_block: Int32):
        """Waits for the last group, P V of `n_block`; O has it then."""
        warpgroup.wait_group(0)
        pin(fragments.acc_pv)

    @cute.jit
    def rescale(self, fragments: Fragments, factors: cute.Tensor):
        """Rescale the sums so far, when a maximum has grown."""
        scale_rows(rows_and_columns(fragments.acc_o), factors)

    @cute.jit
    def masked_scores(
        self,
        acc_s: cute.Tensor,
        problem: Problem,
        groups: tuple[ScaleGroup, ...],
        mask: Optional[Mask],
        n_block: Int32,
    ) -> cute.Tensor:
        """S of one key block, capped and masked in place, as (rows, columns)."""
        scores = rows_and_columns(acc_s)
        if const_expr(self.cfg.softcap):
            for group in groups:
                cap(group.of(scores), group.inner, problem.softcap[1])
        if const_expr(mask is not None):
            mask.apply(scores, n_block)
        return scores

    @cute.jit
    def zero_fill_rows(
        self, pipe, state: pipeline.PipelineState, v_start: cute.Pointer, valid: Int32
    ):
        """Rows of a stage of V behind the last key, of which P is 0."""
        cfg = self.cfg
        tile = (cfg.tile_n, cfg.head_dim_v)
        if valid < cfg.tile_n:
            pipe.consumer_wait(state)
            start = v_start + state.index * (tile[0] * tile[1])
            thread, threads = cute.arch.thread_idx()[0] - 128, 128 * cfg.warpgroups
            zero_fill_rows(
                start, tile, self.output.span, valid, thread, threads, NamedBarrier.CONSUMERS
            )

    @cute.jit
    def read_sinks(self, mmas: Mmas, problem: Problem, work: Work) -> cute.Tensor:
        """(rows,) scores of the sinks of this thread's rows, in the exp2 domain; -inf: none."""
        sinks_log2 = cute.make_rmem_tensor((2,), Float32)
        sinks_log2.fill(-Float32.inf)
        if problem.sink != 0:
            coordinates = coordinates_of(mmas.qk, (self.cfg.tile_m, self.cfg.tile_n))
            for i in cutlass.range_constexpr(2):
                head = work.rows.head(coordinates[i, 0][0])
                sinks_log2[i] = read(Float32, problem.sink, head) * LOG2_E
        return sinks_log2

    @cute.jit
    def release_queries(self, pipe, state: pipeline.PipelineState):
        """Each warp releases Q when the store of the O that it staged there has read it."""
        if const_expr(self.cfg.output_over_q):
            self.output.finish()
        pipe.consumer_release(state)

    def group(self, problem: Problem) -> Int32:
        """Heads that share tiles; where there is one, TMA loads and stores them."""
        return problem.group if self.cfg.packs_heads else Int32(1)

    @cute.jit
    def gather_queries(self, mQ: cute.Tensor, sQ: cute.Tensor, work: Work):
        """Rows of a group's heads to where TMA would put a tile of Q; each warp its own 16."""
        cfg = self.cfg
        warpgroup_threads = partial(
            cute.arch.barrier,
            barrier_id=NamedBarrier.QUERIES + consumer_warpgroup(),
            number_of_threads=128,
        )
        warpgroup_threads()  # the GEMMs that read the tile before are done
        chunks = cfg.head_dim // 8  # of 16 bytes
        first_row = 16 * (cute.arch.make_warp_uniform(cute.arch.warp_idx()) - 4)
        vectors = cute.zipped_divide(sQ, (1, 8))
        lane = opaque(cute.arch.lane_idx())  # as `consumer_thread`
        for start in cutlass.range_constexpr(0, 16 * chunks, 32 * GATHERS):
            places = [start + 32 * i for i in range(GATHERS) if start + 32 * i < 16 * chunks]
            places = [place + lane for place in places]
            places = [(first_row + place // chunks, place % chunks) for place in places]
            loaded = [self.load_query(mQ, work, row, 8 * chunk) for row, chunk in places]
            for place, values in zip(places, loaded):
                cute.autovec_copy(values, vectors[(None, place)])
        cute.arch.fence_proxy("async.shared", space="cta")
        warpgroup_threads()

    @cute.jit
    def load_query(self, mQ: cute.Tensor, work: Work, row: Int32, column: Int32) -> cute.Tensor:
        """16 bytes of a tile's row, zeros where there are none."""
        queries, position = work.queries, work.rows.position(row)
        values = cute.make_rmem_tensor((8,), self.dtype)
        values.fill(0.0)
        if position < queries.length and column < mQ.shape[1]:
            gQ = mQ[queries.offset + position, None, work.rows.head(row), queries.batch]
            place = (gQ.iterator + column).align(16)
            cute.autovec_copy(cute.make_tensor(place, cute.make_layout(8)), values)
        return values
