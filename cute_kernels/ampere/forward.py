"""Forward attention on sm_80 and later: O = softmax(softmax_scale * Q K^T) V and its log-sum-exp.

FlashAttention-2's structure (arXiv 2307.08691); a tile is `tile_m` query rows of one head, and a
block of threads does one after another, usually one.  Everything but types and tile is decided at
run time: windows and chunks (which may hide nothing, or what a causal mask hides), softcap, packed
or used lengths, sinks, heads that share tiles, the type of O.

Layouts    As hopper/forward/kernel.py; its arguments, too, but for the queue.

Warps      `warp_rows` query rows each, all keys; together they load.  Warps meet twice a key block.

Timeline   of a tile, key blocks j from last to first; each load is one group of cp.async

             load Q, K(last)
             for j:  wait K(j), all warps | load V(j) | S = Q K(j)
                     wait V(j), all warps | load K(j-1) | mask, softmax, P | O += P V(j)
             1 / row_sum, LSE | store

           V(j) is loaded under S = Q K(j), K(j-1) under softmax and O += P V(j).  Two blocks of
           threads on a multiprocessor fill each other's waits.

Loops      Blocks that every row sees entirely are done without mask, between masked ones: both
           loops are in one that runs twice, so that neither has to be written out twice.

Masks      What a row sees is found once a tile, by one thread a row, and kept in shared memory.

Shared memory: Q, K, V (shared_tile.py), begin and end of what each row sees, what the tile is:
looked up when needed, for the loops leave no registers.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.memory import SmemAllocator
from hopper_attention.cute_kernels.ampere.config import AmpereForwardConfig
from hopper_attention.cute_kernels.ampere.mma import (
    Coordinates,
    PackedA,
    SharedA,
    SharedB,
    accumulator,
    gemm,
)
from hopper_attention.cute_kernels.ampere.row_store import store_float32, store_rounded
from hopper_attention.cute_kernels.ampere.shared_tile import Lanes, SharedTile, TileCopy
from hopper_attention.cute_kernels.masks.apply import Mask
from hopper_attention.cute_kernels.masks.visible_range import BlockRange, MaskRange
from hopper_attention.cute_kernels.primitives.arguments import (
    ForwardCounts,
    ForwardOperands,
    SequenceAddresses,
    Window,
    example,
)
from hopper_attention.cute_kernels.primitives.arithmetic import minimum
from hopper_attention.cute_kernels.primitives.fragments import (
    PackedFragment,
    opaque,
    rows_and_columns,
)
from hopper_attention.cute_kernels.primitives.memory import read
from hopper_attention.cute_kernels.primitives.types import DTYPES, row_statistics, strided
from hopper_attention.cute_kernels.scheduling.sequence import Lengths, Sequence, TileRows
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


@dataclass(frozen=True)
class Tensors:
    """Tensors as they are passed: (batch, row, head, column), LSE (batch, head, row)."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    o: cute.Tensor
    lse: cute.Tensor


@dataclass(frozen=True)
class Problem:
    """Everything that is known of the launch."""

    dense: DenseScheduler
    packed: VarlenScheduler
    """Which of the two: `num_sequences`."""
    num_sequences: Int32
    """0: every batch entry is one."""
    queries: Lengths
    keys: Lengths
    group: Any
    """Query heads that share a tile (`TileRows`): 1, or all of a key head; divides quickly."""
    tiles_per_kvhead: Int32
    """Tiles of the same positions that read the same keys: the others of the group."""
    scale_log2: Float32
    """The factor of the scores that softmax sees: after softcap if there is one."""
    cap_inner: Float32
    """The inner factor of `softmax.online.cap`."""
    cap_outer: Float32
    """0: there is no softcap."""
    window: tuple
    """(left, right, chunk) of `MaskRange`."""
    sink: Int64
    """Address of a float32 score for each head, or 0."""
    output_type: Int32
    """1 if O is stored unrounded; its tensor has two 16-bit columns for each of O's."""


