"""Backward attention on sm_90a: dK, dV and the sum that becomes dQ.

    P = exp(softmax_scale * Q K^T - LSE)     dP = dO V^T      delta = dLSE - rowsum(dO * O)
    dS = P * (dP + delta)                    dV = P^T dO      dK = softmax_scale * dS^T Q
    dQ = softmax_scale * dS K                (FlashAttention-2, arXiv 2307.08691, section 3.2)

A block takes `tile_n` keys of one key head, and for every query head of its group the blocks of
`tile_m` query rows that see them: dK and dV stay in registers over all of these, so that grouped
heads cost no workspace and no atomics.  dQ is summed over the key blocks in a float32 workspace
(cute_kernels/backward/workspace.py, dq_tile.py).  cute_kernels/backward/preprocess.py goes before,
postprocess.py after.

Layouts    Q, dO (batch, seqlen_q, heads, d); K, V, dK, dV (batch, seqlen_k, heads_kv, d); 16 bits,
           last dimension contiguous, other strides any multiple of 16 bytes.
           S and dP are computed transposed, keys in rows: P^T and dS^T are then, in registers, A
           operands of dV and dK.  Only dS goes through shared memory, for dQ, which needs the keys
           of both warpgroups.

Roles      warp 0          issues every load       warp 1   orders the adds to dQ, if asked for
           warpgroup 1, 2  consumers, 64 keys each, and half of dQ; registers: config.py

Pipelines  name    stages    full                         empty
           K, V    1         1 arrival + bytes            never
           Q       4         1 arrival + bytes, with LSE  8 arrivals: dK of the block is done
           dO      2         the same, with delta         8 arrivals: dV of the block is done
           dS      2         8 arrivals, one a warp       by itself: see below
           dQ      1         MAY_ADD + w, 160 threads     ADDED, 288 threads

           A warp writes dS(i) over dS(i - 2) when it has waited for dQ(i - 1), which was issued
           when all had written dS(i - 1), hence waited for dQ(i - 2).

           Q(i) is released in the middle of block i + 1: with two stages the load of Q(i + 2)
           would have half a block's time, less than L2 takes under this load.

Timeline   of a consumer and row block i ("|" where it waits), with `late_dq`:

             issue S(i), dK(i-1) | dS(i-1) of all warps, issue dQ(i-1)
             | S(i), P(i) = exp | dK(i-1), round P(i), release Q(i-1)
             | dO(i), issue dV(i), dP(i) | dQ(i-1), add it to global memory
             | dV(i), dP(i); dS(i) of rounded P(i), round, release dO(i), store

           and without, which softcap needs and config.py leaves to all but d96:

             issue S(i) | dS(i-1) of all warps, issue dQ(i-1), dK(i-1)
             | S(i), P(i) = exp | dQ(i-1), add it to global memory, round P(i)
             | dK(i-1), release Q(i-1), issue dV(i), dP(i) | both, release dO(i)
             dS(i), round, store (of 128 rows first 64 | then issue dP of the others | dS)

           Reductions read their registers when memory takes them.  Without `late_dq` dP has dQ's
           registers, and ptxas lets P wait as well (reductions and exponentials share a
           scoreboard): the tensor cores have dK alone until then.  With it dQ has registers of its
           own, and nothing waits for reductions before the next block's S, or dS where others have
           the registers of their address (`holds_dq_address`).  dP then has the registers of S, P
           in float32 is gone, and dS is of P as dV has it, rounded (`rounded_p`; at d96 there is
           room for both).  With softcap S's registers have the slope that dS needs.

           ptxas moves most exponentials behind the wait for dQ, with `late_dq` all behind that for
           dK: they run under the other one.  Held above it they are no faster, with masks slower
           (without `late_dq`, H100).  Under a window or softcap masked blocks have theirs after dK:
           there are no registers before.

           Where one consumer computes dS, the other has WGMMAs under way.  More at a time would be
           better and does not fit: ptxas keeps a fragment that WGMMA has touched alive as a whole,
           and if they exceed the registers it waits after every WGMMA (docs/kernels/backward.md).

dQ         is added by vector reductions from registers.  Staged in shared memory and added by bulk
           reductions it takes as long and a sixth of shared memory's time besides.  Adding is a
           fifth of the kernel's time at d = 128 without `late_dq` (768 TFLOP/s if nothing is added,
           606 as it is; H100, 16k).

Order      With a semaphore (one counter a block of dQ) key blocks add to dQ in ascending order, and
           the result has the same bits every time.  Blocks start in ascending order, so
           that whoever waits, waits for a block that has started.

Shared memory: barriers, LSE and delta, Q, dO, K (dK), V (dV), dS; `shared_memory_bytes`.
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
from cutlass.memory import SmemAllocator
from hopper_attention.cute_kernels.backward.scores import Scores
from hopper_attention.cute_kernels.masks.apply import Mask
from hopper_attention.cute_kernels.primitives.arguments import (
    BackwardOperands,
    SequenceAddresses,
    Window,
    WorkspaceStatistics,
)
from hopper_attention.cute_kernels.primitives.arithmetic import maximum
from hopper_attention.cute_kernels.primitives.fragments import (
    PackedFragment,
    opaque,
    pin,
    rows_and_columns,
)
from hopper_attention.cute_kernels.scheduling.sequence import Sequence, TileRows
from hopper_attention.hopper.backward.common import (
    CONSUMER_THREADS,
    BackwardCommon,
    Gradients,
    Problem,
    Tma,
    Work,
    Workspace,
    stage_of,
)
from hopper_attention.hopper.backward.config import BACKWARD_STAGES, BackwardConfig
from hopper_attention.hopper.primitives import wgmma
from hopper_attention.hopper.primitives.named_barriers import consumer_warpgroup
from hopper_attention.hopper.primitives.tma import permute


class Barrier(IntEnum):
    """Named barriers of a block, beside `DqBarrier`; 0 is __syncthreads."""

    CONSUMERS = 1
    """All consumer threads."""


@dataclass(frozen=True)
class Mmas:
    s: cute.TiledMma
    """S^T = K Q^T, from shared memory."""
    dp: cute.TiledMma
    """dP^T = V dO^T, the same for `dp_rows` rows of dO."""
    dv: cute.TiledMma
    """dV = P^T dO with P^T from registers."""
    dk: cute.TiledMma
    dq: cute.TiledMma


@dataclass(frozen=True)
class Tiles:
    """Shared memory; Q, dO, dS, LSE and delta with stages."""

    q: cute.Tensor
    do: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    ds: cute.Tensor
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
    """Operands of one consumer thread: descriptors of shared tiles; registers."""

    k: wgmma.Operand
    v: wgmma.Operand
    q: wgmma.Operand
    do: tuple
    """Descriptors of `dp_rows` rows each."""
    do_columns: wgmma.Operand
    """dO as the B operand of dV: rows are the K mode."""
    q_columns: wgmma.Operand
    k_columns: wgmma.Operand
    ds: wgmma.Operand
    p: PackedFragment
    packed_ds: PackedFragment
    acc_dk: cute.Tensor
    acc_dv: cute.Tensor
    acc_dq: Optional[cute.Tensor]
    """dQ's own registers, where `late_dq`."""
    dq_address: Optional[cute.Tensor]
    """(1,): where this thread added to dQ last, where `holds_dq_address`."""


