"""Backward attention on sm_80 and later: dK, dV and the sum that becomes dQ.

The maths is hopper/backward/kernel.py's, and so are the arguments; the structure is
FlashAttention-2's (arXiv 2307.08691, section 3.2).  A block takes `tile_n` keys of one key head,
and for every query head of its group the blocks of `tile_m` query rows that see them: dK and dV
stay in registers over all of these, so grouped heads cost no workspace and no atomics.  dQ is
summed over the key blocks in a float32 workspace (dq_bands.py).
cute_kernels/backward/preprocess.py goes before, postprocess.py after.  Everything but types and
tile is decided at run time, as in forward.py.

Layouts    Q, dO (batch, seqlen_q, heads, d); K, V, dK, dV (batch, seqlen_k, heads_kv, d); 16 bits,
           last dimension contiguous, other strides any multiple of 16 bytes.

Warps      Of every GEMM each has some rows and some columns (config.py):

             S^T = K Q^T, dP^T = V dO^T    keys by queries
             dV += P^T dO, dK += dS^T Q    keys by columns of the head
             dQ = dS K                     queries by columns of the head

           P^T and dS^T go through shared memory.  Were they A operands in registers, as Hopper's,
           a warp would need all columns of dK and dV of 16 keys, 256 registers where heads have
           256, and with only 16 rows to use it for, shared memory would deliver B more slowly than
           tensor cores take it.

Timeline   of query block i, with two stages of Q and dO; with one, i + 1 is loaded after dK(i)

             wait Q(i), dO(i), all warps | load Q(i+1), dO(i+1)
             S, P = exp | dP, dS | store P, dS
             all warps | dV += P^T dO | dK += dS^T Q | dQ = dS K, add to the workspace

Order      With a semaphore (one counter a block of dQ) key blocks add to dQ in ascending order, and
           the result has the same bits every time.  Blocks start in ascending order, so
           that whoever waits, waits for a block that has started.

Masks      Which queries see a key is found once, by one thread a key, and kept in shared memory.

Shared memory: Q and dO with stages, K, V, P^T, dS^T (shared_tile.py); LSE and delta with stages;
begin and end of who sees each key.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_tensor
from cutlass.memory import SmemAllocator
from hopper_attention.cute_kernels.ampere import dq_bands
from hopper_attention.cute_kernels.ampere.config import AmpereBackwardConfig
from hopper_attention.cute_kernels.ampere.forward import Limits
from hopper_attention.cute_kernels.ampere.mma import (
    Coordinates,
    PartCoordinates,
    SharedA,
    SharedB,
    accumulator,
    gemm,
)
from hopper_attention.cute_kernels.ampere.row_store import store_rounded
from hopper_attention.cute_kernels.ampere.shared_tile import (
    Lanes,
    SharedTile,
    TileCopy,
    copy_chunk,
    split,
    store_word,
)
from hopper_attention.cute_kernels.backward import workspace
from hopper_attention.cute_kernels.backward.dq_semaphore import DqSemaphore
from hopper_attention.cute_kernels.backward.row_order import RowOrder
from hopper_attention.cute_kernels.backward.scores import Scores
from hopper_attention.cute_kernels.masks.apply import Mask
from hopper_attention.cute_kernels.masks.visible_range import BlockRange, MaskRange
from hopper_attention.cute_kernels.primitives.arguments import (
    BackwardOperands,
    SequenceAddresses,
    Window,
    WorkspaceStatistics,
    example,
)
from hopper_attention.cute_kernels.primitives.arithmetic import ceil_div, maximum, minimum, select
from hopper_attention.cute_kernels.primitives.fragments import (
    PackedFragment,
    opaque,
    rows_and_columns,
)
from hopper_attention.cute_kernels.primitives.types import DTYPES, row_statistics, strided
from hopper_attention.cute_kernels.scheduling.sequence import Lengths, Sequence, TileRows
from hopper_attention.cute_kernels.scheduling.tile_scheduler import DenseScheduler, VarlenScheduler
from hopper_attention.cute_kernels.softmax.online import LOG2_E, cap


@dataclass(frozen=True)
class Tensors:
    """Tensors as they are passed: (batch, row, head, column); LSE, delta and dQ: workspace.py."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    do: cute.Tensor
    lse: cute.Tensor
    delta: cute.Tensor
    dq: cute.Tensor
    """(entries, heads, blocks of tile_m rows, their elements)"""
    dk: cute.Tensor
    dv: cute.Tensor