@dataclass(frozen=True)
class Work:
    """One tile."""

    number: Int32
    tile: Tile
    queries: Sequence
    keys: Sequence
    blocks: BlockRange

    def to_words(self) -> list[Int32]:
        """Return what `from_words` reads: integers to be kept in shared memory."""
        parts = (self.tile, self.queries, self.keys, self.blocks)
        return [self.number, *(Int32(value) for part in parts for value in vars(part).values())]

    @staticmethod
    def from_words(words: cute.Tensor) -> "Work":
        """Looked up again, and not kept in registers that the loops need."""
        number, *values = (words[i] for i in range(WORDS))
        return Work(
            number,
            Tile(*values[:3]),
            Sequence(*values[3:6]),
            Sequence(*values[6:9]),
            BlockRange(*values[9:]),
        )


WORDS = 14


@dataclass(frozen=True)
class Limits:
    """A `MaskRange` of the tile's rows that was looked up before."""

    limits: cute.Tensor
    """(tile_m, 2) in shared memory."""

    bounds_begin = True
    bounds_end = True

    def begin(self, row):
        return self.limits[row, 0]

    def end(self, row):
        return self.limits[row, 1]


@dataclass(frozen=True)
class Stream:
    """K or V of a tile's keys, as one thread loads them: block after block, last to first."""

    source: Int64
    """Address of the thread's first chunk in the next block."""
    row_bytes: Int64
    """From row to row."""
    width: Int32
    """Columns that exist."""


@dataclass(frozen=True)
class SmemAddresses:
    """Addresses of the block in shared memory."""

    shared: Int32
    """Address of its beginning."""
    limits: cute.Tensor
    """(tile_m, 2): begin and end of what each row sees."""
    work: cute.Tensor
    """The block's `Work`, packed."""