@dataclass(frozen=True)
class Thread:
    """Places of one consumer thread."""

    index: Int32
    """Among the consumers."""
    coordinates: cute.Tensor
    """(rows, columns) -> (key, query) in the tile."""
    copy_ds: cute.TiledCopy
    ds: cute.Tensor
    """The place of its part of dS^T, with stages."""


class Backward:
    """The kernel of one `BackwardConfig`: `__call__` on the host, `kernel` and roles on a GPU."""

    def __init__(self, config: BackwardConfig):
        self.cfg = config
        self.common = BackwardCommon(config)
        self.dtype, self.dq_tile = self.common.dtype, self.common.dq_tile

    def example_arguments(self) -> tuple:
        """Arguments that `__call__` is compiled for, without the stream."""
        return self.common.example_arguments()

    @cute.jit
    def __call__(
        self,
        operands: BackwardOperands,
        statistics: WorkspaceStatistics,
        dq_workspace: cute.Tensor,
        softmax_scale: Float32,
        softcap: Optional[Float32],
        window: Optional[Window],
        addresses: Optional[SequenceAddresses],
        num_sequences: Int32,
        dq_semaphore: Int64,
        stream: cuda.CUstream,
    ):
        launch = self.common.prepare(
            operands, Workspace(*statistics, dq_workspace), softmax_scale, softcap, window,
            addresses, num_sequences, dq_semaphore,
        )  # fmt: skip
        self.kernel(
            launch.tma, launch.saved, launch.gradients, launch.problem, launch.scheduler,
            self.tiled_mmas(),
        ).launch(
            # Without the bound on blocks ptxas may ignore setmaxnreg (C7508).
            grid=[launch.scheduler.tiles, 1, 1], block=[self.cfg.threads, 1, 1],
            min_blocks_per_mp=1, stream=stream,
        )  # fmt: skip

    def tiled_mmas(self) -> Mmas:
        cfg, dtype, k, mn = self.cfg, self.dtype, OperandMajorMode.K, OperandMajorMode.MN
        make, warpgroups = sm90.make_trivial_tiled_mma, (self.cfg.warpgroups, 1, 1)
        registers = warpgroup.OperandSource.RMEM
        return Mmas(
            make(dtype, dtype, k, k, Float32, warpgroups, (64, cfg.tile_m)),
            make(dtype, dtype, k, k, Float32, warpgroups, (64, cfg.dp_rows)),
            make(dtype, dtype, k, mn, Float32, warpgroups, (64, cfg.head_dim_v), registers),
            make(dtype, dtype, k, mn, Float32, warpgroups, (64, cfg.head_dim), registers),
            self.dq_tile.mma,
        )

    def shared_storage(self):
        common, buffer = self.common, self.common.buffer

        @cute.struct
        class Storage:
            q_barriers: common.barriers("q")
            do_barriers: common.barriers("do")
            k_barriers: common.barriers("k")
            v_barriers: common.barriers("v")
            ds_barriers: cute.struct.MemRange[cutlass.Int64, BACKWARD_STAGES]
            keys: cute.struct.MemRange[Int32, 5]
            lse: buffer(Float32, self.cfg.tile_m * self.cfg.q_stages, 128)
            delta: buffer(Float32, self.cfg.tile_m * BACKWARD_STAGES, 128)
            q: common.tile("q")
            do: common.tile("do")
            k: common.tile("k")
            v: common.tile("v")
            ds: common.tile("ds")

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
        work = self.common.find_work(problem, scheduler)
        if warp_index == 0:
            self.common.save_keys(tiles.keys, work)
        pipelines = self.make_pipelines(storage, warp_index)
        if warp_index < 4:
            cute.arch.setmaxregister_decrease(cfg.registers.producer)
            if warp_index == 0:
                if work.order.count > 0:
                    self.common.load(tma, tiles, pipelines, problem, saved, work)
            if warp_index == 1:
                if problem.dq_semaphore.address != 0:
                    self.common.order_dq_adds(problem, work)
        else:
            cute.arch.setmaxregister_increase(cfg.registers.consumer)
            self.consume(mmas, tiles, pipelines, problem, saved, work, gradients)

    def make_tiles(self, storage) -> Tiles:
        layout = self.common.shared_layouts()["ds"]
        ds = storage.ds.get_tensor(layout.outer, swizzle=layout.inner)
        return Tiles(**self.common.input_tiles(storage), ds=ds)

    def make_pipelines(self, storage, warp_index: Int32) -> Pipelines:
        ds = storage.ds_barriers.data_ptr()
        self.initialise(ds, warp_index)
        return Pipelines(**self.common.input_pipelines(storage), ds=ds)

    @cute.jit
    def initialise(self, ds_barriers: cute.Pointer, warp_index: Int32):
        if warp_index == 0:
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(BACKWARD_STAGES):
                    cute.arch.mbarrier_init(ds_barriers + stage, 4 * self.cfg.warpgroups)

    @cute.jit
    def consume(
        self,
        mmas: Mmas,
        tiles: Tiles,
        pipelines: Pipelines,
        problem: Problem,
        saved: Workspace,
        work: Work,
        gradients: Gradients,
    ):
        """Consumer warpgroup: dK and dV of 64 keys, its half of every dQ."""
        cfg = self.cfg
        index = cute.arch.thread_idx()[0] - 128
        thread, fragments = self.make_thread(index, mmas, tiles), self.make_fragments(mmas, tiles)
        for acc in (fragments.acc_dk, fragments.acc_dv, fragments.acc_dq):
            if const_expr(acc is not None):
                acc.fill(0.0)
                pin(acc)  # else the zeros are moved behind the fence of the first WGMMA
        if const_expr(cfg.holds_dq_address):
            fragments.dq_address[0] = Int64(0)
        if work.order.count > 0:
            self.mainloop(mmas, tiles, pipelines, problem, saved, work, fragments, thread)
        for i in cutlass.range_constexpr(cute.size(fragments.acc_dk)):
            fragments.acc_dk[i] = fragments.acc_dk[i] * problem.scale
        # Not the index from above: nothing derived from it shall occupy registers in the main loop.
        index, saved_keys = opaque(index), tiles.keys
        place = (saved_keys[0], saved_keys[1], Sequence(*(saved_keys[i] for i in range(2, 5))))
        # dV where the same 16 rows of V were: only this warp read them.
        sV, sK = tiles.v[None, None, 0], tiles.k[None, None, 0]
        self.common.store_dv.store(
            fragments.acc_dv, mmas.dv, sV, gradients.tma_dv, gradients.dv, place, index, cfg.varlen
        )
        # dK where K was, which both warpgroups read for dQ.
        cute.arch.barrier(barrier_id=Barrier.CONSUMERS, number_of_threads=CONSUMER_THREADS)
        self.common.store_dk.store(
            fragments.acc_dk, mmas.dk, sK, gradients.tma_dk, gradients.dk, place, index, cfg.varlen
        )

    def make_thread(self, index: Int32, mmas: Mmas, tiles: Tiles) -> Thread:
        cfg = self.cfg
        identity = cute.make_identity_tensor((cfg.tile_n, cfg.tile_m))
        coordinates = rows_and_columns(mmas.s.get_slice(index).partition_C(identity))
        stmatrix = cute.make_copy_atom(warp.StMatrix8x8x16bOp(True, 4), self.dtype)
        copy = cute.make_tiled_copy_C(stmatrix, mmas.dp)
        target = copy.get_slice(index).partition_D(permute(tiles.ds, (1, 0, 2)))
        return Thread(index, coordinates, copy, target)

    def make_fragments(self, mmas: Mmas, tiles: Tiles) -> Fragments:
        cfg = self.cfg
        # Descriptors from the warpgroup's first thread: warp-uniform, so in uniform registers.
        first = consumer_warpgroup() * 128
        s, dp, dv, dk, dq = (
            m.get_slice(first) for m in (mmas.s, mmas.dp, mmas.dv, mmas.dk, mmas.dq)
        )
        shape_do = (cfg.dp_rows, cfg.head_dim_v, BACKWARD_STAGES)
        parts_do = [cute.local_tile(tiles.do, shape_do, (i, 0, 0)) for i in range(cfg.parts)]
        sK, sV = tiles.k[None, None, 0], tiles.v[None, None, 0]
        transposed = (1, 0, 2)
        acc = cute.make_rmem_tensor(mmas.s.partition_shape_C((cfg.tile_n, cfg.tile_m)), Float32)
        shape_dk = mmas.dk.partition_shape_C((cfg.tile_n, cfg.head_dim))
        shape_dv = mmas.dv.partition_shape_C((cfg.tile_n, cfg.head_dim_v))
        return Fragments(
            k=wgmma.Operand.of(s.partition_A(sK)),
            v=wgmma.Operand.of(dp.partition_A(sV)),
            q=wgmma.Operand.of(s.partition_B(tiles.q)),
            do=tuple(wgmma.Operand.of(dp.partition_B(part)) for part in parts_do),
            do_columns=wgmma.Operand.of(dv.partition_B(permute(tiles.do, transposed))),
            q_columns=wgmma.Operand.of(dk.partition_B(permute(tiles.q, transposed))),
            k_columns=wgmma.Operand.of(dq.partition_B(permute(sK, (1, 0)))),
            ds=wgmma.Operand.of(dq.partition_A(tiles.ds)),
            p=PackedFragment.like(acc, self.dtype),
            packed_ds=PackedFragment.like(acc, self.dtype),
            acc_dk=cute.make_rmem_tensor(shape_dk, Float32),
            acc_dv=cute.make_rmem_tensor(shape_dv, Float32),
            acc_dq=self.dq_tile.accumulator() if cfg.late_dq else None,
            dq_address=cute.make_rmem_tensor((1,), Int64) if cfg.holds_dq_address else None,
        )

    @cute.jit
    def mainloop(
        self,
        mmas: Mmas,
        tiles: Tiles,
        pipelines: Pipelines,
        problem: Problem,
        saved: Workspace,
        work: Work,
        fragments: Fragments,
        thread: Thread,
    ):
        """All row blocks of all heads of the group; dK (unscaled) and dV are complete after it."""
        cfg, order = self.cfg, work.order
        first_key = work.n_block * cfg.tile_n
        mask = Mask(
            work.mask_range.transposed, thread.coordinates, TileRows(1, 0, first_key), cfg.tile_m
        )
        zero_fill = partial(self.common.zero_fill, thread=thread.index, barrier=Barrier.CONSUMERS)
        once = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
        pipelines.k.consumer_wait(once)
        if const_expr(cfg.varlen):
            zero_fill(tiles.k, "k", 0, work.keys.length - first_key)
        step = partial(
            self.step, mmas, tiles, pipelines, problem, saved, work, fragments, thread, once
        )
        head = work.head_kv * problem.qhead_per_kvhead
        place = step(Int32(0), None, head, Int32(0), mask, first=True)
        number = Int32(1)
        start = Int32(1)
        for h in cutlass.range(problem.qhead_per_kvhead, unroll=1):
            if const_expr(cfg.mask == "local"):
                for i in cutlass.range(start, order.unmasked_begin, unroll=1):
                    place = step(number, place, head + h, i, mask, first=False)
                    number += 1
            begin = maximum(start, order.unmasked_begin)
            for i in cutlass.range(begin, order.unmasked_end, unroll=1):
                place = step(number, place, head + h, i, None, first=False)
                number += 1
            for i in cutlass.range(maximum(start, order.unmasked_end), order.count, unroll=1):
                place = step(number, place, head + h, i, mask, first=False)
                number += 1
            start = Int32(0)
        self.finish(pipelines, problem, saved, work, fragments, number - 1, place)

    @cute.jit
    def step(
        self,
        mmas: Mmas,
        tiles: Tiles,
        pipelines: Pipelines,
        problem: Problem,
        saved: Workspace,
        work: Work,
        fragments: Fragments,
        thread: Thread,
        once: pipeline.PipelineState,
        number: Int32,
        place_before: Optional[tuple],
        head: Int32,
        i: Int32,
        mask: Optional[Mask],
        first: cutlass.Constexpr,
    ):
        """Row block i of a head, and dQ, dK of the row block before unless `first`.

        number: i, counted over all heads; place_before: head and row block of the one before.
        Returns those of this one.
        """
        cfg, fr, state = self.cfg, fragments, stage_of(number)
        q_state, q_before = (stage_of(n, cfg.q_stages) for n in (number, number - 1))
        acc = cute.make_rmem_tensor(mmas.s.partition_shape_C((cfg.tile_n, cfg.tile_m)), Float32)
        zero_fill = partial(self.common.zero_fill, thread=thread.index, barrier=Barrier.CONSUMERS)
        rows, m_block = None, work.order.block(i)
        if const_expr(cfg.varlen):
            rows = work.queries.length - m_block * cfg.tile_m
        pipelines.q.consumer_wait(q_state)
        if const_expr(cfg.varlen):
            zero_fill(tiles.q, "q", q_state.index, rows)
        wgmma.issue(acc, fr.k, fr.q.stage(q_state.index), accumulate=False)
        if const_expr(not first):
            acc_dq = self.issue_dq_dk(pipelines, fragments, stage_of(number - 1), q_before)
            warpgroup.wait_group(2)
        else:
            warpgroup.wait_group(0)
        pin(acc)
        lse = tiles.lse[None, q_state.index]
        scores = Scores(acc, fr.p, thread.coordinates, cfg.tile_m)
        # Slopes of softcap, or a window's limits, take registers of dQ or of dS: P after them.
        after_dk = cfg.softcap or (cfg.mask == "local" and mask is not None)
        if const_expr(not after_dk):
            scores.exponentiate(lse, problem, mask, m_block)
        if const_expr(not first):
            warpgroup.wait_group(1)
            if const_expr(not cfg.late_dq):
                self.add_dq(fr, acc_dq, problem, saved, work, place_before)
        if const_expr(not after_dk):
            fr.p.convert(acc)
        if const_expr(not first):
            if const_expr(not cfg.late_dq):
                warpgroup.wait_group(0)
            pipelines.q.consumer_release(q_before)
        if const_expr(after_dk):
            scores.exponentiate(lse, problem, mask, m_block)
            if const_expr(not cfg.softcap):
                fr.p.convert(acc)
        if const_expr(first):
            pipelines.v.consumer_wait(once)
            if const_expr(cfg.varlen):
                zero_fill(tiles.v, "v", 0, work.keys.length - work.n_block * cfg.tile_n)
        pipelines.do.consumer_wait(state)
        if const_expr(cfg.varlen):
            zero_fill(tiles.do, "do", state.index, rows)
        if const_expr(not cfg.softcap):
            self.issue_dv(fragments, state)
        for part in cutlass.range_constexpr(cfg.parts):
            ds = fr.packed_ds.part(part, cfg.parts)
            acc_dp = self.issue_dp(mmas, tiles, fragments, thread, state, part)
            if const_expr(cfg.late_dq and not first):
                warpgroup.wait_group(2)
                self.add_dq(fr, acc_dq, problem, saved, work, place_before)
            warpgroup.wait_group(0)
            pin(acc_dp)
            self.multiply_by_p(acc_dp, fr.p.part(part, cfg.parts), acc, part)
            ds.convert(acc_dp)
            if const_expr(part == cfg.parts - 1):
                pipelines.do.consumer_release(state)
            target = thread.ds[None, None, part, state.index]
            cute.copy(thread.copy_ds, thread.copy_ds.retile(ds.view)[None, None, 0], target)
        self.hand_over_ds(pipelines, state)
        return head, m_block

    @cute.jit
    def issue_dp(
        self,
        mmas: Mmas,
        tiles: Tiles,
        fragments: Fragments,
        thread: Thread,
        state: pipeline.PipelineState,
        part: cutlass.Constexpr,
    ) -> cute.Tensor:
        """dP of `dp_rows` rows, onto delta; returns its accumulator.

        With softcap, dV is issued behind dP: ptxas works out slopes beside whatever comes first,
        and dV leaves them no registers.
        """
        cfg, fr = self.cfg, fragments
        rows = cfg.dp_rows
        acc = cute.make_rmem_tensor(mmas.dp.partition_shape_C((cfg.tile_n, rows)), Float32)
        ds = fr.packed_ds.part(part, cfg.parts)
        delta = cute.local_tile(tiles.delta[None, state.index], (rows,), (part,))
        Scores(acc, ds, thread.coordinates, rows).start_with(delta)
        do_block = fr.do[part].stage(state.index)
        wgmma.issue(acc, fr.v, do_block, accumulate=True)
        if const_expr(cfg.softcap and part == 0):
            self.issue_dv(fragments, state)
        return acc

    def multiply_by_p(
        self, acc: cute.Tensor, packed: PackedFragment, p: cute.Tensor, part: int
    ) -> None:
        """dP of a part becomes dS: times P, rounded or of all parts in float32."""
        n = cute.size(acc)
        for i in range(n):
            factor = packed.unpacked(i) if self.cfg.rounded_p else p[part * n + i]
            acc[i] = factor * acc[i]

    def issue_dv(self, fragments: Fragments, state: pipeline.PipelineState) -> None:
        do_columns = fragments.do_columns.stage(state.index)
        wgmma.issue(fragments.acc_dv, fragments.p, do_columns, accumulate=True)

    def issue_dk(self, fragments: Fragments, q_state: pipeline.PipelineState) -> None:
        q_columns = fragments.q_columns.stage(q_state.index)
        wgmma.issue(fragments.acc_dk, fragments.packed_ds, q_columns, accumulate=True)

    @cute.jit
    def issue_dq_dk(
        self,
        pipelines: Pipelines,
        fragments: Fragments,
        state: pipeline.PipelineState,
        q_state: pipeline.PipelineState,
    ) -> cute.Tensor:
        """dQ and dK of a row block whose dS is on its way; returns dQ's accumulator.

        With `late_dq` dK goes first: it needs the dS of this thread alone, dQ that of all warps.
        dQ then starts by a flag that is 0 only at run time.  With a constant ptxas knows that dQ's
        registers are free from the reductions until here and gives them to dP, whose first write
        waits until the reductions have read them.
        """
        fr, late = fragments, self.cfg.late_dq
        if const_expr(late):
            self.issue_dk(fragments, q_state)
        cute.arch.mbarrier_wait(pipelines.ds + state.index, state.phase)
        acc_dq = fr.acc_dq if const_expr(late) else self.dq_tile.accumulator()
        never = wgmma.unknown_zero() != 0 if const_expr(late) else False
        wgmma.issue(acc_dq, fr.ds.stage(state.index), fr.k_columns, accumulate=never)
        if const_expr(not late):
            self.issue_dk(fragments, q_state)
        return acc_dq

    @cute.jit
    def hand_over_ds(self, pipelines: Pipelines, state: pipeline.PipelineState):
        """dS^T, which stays in registers for dK, is in shared memory for dQ."""
        cute.arch.fence_proxy("async.shared", space="cta")  # by every writer, then the barrier
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(pipelines.ds + state.index)

    def add_dq(
        self,
        fragments: Fragments,
        acc: cute.Tensor,
        problem: Problem,
        saved: Workspace,
        work: Work,
        place: tuple,
    ) -> None:
        """This warpgroup's part of a row block's dQ, which is complete.

        Reductions read their address late, too.  With `holds_dq_address` the one before is used
        once more here, by a flag that is 0 only at run time: else ptxas gives its registers to dS,
        and dS waits.
        """
        pin(acc)
        # Worked out only now, from the thread's index anew: it would occupy registers in the loop.
        index = opaque(cute.arch.thread_idx()[0]) & 127
        address = self.common.address_of_dq(saved, work, *place, index)
        if self.cfg.holds_dq_address:
            address = address | fragments.dq_address[0] & Int64(wgmma.unknown_zero())
            fragments.dq_address[0] = address
        self.common.add_dq(acc, address, problem)

    @cute.jit
    def finish(
        self,
        pipelines: Pipelines,
        problem: Problem,
        saved: Workspace,
        work: Work,
        fragments: Fragments,
        number: Int32,
        place: tuple,
    ):
        """dQ and dK of the last row block; everything is waited for."""
        q_state = stage_of(number, self.cfg.q_stages)
        acc_dq = self.issue_dq_dk(pipelines, fragments, stage_of(number), q_state)
        warpgroup.wait_group(0 if self.cfg.late_dq else 1)
        self.add_dq(fragments, acc_dq, problem, saved, work, place)
        warpgroup.wait_group(0)
        pin(fragments.acc_dv)
        pin(fragments.acc_dk)