@dataclass(frozen=True)
class Problem:
    """Everything that is known of the launch."""

    dense: DenseScheduler
    packed: VarlenScheduler
    """Which of the two: `varlen`."""
    varlen: Int32
    queries: Lengths
    keys: Lengths
    group: Int32
    """Query heads of a key head."""
    scale: Float32
    """softmax_scale."""
    scale_log2: Float32
    """The factor of the scores that exp sees: after softcap if there is one."""
    cap_inner: Float32
    """The inner factor of `softmax.online.cap`."""
    cap_outer: Float32
    """0: there is no softcap."""
    window: tuple
    """(left, right, chunk) of `MaskRange`."""
    dq_semaphore: DqSemaphore


@dataclass(frozen=True)
class Work:
    """One block: its keys, and the rows that see them."""

    n_block: Int32
    head_kv: Int32
    workspace_row: Int32
    """The workspace's row at which the sequence starts."""
    shift: Int32
    """The shift of `RowOrder`."""
    queries: Sequence
    keys: Sequence
    blocks: BlockRange

    @property
    def order(self) -> RowOrder:
        return RowOrder(self.blocks, self.shift)

    def to_words(self) -> list[Int32]:
        """Return what `from_words` reads: integers to be kept in shared memory."""
        parts = (self.queries, self.keys, self.blocks)
        numbers = (self.n_block, self.head_kv, self.workspace_row, self.shift)
        return [Int32(n) for n in (*numbers, *(n for part in parts for n in vars(part).values()))]

    @staticmethod
    def from_words(words: cute.Tensor) -> "Work":
        """Return the work that was saved, looked up again: the loop needs the registers."""
        numbers = [words[i] for i in range(WORDS)]
        return Work(
            *numbers[:4], Sequence(*numbers[4:7]), Sequence(*numbers[7:10]),
            BlockRange(*numbers[10:]),
        )  # fmt: skip


WORDS = 14


@dataclass(frozen=True)
class Visit:
    """One block of query rows, of all heads of the group."""

    number: Int32
    head: Int32
    step: Int32
    """The step of `RowOrder`."""

    def following(self, count: Int32) -> "Visit":
        last = self.step + 1 == count
        step = select(last, 0, self.step + 1)
        return Visit(self.number + 1, self.head + select(last, 1, 0), step)


@dataclass(frozen=True)
class SmemAddresses:
    """Addresses of the block in shared memory."""

    shared: Int32
    """Address of its beginning."""
    statistics: cute.Tensor
    """(tile_m, 2, stages): LSE and delta."""
    limits: cute.Tensor
    """(tile_n, 2): begin and end of who sees each key."""
    work: cute.Tensor
    """The block's `Work`, packed."""


