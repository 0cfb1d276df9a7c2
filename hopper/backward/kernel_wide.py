"""Backward attention on sm_90a for head dims above 128: one warpgroup makes dV, the other dK.

The maths are those of kernel.py.  There each consumer has dK and dV of 64 keys in its
registers, (d + dv) / 2 a thread: too many from d = 192 on.  Here a block takes 64 keys, and its two
consumers share the work instead of the keys:

Roles      warp 0       issues every load      warp 1   orders the adds to dQ, if asked for
           warpgroup 1  "values": S, P, dV and the left half of dQ's columns
           warpgroup 2  "keys": dP, dS, dK and the right half of dQ's columns

           Both accumulators, P^T and dS^T are A operands from registers; no score is computed twice
           and every WGMMA has 64 or more columns.  A thread of "values" hands its elements of P to
           the thread of "keys" that has the same elements of dP: float32, 16 bytes at a time.
           Only dS goes through shared memory as an operand, for dQ.

Pipelines  name  stages  full                         empty
           K, V  1       1 arrival + bytes            never
           Q     2       1 arrival + bytes, with LSE  8 arrivals: S and dK of the block are done
           dO    2       the same, with delta         8 arrivals: dP and dV of the block are done
           P     1       barrier P_FULL, 256 threads  barrier P_EMPTY, 256 threads
           dS    2       4 arrivals, "keys"           by itself: "values" hands over P(i + 1) when
                                                      it has waited for dQ(i - 1)
           dQ    1       MAY_ADD + w, 160 threads     ADDED, 288 threads

Timeline   of row block i ("|" where it waits):

             values  issue S(i) | P(i) = exp, hand over P(i) | issue dV(i) | dS(i-1), issue dQ(i-1)
                     | dV(i) and dQ(i-1), add dQ(i-1) to global memory, release dO(i)
             keys    issue dP(i) | dK(i-1), release Q(i-1) | dP(i), release dO(i) | take P(i)
                     dS(i), store | issue dQ(i), dK(i) | dQ(i), add it to global memory
                     (d = 256 has no registers for dK(i-1) beside dP(i): | dK(i) here)

           The exponentials of one consumer run under the other's GEMMs.  dQ is added by vector
           reductions from registers: shared memory has no 64 KB for it at d = 256.

Shared memory: barriers, LSE and delta, Q, dO, K (dK), V (dV), dS, P; `shared_memory_bytes`.
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
from hopper_attention.hopper.backward.config import BACKWARD_STAGES, WideBackwardConfig
from hopper_attention.hopper.primitives import wgmma
from hopper_attention.hopper.primitives.named_barriers import consumer_warpgroup
from hopper_attention.hopper.primitives.tma import permute


class Barrier(IntEnum):
    """Named barriers of a block, beside `DqBarrier`; 0 is __syncthreads."""

    CONSUMERS = 1
    P_FULL = 2
    P_EMPTY = 3


@dataclass(frozen=True)
class Mmas:
    """MMAs of one warpgroup each, but for dQ."""

    sdp: cute.TiledMma
    """S^T = K Q^T or dP^T = V dO^T, from shared memory."""
    dv: cute.TiledMma
    dk: cute.TiledMma
    dq: cute.TiledMma


@dataclass(frozen=True)
class Tiles:
    """Shared memory; Q, dO, dS, LSE and delta with stages."""

    q: cute.Tensor
    do: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    lse: cute.Tensor
    delta: cute.Tensor
    keys: cute.Tensor
    ds: cute.Tensor
    p: cute.Pointer


@dataclass(frozen=True)
class Pipelines:
    q: pipeline.PipelineTmaAsync
    do: pipeline.PipelineTmaAsync
    k: pipeline.PipelineTmaAsync
    v: pipeline.PipelineTmaAsync
    ds: cute.Pointer
    """Barriers of the stages of dS: full."""


@dataclass(frozen=True)
class Consumer:
    """State that both consumers have: their place, dQ's operands, and their own gradient.

    `rows`, `stages`: operands of S or dP, K and Q or V and dO; `columns`: the B operand of the
    gradient, dO or Q; `packed`: its A operand, P or dS.
    """

    index: Int32
    """Thread of the warpgroup."""
    coordinates: cute.Tensor
    """(rows, columns) -> (key, query) in the tile."""
    rows: wgmma.Operand
    stages: wgmma.Operand
    columns: wgmma.Operand
    packed: PackedFragment
    acc: cute.Tensor
    """dV or dK."""
    ds: wgmma.Operand
    k_columns: wgmma.Operand


class BackwardWide:
    """The kernel of one `WideBackwardConfig`: `__call__` on the host, `kernel` on a GPU."""

    def __init__(self, config: WideBackwardConfig):
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
        make, one = sm90.make_trivial_tiled_mma, (1, 1, 1)
        registers = warpgroup.OperandSource.RMEM
        return Mmas(
            make(dtype, dtype, k, k, Float32, one, (64, cfg.tile_m)),
            make(dtype, dtype, k, mn, Float32, one, (64, cfg.head_dim_v), registers),
            make(dtype, dtype, k, mn, Float32, one, (64, cfg.head_dim), registers),
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
            p: buffer(Float32, self.cfg.tile_n * self.cfg.tile_m)

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
        layout = self.common.shared_layouts()["ds"]
        ds = storage.ds.get_tensor(layout.outer, swizzle=layout.inner)
        tiles = Tiles(**self.common.input_tiles(storage), ds=ds, p=storage.p.data_ptr())
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        work = self.common.find_work(problem, scheduler)
        if warp_index == 0:
            for info in (tma.q, tma.k, tma.do, tma.v, gradients.tma_dk, gradients.tma_dv):
                cpasync.prefetch_descriptor(info.atom)
            self.common.save_keys(tiles.keys, work)
        self.initialise(storage.ds_barriers.data_ptr(), warp_index)
        pipelines = Pipelines(
            **self.common.input_pipelines(storage), ds=storage.ds_barriers.data_ptr()
        )
        if warp_index < 4:
            cute.arch.setmaxregister_decrease(cfg.registers.producer)
            if warp_index == 0:
                if work.order.count > 0:
                    self.common.load(tma, tiles, pipelines, problem, saved, work)
            if warp_index == 1:
                if problem.dq_semaphore.address != 0:
                    self.common.order_dq_adds(problem, work)
        elif warp_index < 8:
            cute.arch.setmaxregister_increase(cfg.registers.consumer)
            self.consume_values(mmas, tiles, pipelines, problem, saved, work, gradients)
        else:
            cute.arch.setmaxregister_increase(cfg.registers.consumer)
            self.consume_keys(mmas, tiles, pipelines, problem, saved, work, gradients)

    @cute.jit
    def initialise(self, ds_barriers: cute.Pointer, warp_index: Int32):
        if warp_index == 0:
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(BACKWARD_STAGES):
                    cute.arch.mbarrier_init(ds_barriers + stage, 4)

    @cute.jit
    def consume_values(
        self,
        mmas: Mmas,
        tiles: Tiles,
        pipelines: Pipelines,
        problem: Problem,
        saved: Workspace,
        work: Work,
        gradients: Gradients,
    ):
        """Warpgroup 1: dV."""
        index = cute.arch.thread_idx()[0] - 128
        own = (tiles.k, tiles.q, tiles.do)
        consumer = self.make_consumer(index, mmas, mmas.dv, self.cfg.head_dim_v, own, tiles)
        if work.order.count > 0:
            once = self.prepare_keys(tiles, pipelines, work, index)
            pipelines.k.consumer_wait(once)
            step = partial(self.step_values, mmas, tiles, pipelines, problem, saved, work, consumer)
            first_key = work.n_block * self.cfg.tile_n
            transposed, coordinates = work.mask_range.transposed, consumer.coordinates
            mask = Mask(transposed, coordinates, TileRows(1, 0, first_key), self.cfg.tile_m)
            number, address = self.for_each_row_block(step, problem, work, mask)
            self.add_dq(pipelines, problem, consumer, stage_of(number), address)
            warpgroup.wait_group(0)
            pin(consumer.acc)
        cute.arch.barrier(barrier_id=Barrier.CONSUMERS, number_of_threads=CONSUMER_THREADS)
        index, saved_keys = opaque(index), tiles.keys
        place = (saved_keys[0], saved_keys[1], Sequence(*(saved_keys[i] for i in range(2, 5))))
        self.common.store_dv.store(
            consumer.acc, mmas.dv, tiles.v[None, None, 0], gradients.tma_dv, gradients.dv, place,
            index, self.cfg.varlen,
        )  # fmt: skip

    @cute.jit
    def consume_keys(
        self,
        mmas: Mmas,
        tiles: Tiles,
        pipelines: Pipelines,
        problem: Problem,
        saved: Workspace,
        work: Work,
        gradients: Gradients,
    ):
        """Warpgroup 2: dK."""
        index = cute.arch.thread_idx()[0] - 256
        own = (tiles.v, tiles.do, tiles.q)
        consumer = self.make_consumer(index, mmas, mmas.dk, self.cfg.head_dim, own, tiles)
        cute.arch.barrier_arrive(barrier_id=Barrier.P_EMPTY, number_of_threads=CONSUMER_THREADS)
        if work.order.count > 0:
            once = self.prepare_keys(tiles, pipelines, work, index + 128)
            pipelines.v.consumer_wait(once)
            step = partial(self.step_keys, mmas, tiles, pipelines, problem, saved, work, consumer)
            self.for_each_row_block(step, problem, work, None)
            warpgroup.wait_group(0)
            pin(consumer.acc)
        for i in cutlass.range_constexpr(cute.size(consumer.acc)):
            consumer.acc[i] = consumer.acc[i] * problem.scale
        cute.arch.barrier(barrier_id=Barrier.CONSUMERS, number_of_threads=CONSUMER_THREADS)
        index, saved_keys = opaque(index), tiles.keys
        place = (saved_keys[0], saved_keys[1], Sequence(*(saved_keys[i] for i in range(2, 5))))
        self.common.store_dk.store(
            consumer.acc, mmas.dk, tiles.k[None, None, 0], gradients.tma_dk, gradients.dk, place,
            index, self.cfg.varlen,
        )  # fmt: skip

    def make_consumer(
        self, index: Int32, mmas: Mmas, mma: cute.TiledMma, columns: int, own: tuple, tiles: Tiles
    ) -> Consumer:
        """`own`: the tiles of its rows, of its stages, and of its gradient's B operand."""
        cfg, (rows, stages, factor) = self.cfg, own
        identity = cute.make_identity_tensor((cfg.tile_n, cfg.tile_m))
        # Descriptors from the warpgroup's first thread: warp-uniform, so in uniform registers.
        sdp, gradient = mmas.sdp.get_slice(0), mma.get_slice(0)
        dq = mmas.dq.get_slice(consumer_warpgroup() * 128)
        scores = cute.make_rmem_tensor(mmas.sdp.partition_shape_C((64, cfg.tile_m)), Float32)
        acc = cute.make_rmem_tensor(mma.partition_shape_C((64, columns)), Float32)
        acc.fill(0.0)
        pin(acc)  # else the zeros are moved behind the fence of the first WGMMA
        return Consumer(
            index=index,
            coordinates=rows_and_columns(mmas.sdp.get_slice(index).partition_C(identity)),
            rows=wgmma.Operand.of(sdp.partition_A(rows[None, None, 0])),
            stages=wgmma.Operand.of(sdp.partition_B(stages)),
            columns=wgmma.Operand.of(gradient.partition_B(permute(factor, (1, 0, 2)))),
            packed=PackedFragment.like(scores, self.dtype),
            acc=acc,
            ds=wgmma.Operand.of(dq.partition_A(tiles.ds)),
            k_columns=wgmma.Operand.of(dq.partition_B(permute(tiles.k[None, None, 0], (1, 0)))),
        )

    @cute.jit
    def prepare_keys(self, tiles: Tiles, pipelines: Pipelines, work: Work, index: Int32):
        """K and V without what lies behind the sequence; the state of their pipelines."""
        once = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
        if const_expr(self.cfg.varlen):
            pipelines.k.consumer_wait(once)
            pipelines.v.consumer_wait(once)
            valid = work.keys.length - work.n_block * self.cfg.tile_n
            for tile, name in ((tiles.k, "k"), (tiles.v, "v")):
                self.common.zero_fill(tile, name, 0, valid, index, Barrier.CONSUMERS)
        return once

    @cute.jit
    def for_each_row_block(self, step, problem: Problem, work: Work, mask: Optional[Mask]):
        """`step` for all row blocks of all heads; returns the number and dQ address of the last.

        Both kinds of step get the same, `step_keys` without use for the address before or a mask.

        Who has a mask gets it where it hides anything.
        """
        order, head = work.order, work.head_kv * problem.qhead_per_kvhead
        address = step(Int32(0), Int64(0), head, Int32(0), mask, first=True)
        number, start = Int32(1), Int32(1)
        for h in cutlass.range(problem.qhead_per_kvhead, unroll=1):
            begin, end = start, order.count
            if const_expr(mask is not None):
                begin, end = maximum(start, order.unmasked_begin), order.unmasked_end
            if const_expr(mask is not None and self.cfg.mask == "local"):
                for i in cutlass.range(start, order.unmasked_begin, unroll=1):
                    address = step(number, address, head + h, i, mask, first=False)
                    number += 1
            for i in cutlass.range(begin, end, unroll=1):
                address = step(number, address, head + h, i, None, first=False)
                number += 1
            if const_expr(mask is not None):
                for i in cutlass.range(maximum(start, end), order.count, unroll=1):
                    address = step(number, address, head + h, i, mask, first=False)
                    number += 1
            start = Int32(0)
        return number - 1, address

    @cute.jit
    def clear_rows(
        self, tiles: Tiles, pipelines: Pipelines, work: Work, state, m_block: Int32, index: Int32
    ):
        """Both consumers together: Q and dO of the last row block without what lies behind it."""
        valid = work.queries.length - m_block * self.cfg.tile_m
        if valid < self.cfg.tile_m:
            pipelines.q.consumer_wait(state)
            pipelines.do.consumer_wait(state)
            for tile, name in ((tiles.q, "q"), (tiles.do, "do")):
                self.common.zero_fill(tile, name, state.index, valid, index, Barrier.CONSUMERS)

    @cute.jit
    def step_values(
        self,
        mmas: Mmas,
        tiles: Tiles,
        pipelines: Pipelines,
        problem: Problem,
        saved: Workspace,
        work: Work,
        consumer: Consumer,
        number: Int32,
        address_before: Int64,
        head: Int32,
        i: Int32,
        mask: Optional[Mask],
        first: cutlass.Constexpr,
    ):
        """S, P and dV of row block `number`; dQ of the one before.  Returns its dQ's address."""
        state, m_block = stage_of(number), work.order.block(i)
        if const_expr(self.cfg.varlen):
            self.clear_rows(tiles, pipelines, work, state, m_block, consumer.index)
        acc = cute.make_rmem_tensor(mmas.sdp.partition_shape_C((64, self.cfg.tile_m)), Float32)
        pipelines.q.consumer_wait(state)
        q_block = consumer.stages.stage(state.index)
        wgmma.issue(acc, consumer.rows, q_block, accumulate=False)
        warpgroup.wait_group(0)
        pin(acc)
        scores = Scores(acc, consumer.packed, consumer.coordinates, self.cfg.tile_m)
        scores.exponentiate(tiles.lse[None, state.index], problem, mask, m_block)
        pipelines.q.consumer_release(state)
        cute.arch.barrier(barrier_id=Barrier.P_EMPTY, number_of_threads=CONSUMER_THREADS)
        cute.autovec_copy(self.as_vectors(acc), self.exchange(tiles, consumer.index))
        cute.arch.barrier_arrive(barrier_id=Barrier.P_FULL, number_of_threads=CONSUMER_THREADS)
        if const_expr(problem.softcap is None):
            consumer.packed.convert(acc)
        pipelines.do.consumer_wait(state)
        do_block = consumer.columns.stage(state.index)
        p = consumer.packed
        wgmma.issue(consumer.acc, p, do_block, accumulate=True)
        if const_expr(not first):
            before = stage_of(number - 1)
            self.add_dq(pipelines, problem, consumer, before, address_before)
        warpgroup.wait_group(0)
        pipelines.do.consumer_release(state)
        return self.common.address_of_dq(saved, work, head, m_block, consumer.index)

    @cute.jit
    def step_keys(
        self,
        mmas: Mmas,
        tiles: Tiles,
        pipelines: Pipelines,
        problem: Problem,
        saved: Workspace,
        work: Work,
        consumer: Consumer,
        number: Int32,
        address_before: Int64,
        head: Int32,
        i: Int32,
        mask: Optional[Mask],
        first: cutlass.Constexpr,
    ):
        """dP, dS, dK and dQ of row block `number`; dK is left under way if there are registers."""
        state, m_block = stage_of(number), work.order.block(i)
        if const_expr(self.cfg.varlen):
            self.clear_rows(tiles, pipelines, work, state, m_block, consumer.index + 128)
        acc = cute.make_rmem_tensor(mmas.sdp.partition_shape_C((64, self.cfg.tile_m)), Float32)
        pipelines.do.consumer_wait(state)
        scores = Scores(acc, consumer.packed, consumer.coordinates, self.cfg.tile_m)
        scores.start_with(tiles.delta[None, state.index])
        do_block = consumer.stages.stage(state.index)
        wgmma.issue(acc, consumer.rows, do_block, accumulate=True)
        if const_expr(self.cfg.gradient_stays_under_way and not first):
            warpgroup.wait_group(1)
            pipelines.q.consumer_release(stage_of(number - 1))
        warpgroup.wait_group(0)
        pin(acc)
        pipelines.do.consumer_release(state)
        cute.arch.barrier(barrier_id=Barrier.P_FULL, number_of_threads=CONSUMER_THREADS)
        p = cute.make_rmem_tensor_like(acc)
        cute.autovec_copy(self.exchange(tiles, consumer.index), self.as_vectors(p))
        cute.arch.barrier_arrive(barrier_id=Barrier.P_EMPTY, number_of_threads=CONSUMER_THREADS)
        for j in cutlass.range_constexpr(cute.size(acc)):
            acc[j] = acc[j] * p[j]
        consumer.packed.convert(acc)
        self.store_ds(mmas, tiles, pipelines, consumer, state)
        address = self.common.address_of_dq(saved, work, head, m_block, consumer.index)
        pipelines.q.consumer_wait(state)
        self.add_dq(pipelines, problem, consumer, state, address, with_gradient=True)
        if const_expr(not self.cfg.gradient_stays_under_way):
            warpgroup.wait_group(0)
            pipelines.q.consumer_release(state)
        return address

    def as_vectors(self, acc: cute.Tensor) -> cute.Tensor:
        return cute.make_tensor(acc.iterator, cute.make_layout((4, cute.size(acc) // 4)))

    def exchange(self, tiles: Tiles, index: Int32) -> cute.Tensor:
        """(4, vectors): where thread `index` of "values" leaves P for its peer of "keys"."""
        vectors = self.cfg.tile_n * self.cfg.tile_m // 512
        start = (tiles.p + index * 4).align(16)
        return cute.make_tensor(start, cute.make_layout((4, vectors), stride=(1, 512)))

    @cute.jit
    def store_ds(self, mmas: Mmas, tiles: Tiles, pipelines: Pipelines, consumer: Consumer, state):
        stmatrix = cute.make_copy_atom(warp.StMatrix8x8x16bOp(True, 4), self.dtype)
        copy = cute.make_tiled_copy_C(stmatrix, mmas.sdp)
        target = copy.get_slice(consumer.index).partition_D(permute(tiles.ds, (1, 0, 2)))
        cute.copy(copy, copy.retile(consumer.packed.view), target[None, None, None, state.index])
        cute.arch.fence_proxy("async.shared", space="cta")  # by every writer, then the barrier
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(pipelines.ds + state.index)

    @cute.jit
    def add_dq(
        self,
        pipelines: Pipelines,
        problem: Problem,
        consumer: Consumer,
        state,
        address: Int64,
        with_gradient: cutlass.Constexpr = False,
    ):
        """This consumer's half of dQ of the row block in `state`, added to global memory.

        `with_gradient`: the MMA of dK is issued behind it and left under way.
        """
        acc = self.dq_tile.accumulator()
        cute.arch.mbarrier_wait(pipelines.ds + state.index, state.phase)
        ds_block = consumer.ds.stage(state.index)
        wgmma.issue(acc, ds_block, consumer.k_columns, accumulate=False)
        if const_expr(with_gradient):
            q_block = consumer.columns.stage(state.index)
            wgmma.issue(consumer.acc, consumer.packed, q_block, accumulate=True)
            warpgroup.wait_group(1)
        else:
            warpgroup.wait_group(0)
        pin(acc)
        self.common.add_dq(acc, address, problem)