class AmpereForward:
    """The kernel of one `AmpereForwardConfig`."""

    def __init__(self, config: AmpereForwardConfig):
        self.cfg = cfg = config
        self.dtype = DTYPES[cfg.dtype]
        self.q = SharedTile(0, cfg.tile_m, cfg.head_dim)
        self.k = SharedTile(self.q.end, cfg.tile_n, cfg.head_dim)
        self.v = SharedTile(self.k.end, cfg.tile_n, cfg.head_dim_v)
        self.copy_q, self.copy_k, self.copy_v = (
            TileCopy(tile, cfg.threads) for tile in (self.q, self.k, self.v)
        )
        assert self.v.end + 8 * cfg.tile_m + 4 * WORDS <= cfg.shared_memory_bytes

    def example_arguments(self) -> tuple:
        """Arguments that `__call__` is compiled for, without the stream."""
        return (
            example(ForwardOperands, lambda: strided(self.dtype, 4)),
            row_statistics(),
            Float32(1.0),
            Float32(0.0),
            Int64(0),
            example(Window, lambda: Int32(1)),
            example(SequenceAddresses, lambda: Int64(0)),
            example(ForwardCounts, lambda: Int32(1)),
            Int32(1),
        )

    @cute.jit
    def __call__(
        self,
        operands: ForwardOperands,
        lse: cute.Tensor,
        softmax_scale: Float32,
        softcap: Float32,
        learnable_sink: Int64,
        window: Window,
        addresses: SequenceAddresses,
        counts: ForwardCounts,
        max_blocks: Int32,
        stream: cuda.CUstream,
    ):
        cfg = self.cfg
        mQ, mK, mV, mO = operands
        num_sequences, group, output_type = counts
        entries, seqlen_q, heads, _ = mQ.shape
        _, seqlen_k, heads_kv, _ = mK.shape
        key_bytes = (cfg.head_dim + cfg.head_dim_v) * self.dtype.width // 8
        queries = Lengths(addresses.cu_seqlens_q, addresses.seqused_q, seqlen_q)
        dense = DenseScheduler.create(
            seqlen_q, seqlen_k, heads, heads_kv, entries, cfg.tile_m, key_bytes
        )
        rows = entries * seqlen_q * group
        packed = VarlenScheduler(queries, num_sequences, heads // group, rows, cfg.tile_m, group)
        capped = softcap > 0.0
        problem = Problem(
            dense=dense,
            packed=packed,
            num_sequences=num_sequences,
            queries=queries,
            keys=Lengths(addresses.cu_seqlens_k, addresses.seqused_k, seqlen_k),
            group=cute.fast_divmod_create_divisor_v2(group),
            tiles_per_kvhead=heads // heads_kv // group,
            scale_log2=LOG2_E * (Float32(1.0) if capped else softmax_scale),
            cap_inner=(2.0 * LOG2_E * softmax_scale / softcap) if capped else Float32(0.0),
            cap_outer=softcap,
            window=window,
            sink=learnable_sink,
            output_type=output_type,
        )
        tiles = packed.tiles if num_sequences > 0 else dense.tiles
        self.kernel(Tensors(mQ, mK, mV, mO, lse), problem, tiles).launch(
            grid=[minimum(tiles, max_blocks), 1, 1],
            block=[cfg.threads, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, tensors: Tensors, problem: Problem, tiles: Int32):
        cfg = self.cfg
        start = SmemAllocator().allocate(cfg.shared_memory_bytes, 1024)
        saved = cute.recast_ptr(start + self.v.end, dtype=Int32)
        limits = cute.make_tensor(saved, cute.make_layout((cfg.tile_m, 2), stride=(2, 1)))
        words = cute.make_tensor(saved + 2 * cfg.tile_m, cute.make_layout(WORDS))
        smem = SmemAddresses(Int32(start.toint()), limits, words)
        number = cute.arch.block_idx()[0]
        while number < tiles:
            work = self.find_work(problem, number)
            if work.tile.m_block >= 0:
                self.begin(tensors, problem, work, smem)
                number = self.attend(tensors, problem, smem)
            number += cute.arch.grid_dim()[0]

    @cute.jit
    def find_work(self, problem: Problem, number: Int32) -> Work:
        """Every warp finds the block's work; a number left over has m_block -1."""
        cfg = self.cfg
        m_block, head, batch = Int32(0), Int32(0), Int32(0)
        if problem.num_sequences > 0:
            tile = problem.packed.tile(number)
            left_over = tile.batch >= problem.num_sequences
            m_block = Int32(-1) if left_over else tile.m_block
            head, batch = tile.head, minimum(tile.batch, problem.num_sequences - 1)
        else:
            tile = problem.dense.tile(number)
            m_block, head, batch = tile.m_block, tile.head, tile.batch
        queries, keys = problem.queries.of(batch), problem.keys.of(batch)
        mask_range = MaskRange("local", queries.length, keys.length, *problem.window)
        blocks = BlockRange.of(mask_range, m_block, cfg.tile_m, cfg.tile_n, problem.group)
        return Work(number, Tile(m_block, head, batch), queries, keys, blocks)

    def rows(self, problem: Problem, tile: Tile) -> TileRows:
        return TileRows(
            problem.group, tile.head * problem.packed.group, tile.m_block * self.cfg.tile_m
        )

    @cute.jit
    def begin(self, tensors: Tensors, problem: Problem, work: Work, smem: SmemAddresses):
        """The first loads, and what is looked up later."""
        thread = cute.arch.thread_idx()[0]
        rows = self.rows(problem, work.tile)
        if thread == 0:
            for i, word in enumerate(work.to_words()):
                smem.work[i] = word
        mask_range = MaskRange("local", work.queries.length, work.keys.length, *problem.window)
        if thread < self.cfg.tile_m:
            query = rows.position(thread)
            smem.limits[thread, 0] = mask_range.begin(query)
            smem.limits[thread, 1] = mask_range.end(query)
        cute.arch.sync_threads()  # words and limits are there
        if work.blocks.end > work.blocks.first:
            self.load_queries(tensors.q, work, rows, smem.shared)
            last = work.blocks.end - 1
            k = self.stream(self.copy_k, tensors.k, problem, smem, last)
            self.load(self.copy_k, k, smem, work.keys.length - last * self.cfg.tile_n)
            if tensors.v.shape[3] < self.cfg.head_dim_v:
                # Zeros in the columns that are never loaded.  K has them from its first load.
                v = self.stream(self.copy_v, tensors.v, problem, smem, last)
                self.load(self.copy_v, v, smem, 0)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def attend(self, tensors: Tensors, problem: Problem, smem: SmemAddresses):
        """One tile's keys, and what comes of them; the tile's number."""
        cfg = self.cfg
        blocks = Work.from_words(smem.work).blocks
        softmax = OnlineSoftmax.create(cfg.warp_rows // 8, scale_log2=problem.scale_log2)
        acc_o = accumulator(cfg.warp_rows, cfg.head_dim_v)
        acc_o.fill(0.0)
        step = partial(self.step, acc_o, softmax, problem, smem)
        n_block = blocks.end - 1
        k = self.stream(self.copy_k, tensors.k, problem, smem, n_block - 1)
        v = self.stream(self.copy_v, tensors.v, problem, smem, n_block)
        for part in cutlass.range(2, unroll=1):
            # Masked blocks at the end and unmasked ones, then masked ones at the beginning.
            # Counted down to 0 in uniform registers: bounds to compare with would be spilled.
            blocks = Work.from_words(smem.work).blocks
            masked_first = blocks.unmasked_end if part == 0 else blocks.first
            left = n_block + 1 - masked_first
            while left > 0:
                k, v = step(k, v, n_block, True)
                n_block -= 1
                left -= 1
            left = n_block + 1 - Work.from_words(smem.work).blocks.unmasked_first
            while left > 0:
                k, v = step(k, v, n_block, False)
                n_block -= 1
                left -= 1

        work = Work.from_words(smem.work)
        rows, coordinates = self.rows(problem, work.tile), self.coordinates()
        factors = softmax.finish(self.read_sinks(problem, rows, coordinates))
        scale_rows(rows_and_columns(acc_o), factors)
        self.store(tensors, problem, work, rows, acc_o, softmax.lse, coordinates)
        cute.arch.sync_threads()  # the next tile's loads overwrite what warps still read
        return work.number

    def warp_row(self) -> Int32:
        """First row of the warp."""
        return cute.arch.make_warp_uniform(cute.arch.warp_idx()) * self.cfg.warp_rows

    def coordinates(self) -> Coordinates:
        return Coordinates(self.warp_row(), opaque(cute.arch.lane_idx()))

    @cute.jit
    def step(
        self,
        acc_o: cute.Tensor,
        softmax: OnlineSoftmax,
        problem: Problem,
        smem: SmemAddresses,
        k: Stream,
        v: Stream,
        n_block: Int32,
        masked: cutlass.Constexpr,
    ):
        """One key block; the streams behind what was loaded."""
        cfg = self.cfg
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_threads()  # K is there, V is free
        work = Work.from_words(smem.work)
        keys = work.keys.length - n_block * cfg.tile_n if masked else None
        v = self.load(self.copy_v, v, smem, keys)
        cute.arch.cp_async_commit_group()
        acc_s = accumulator(cfg.warp_rows, cfg.tile_n)
        warp_rows = self.warp_row() * 2 * self.q.span
        sQ = SharedA(self.q, self.lanes(smem.shared + warp_rows, False))
        sK = SharedB(self.k, self.lanes(smem.shared, True), False)
        gemm(acc_s, sQ, sK, self.dtype, accumulate=False)
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_threads()  # V is there, K is free
        if n_block > work.blocks.first:
            k = self.load(self.copy_k, k, smem, None)
        cute.arch.cp_async_commit_group()
        scores = rows_and_columns(acc_s)
        if problem.cap_outer != 0.0:
            cap(scores, problem.cap_inner, problem.cap_outer)
        if const_expr(masked):
            mask = Mask(Limits(smem.limits), self.coordinates(), TileRows(1, 0, 0), cfg.tile_n)
            mask.apply(scores, n_block)
        groups = (ScaleGroup(range(cfg.tile_n // 4), problem.scale_log2),)
        maxima = softmax.maxima(scores, groups, masked)
        factors, grown = cute.make_rmem_tensor_like(maxima), softmax.exceeded_by(maxima, masked)
        if grown:
            softmax.raise_to(maxima, factors, scores, groups, masked)
        softmax.exponentiate(scores, groups, first=False)
        if grown:
            scale_rows(rows_and_columns(acc_o), factors)
        p = PackedFragment.like(acc_s, self.dtype)
        p.convert(acc_s)
        sV = SharedB(self.v, self.lanes(smem.shared, False), True)
        gemm(acc_o, PackedA(p), sV, self.dtype, accumulate=True)
        return k, v

    def lanes(self, shared: Int32, across: bool) -> Lanes:
        return Lanes.of(shared, cute.arch.lane_idx(), self.q.span, across)

    def stream(
        self,
        copy: TileCopy,
        tensor: cute.Tensor,
        problem: Problem,
        smem: SmemAddresses,
        n_block: Int32,
    ) -> Stream:
        """The stream of the tile's keys, from block `n_block` on, down."""
        work, thread = Work.from_words(smem.work), cute.arch.thread_idx()[0]
        row = work.keys.offset + n_block * copy.tile.rows + copy.row(thread, 0)
        line = tensor[work.keys.batch, row, work.tile.head // problem.tiles_per_kvhead, None]
        return Stream(
            (line.iterator + copy.column(thread, 0)).toint(),
            Int64(tensor.stride[1]) * 2,
            tensor.shape[3],
        )

    def load(self, copy: TileCopy, stream: Stream, smem: SmemAddresses, keys: Any) -> Stream:
        """A block; if `keys` is not None, zeros for those from that on.  Then the block before."""
        thread, source = cute.arch.thread_idx()[0], stream.source
        shared, columns = smem.shared + copy.place(thread), copy.columns(thread, stream.width)
        # Before the loads: or else it is derived from the last row's address, kept until then.
        following = replace(stream, source=opaque(source - stream.row_bytes * copy.tile.rows))
        for step in range(copy.row_steps):
            present = None if keys is None else copy.row(thread, step) < keys
            copy.copy(shared, step, source, columns, present)
            source = source + stream.row_bytes * copy.rows_at_once
        return following

    def load_queries(self, mQ: cute.Tensor, work: Work, rows: TileRows, shared: Int32) -> None:
        """Zeros for rows and columns that do not exist."""
        copy, queries = self.copy_q, work.queries
        thread = cute.arch.thread_idx()[0]
        columns = copy.columns(thread, mQ.shape[3])
        for step in range(copy.row_steps):
            row = copy.row(thread, step)
            position = rows.position(row)
            line = mQ[queries.batch, queries.offset + position, rows.head(row), None]
            source = (line.iterator + copy.column(thread, 0)).toint()
            place = shared + copy.place(thread)
            copy.copy(place, step, source, columns, position < queries.length)

    @cute.jit
    def read_sinks(self, problem: Problem, rows: TileRows, coordinates: Coordinates) -> cute.Tensor:
        """(rows,) scores of the sinks of this thread's rows, in the exp2 domain; -inf: none."""
        count = self.cfg.warp_rows // 8
        sinks_log2 = cute.make_rmem_tensor((count,), Float32)
        sinks_log2.fill(-Float32.inf)
        if problem.sink != 0:
            for i in cutlass.range_constexpr(count):
                head = rows.head(coordinates[i, 0][0])
                sinks_log2[i] = read(Float32, problem.sink, head) * LOG2_E
        return sinks_log2

    @cute.jit
    def store(
        self,
        tensors: Tensors,
        problem: Problem,
        work: Work,
        rows: TileRows,
        acc_o: cute.Tensor,
        lse: cute.Tensor,
        coordinates: Coordinates,
    ):
        queries = work.queries

        def target(row):
            position = rows.position(row)
            line = tensors.o[queries.batch, queries.offset + position, rows.head(row), None]
            return position < queries.length, line

        for i in cutlass.range_constexpr(cute.size(lse)):
            row, column = coordinates[i, 0]
            position = rows.position(row)
            if column == 0 and position < queries.length:
                tensors.lse[queries.batch, rows.head(row), queries.offset + position] = lse[i]
        if problem.output_type != 0:
            store_float32(acc_o, coordinates, target)
        else:
            store_rounded(acc_o, coordinates, target, self.dtype)