class AmpereBackward:
    """The kernel of one `AmpereBackwardConfig`."""

    def __init__(self, config: AmpereBackwardConfig):
        self.cfg = cfg = config
        self.dtype = DTYPES[cfg.dtype]
        self.q = SharedTile(0, cfg.tile_m, cfg.head_dim)
        self.do = SharedTile(self.q.end, cfg.tile_m, cfg.head_dim_v)
        assert self.do.end == cfg.stage_bytes
        self.k = SharedTile(cfg.stages * cfg.stage_bytes, cfg.tile_n, cfg.head_dim)
        self.v = SharedTile(self.k.end, cfg.tile_n, cfg.head_dim_v)
        self.p = SharedTile(self.v.end, cfg.tile_n, cfg.tile_m)
        self.ds = SharedTile(self.p.end, cfg.tile_n, cfg.tile_m)
        statistics = 8 * cfg.tile_m * cfg.stages
        assert self.ds.end + statistics + 8 * cfg.tile_n + 4 * WORDS <= cfg.shared_memory_bytes

    def example_arguments(self) -> tuple:
        """Arguments that `__call__` is compiled for, without the stream."""
        shape = tuple(cute.sym_int32() for _ in range(3)) + (self.cfg.tile_m * self.cfg.head_dim,)
        stride = (*(cute.sym_int64(divisibility=4) for _ in range(3)), 1)
        dq = make_fake_tensor(Float32, shape, stride, assumed_align=16)
        return (
            example(BackwardOperands, lambda: strided(self.dtype, 4)),
            example(WorkspaceStatistics, lambda: row_statistics(4)),
            dq,
            Float32(1.0),
            Float32(0.0),
            example(Window, lambda: Int32(1)),
            example(SequenceAddresses, lambda: Int64(0)),
            Int32(1),
            Int32(0),
            Int64(0),
        )

    @cute.jit
    def __call__(
        self,
        operands: BackwardOperands,
        statistics: WorkspaceStatistics,
        dq_workspace: cute.Tensor,
        softmax_scale: Float32,
        softcap: Float32,
        window: Window,
        addresses: SequenceAddresses,
        num_sequences: Int32,
        varlen: Int32,
        dq_semaphore: Int64,
        stream: cuda.CUstream,
    ):
        cfg = self.cfg
        mQ, mK, mV, mdO, mdK, mdV = operands
        _, seqlen_q, heads, _ = mQ.shape
        entries, seqlen_k, heads_kv, _ = mK.shape
        group = heads // heads_kv
        keys = Lengths(addresses.cu_seqlens_k, addresses.seqused_k, seqlen_k)
        row_bytes = 2 * (cfg.head_dim + cfg.head_dim_v) + 4 * cfg.head_dim
        dense = DenseScheduler.create(
            seqlen_k, seqlen_q * group, heads_kv, heads_kv, entries, cfg.tile_n, row_bytes
        )
        rows = entries * seqlen_k
        packed = VarlenScheduler(keys, num_sequences, heads_kv, rows, cfg.tile_n)
        capped = softcap > 0.0
        problem = Problem(
            dense=dense,
            packed=packed,
            varlen=varlen,
            queries=Lengths(addresses.cu_seqlens_q, addresses.seqused_q, seqlen_q),
            keys=keys,
            group=group,
            scale=softmax_scale,
            scale_log2=LOG2_E * (Float32(1.0) if capped else softmax_scale),
            cap_inner=(2.0 * LOG2_E * softmax_scale / softcap) if capped else Float32(0.0),
            cap_outer=softcap,
            window=window,
            dq_semaphore=DqSemaphore(dq_semaphore, heads, dq_workspace.shape[2]),
        )
        tensors = Tensors(mQ, mK, mV, mdO, *statistics, dq_workspace, mdK, mdV)
        self.kernel(tensors, problem).launch(
            grid=[packed.tiles if varlen != 0 else dense.tiles, 1, 1],
            block=[cfg.threads, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, tensors: Tensors, problem: Problem):
        cfg = self.cfg
        start = SmemAllocator().allocate(cfg.shared_memory_bytes, 1024)
        statistics = cute.make_tensor(
            cute.recast_ptr(start + self.ds.end, dtype=Float32),
            cute.make_layout((cfg.tile_m, 2, cfg.stages)),
        )
        limits = cute.make_tensor(
            cute.recast_ptr(statistics.iterator + cute.size(statistics), dtype=Int32),
            cute.make_layout((cfg.tile_n, 2), stride=(2, 1)),
        )
        words = cute.make_tensor(limits.iterator + cute.size(limits), cute.make_layout(WORDS))
        smem = SmemAddresses(Int32(start.toint()), statistics, limits, words)
        self.save_to_smem(problem, self.find_work(problem), smem)
        acc_dk, acc_dv = (
            accumulator(cfg.tile_n // cfg.key_warps[0], columns // cfg.key_warps[1])
            for columns in (cfg.head_dim, cfg.head_dim_v)
        )
        acc_dk.fill(0.0)
        acc_dv.fill(0.0)
        visits = Work.from_words(words).order.count * problem.group
        if visits > 0:
            visit = Visit(Int32(0), Work.from_words(words).head_kv * problem.group, Int32(0))
            self.begin(tensors, smem, visit)
            while visit.number < visits:
                visit = self.step(tensors, problem, smem, visit, visits, acc_dk, acc_dv)
        self.store(tensors, problem, Work.from_words(words), acc_dk, acc_dv)

    @cute.jit
    def find_work(self, problem: Problem) -> Work:
        """Every warp finds the block's work."""
        cfg = self.cfg
        number = cute.arch.block_idx()[0]
        m_block, head, batch, exists = Int32(0), Int32(0), Int32(0), Boolean(True)
        if problem.varlen != 0:
            tile = problem.packed.tile(number)
            exists = tile.batch < problem.packed.batch
            m_block, head = tile.m_block, tile.head
            batch = minimum(tile.batch, problem.packed.batch - 1)
        else:
            tile = problem.dense.tile(number)
            m_block, head, batch = tile.m_block, tile.head, tile.batch
        queries, keys = problem.queries.of(batch), problem.keys.of(batch)
        # First keys first; not below 0 for a number left over, whatever sequence it looks at.
        n_block = maximum(ceil_div(keys.length, cfg.tile_n) - 1 - m_block, 0)
        keys = Sequence(keys.batch, keys.offset, select(exists, keys.length, 0))
        transposed = self.mask_range(problem, queries, keys).transposed
        blocks = BlockRange.of_keys(transposed, n_block, cfg.tile_n, cfg.tile_m)
        end = select(keys.length > 0, blocks.end, blocks.first)
        blocks = BlockRange(
            blocks.first, end, minimum(blocks.unmasked_first, end),
            minimum(blocks.unmasked_end, end),
        )  # fmt: skip
        unmasked = maximum(blocks.unmasked_end - blocks.unmasked_first, 1)
        shift = n_block * (cfg.tile_n // cfg.tile_m) % unmasked
        shift = select(problem.dq_semaphore.address == 0, shift, 0)
        row = workspace.first_row(problem.queries.cu_seqlens != 0, queries, batch)
        return Work(n_block, head, row, shift, queries, keys, blocks)

    def mask_range(self, problem: Problem, queries: Sequence, keys: Sequence) -> MaskRange:
        return MaskRange("local", queries.length, keys.length, *problem.window)

    @cute.jit
    def save_to_smem(self, problem: Problem, work: Work, smem: SmemAddresses):
        """Write to shared memory what is looked up later."""
        thread = cute.arch.thread_idx()[0]
        if thread == 0:
            for i, word in enumerate(work.to_words()):
                smem.work[i] = word
        if thread < self.cfg.tile_n:
            transposed = self.mask_range(problem, work.queries, work.keys).transposed
            key = work.n_block * self.cfg.tile_n + thread
            smem.limits[thread, 0] = transposed.begin(key)
            smem.limits[thread, 1] = transposed.end(key)
        cute.arch.sync_threads()

    @cute.jit
    def begin(self, tensors: Tensors, smem: SmemAddresses, visit: Visit):
        """The first loads."""
        work = Work.from_words(smem.work)
        first_key = work.n_block * self.cfg.tile_n
        for tensor, tile in ((tensors.k, self.k), (tensors.v, self.v)):
            self.load(tensor, tile, work.keys, work.head_kv, first_key, smem.shared)
        self.load_queries(tensors, work, smem, visit)

    def stage(self, visit: Visit):
        return visit.number & 1 if self.cfg.stages == 2 else 0

    @cute.jit
    def load_queries(self, tensors: Tensors, work: Work, smem: SmemAddresses, visit: Visit):
        """Q, dO, LSE and delta of one block, as one group of cp.async."""
        cfg, queries, stage = self.cfg, work.queries, self.stage(visit)
        first_row = work.order.block(visit.step) * cfg.tile_m
        shared = smem.shared + stage * cfg.stage_bytes
        for tensor, tile in ((tensors.q, self.q), (tensors.do, self.do)):
            self.load(tensor, tile, queries, visit.head, first_row, shared)
        # One thread 4 rows: first all of LSE, then all of delta.
        quads = cfg.tile_m // 4
        which, quad = split(cute.arch.thread_idx()[0], quads)
        row = work.workspace_row + first_row + 4 * quad
        target = smem.shared + self.ds.end + 16 * (quad + quads * (which + 2 * stage))
        for number, saved in enumerate((tensors.lse, tensors.delta)):
            source = (saved[queries.batch, visit.head, None].iterator + row).toint()
            copy_chunk(target, 0, source, 0, which == number)
        cute.arch.cp_async_commit_group()

    def load(self, tensor, tile: SharedTile, sequence: Sequence, head, first_row, shared) -> None:
        """A tile's rows from `first_row` of the sequence; zeros for what does not exist."""
        copy, thread = TileCopy(tile, self.cfg.threads), cute.arch.thread_idx()[0]
        row = first_row + copy.row(thread, 0)
        line = tensor[sequence.batch, sequence.offset + row, head, None]
        source = (line.iterator + copy.column(thread, 0)).toint()
        columns = copy.columns(thread, tensor.shape[3])
        target = shared + copy.place(thread)
        for step in range(copy.row_steps):
            present = row + step * copy.rows_at_once < sequence.length
            copy.copy(target, step, source, columns, present)
            source = source + Int64(tensor.stride[1]) * (2 * copy.rows_at_once)

    @cute.jit
    def step(
        self,
        tensors: Tensors,
        problem: Problem,
        smem: SmemAddresses,
        visit: Visit,
        visits: Int32,
        acc_dk: cute.Tensor,
        acc_dv: cute.Tensor,
    ):
        """One block of query rows; the next one."""
        cfg = self.cfg
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_threads()  # Q and dO are there; the other stage, P and dS are free
        work = Work.from_words(smem.work)
        following = visit.following(work.order.count)
        if const_expr(cfg.stages == 2):
            if following.number < visits:
                self.load_queries(tensors, work, smem, following)
        self.score(problem, work.order, smem, visit)
        cute.arch.sync_threads()  # P and dS are there
        queries = smem.shared + self.stage(visit) * cfg.stage_bytes
        for acc, a, b in ((acc_dv, self.p, self.do), (acc_dk, self.ds, self.q)):
            self.add_of_keys(acc, a, b, smem.shared, queries)
        if const_expr(cfg.stages == 1):
            cute.arch.sync_threads()  # Q and dO are free
            if following.number < visits:
                self.load_queries(tensors, Work.from_words(smem.work), smem, following)
        self.add_dq(tensors, problem, Work.from_words(smem.work), smem, visit)
        return following

    @cute.jit
    def score(self, problem: Problem, order: RowOrder, smem: SmemAddresses, visit: Visit):
        """P and dS of this warp's keys and queries, into shared memory."""
        cfg, stage, span = self.cfg, self.stage(visit), self.cfg.span
        warps_k, warps_q = cfg.score_warps
        warp, lane = self.warp(), cute.arch.lane_idx()
        keys, queries = cfg.tile_n // warps_k, cfg.tile_m // warps_q
        key, query = warp // warps_q * keys, warp % warps_q * queries
        coordinates = Coordinates(key, opaque(lane), query)
        of_keys = smem.shared + key * 2 * span
        of_queries = smem.shared + stage * cfg.stage_bytes + query * 2 * span

        def multiply(acc, a: SharedTile, b: SharedTile, accumulate: bool):
            lanes_a = Lanes.of(of_keys, lane, span, across=False)
            lanes_b = Lanes.of(of_queries, lane, span, across=True)
            operands = SharedA(a, lanes_a), SharedB(b, lanes_b, False)
            gemm(acc, *operands, self.dtype, accumulate)

        acc_p, acc_ds = accumulator(keys, queries), accumulator(keys, queries)
        multiply(acc_p, self.k, self.q, accumulate=False)
        packed = PackedFragment.like(acc_p, self.dtype)
        p = Scores(acc_p, packed, coordinates, queries)
        scores = rows_and_columns(acc_p)
        if problem.cap_outer != 0.0:
            cap(scores, problem.cap_inner, problem.cap_outer)
        if visit.step < order.unmasked_begin or visit.step >= order.unmasked_end:
            mask = Mask(Limits(smem.limits), coordinates, TileRows(1, 0, 0), cfg.tile_m)
            mask.apply(scores, order.block(visit.step))
        capped = cute.make_rmem_tensor_like(acc_p)
        capped.store(acc_p.load())
        lse, delta = (smem.statistics[None, i, stage] for i in range(2))
        p.to_probabilities(p.load_columns(lse), problem.scale_log2)
        packed.convert(acc_p)
        self.store_scores(packed, self.p, smem.shared, coordinates)
        if problem.cap_outer != 0.0:
            p.multiply_by_slope(capped, problem.cap_outer)
        Scores(acc_ds, packed, coordinates, queries).start_with(delta)
        multiply(acc_ds, self.v, self.do, accumulate=True)
        for i in cutlass.range_constexpr(cute.size(acc_ds)):
            acc_ds[i] = acc_p[i] * acc_ds[i]
        packed.convert(acc_ds)
        self.store_scores(packed, self.ds, smem.shared, coordinates)

    def store_scores(
        self, packed: PackedFragment, tile: SharedTile, shared: Int32, coordinates: Coordinates
    ) -> None:
        """Two queries of a key a word."""
        (_, _, column_blocks), row_blocks, _ = packed.view.shape
        row, column = coordinates[0, 0]
        chunk, within = split(column, 8)
        first = opaque(shared + tile.start + tile.place(row, chunk) + 2 * within)
        for j in range(column_blocks):
            span, inside = divmod(j, tile.span_chunks)
            address = first ^ (16 * inside)
            for i in range(2 * row_blocks):
                constant = 2 * tile.span * (8 * i + span * tile.rows)
                word = packed.words[i % 2 + 2 * (j + column_blocks * (i // 2))]
                store_word(address, constant, word)

    def add_of_keys(
        self, acc: cute.Tensor, a: SharedTile, b: SharedTile, shared: Int32, queries: Int32
    ) -> None:
        """acc += a b of this warp's keys and columns; `queries`: where stage 0 would begin."""
        (_, parts), lane = self.cfg.key_warps, cute.arch.lane_idx()
        key, part = self.keys_and_part()
        lanes_a = Lanes.of(shared + key * 2 * a.span, lane, a.span, across=False)
        column = b.first_column(part, parts)
        lanes_b = Lanes.of(queries, lane, b.span, across=False, column=column)
        gemm(acc, SharedA(a, lanes_a), SharedB(b, lanes_b, True, parts), self.dtype, True)

    @cute.jit
    def add_dq(
        self, tensors: Tensors, problem: Problem, work: Work, smem: SmemAddresses, visit: Visit
    ):
        """This warp's rows and columns of dQ = dS K, added to the workspace, in order or not."""
        cfg, (rows, parts) = self.cfg, self.cfg.query_warps
        warp, lane = self.warp(), cute.arch.lane_idx()
        query = self.ds.first_column(warp // parts, rows)
        column = self.k.first_column(warp % parts, parts)
        acc = accumulator(cfg.tile_m // rows, cfg.head_dim // parts)
        lanes_a = Lanes.of(smem.shared, lane, self.ds.span, across=True, column=query)
        lanes_b = Lanes.of(smem.shared, lane, self.k.span, across=False, column=column)
        a = SharedA(self.ds, lanes_a, True, rows)
        gemm(acc, a, SharedB(self.k, lanes_b, True, parts), self.dtype, accumulate=False)
        m_block = work.order.block(visit.step)
        row_block = work.workspace_row // cfg.tile_m + m_block
        block = (work.queries.batch, visit.head, row_block)
        start = tensors.dq[(*block, None)].iterator.toint()
        start += dq_bands.block_place(query, column, cfg.head_dim) + 4 * lane
        thread, semaphore = cute.arch.thread_idx()[0], problem.dq_semaphore
        if semaphore.address != 0:
            if thread == 0:
                mask_range = self.mask_range(problem, work.queries, work.keys)
                earlier = BlockRange.of(mask_range, m_block, cfg.tile_m, cfg.tile_n)
                semaphore.wait(block, work.n_block - earlier.first)
            cute.arch.sync_threads()
        (_, _, column_blocks), row_blocks, _ = acc.shape
        for m in cutlass.range_constexpr(row_blocks):
            for n in cutlass.range_constexpr(column_blocks):
                of_tile = (
                    self.ds.column_of(m, rows),
                    self.k.column_of(n // 2, parts) + n % 2 * 8,
                )
                constant = dq_bands.block_place(*of_tile, cfg.head_dim)
                for i in cutlass.range_constexpr(4):
                    value = acc[4 * (m * column_blocks + n) + i]
                    dq_bands.add(start, constant + i * dq_bands.REGISTER_BYTES, value)
        if semaphore.address != 0:
            cute.arch.fence_acq_rel_gpu()
            cute.arch.sync_threads()
            if thread == 0:
                semaphore.signal(block)

    @cute.jit
    def store(
        self,
        tensors: Tensors,
        problem: Problem,
        work: Work,
        acc_dk: cute.Tensor,
        acc_dv: cute.Tensor,
    ):
        cfg, keys = self.cfg, work.keys
        (_, parts), first_key = cfg.key_warps, work.n_block * cfg.tile_n
        key, part = self.keys_and_part()
        column = self.k.first_column(part, parts)
        coordinates = PartCoordinates(key, cute.arch.lane_idx(), column, cfg.span, parts)
        for i in cutlass.range_constexpr(cute.size(acc_dk)):
            acc_dk[i] = acc_dk[i] * problem.scale
        for acc, tensor in ((acc_dk, tensors.dk), (acc_dv, tensors.dv)):

            def target(row, tensor=tensor):
                row = first_key + row
                return row < keys.length, tensor[keys.batch, keys.offset + row, work.head_kv, None]

            store_rounded(acc, coordinates, target, self.dtype)

    def warp(self) -> Int32:
        return cute.arch.make_warp_uniform(cute.arch.warp_idx())

    def keys_and_part(self) -> tuple[Int32, Int32]:
        """The warp's first key of dK and dV, and its part of the columns."""
        cfg, warp = self.cfg, self.warp()
        groups, parts = cfg.key_warps
        return warp // parts * (cfg.tile_n // groups), warp % parts
