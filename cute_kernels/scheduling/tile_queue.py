"""How a persistent block gets its next tile, and how the producer tells the consumers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32, Int64, const_expr

STAGES = 4
"""The producer publishes a tile while it loads the one before, and consumers may still be at the
one before that.  That needs three; by four, divisions are shifts."""


@dataclass(frozen=True)
class TileQueue:
    """Block b starts with tile b; then tiles go to whoever is free first.

    The producer finds out what a tile is and publishes it as a few words.  Consumers look them up
    whenever they need them, which keeps registers free while they compute.
    """

    counter: Int64
    """Address of two int32 in global memory, zero before and after the launch."""
    slots: cute.Tensor
    """(words, STAGES) int32 in shared memory."""
    warpgroups: cutlass.Constexpr
    """Consumers: each has words of its own behind those of all."""
    pipe: pipeline.PipelineAsync

    @staticmethod
    def create(counter: Int64, slots: cute.Tensor, barriers: cute.Pointer, warpgroups: int):
        """Barriers are initialised, not yet synchronised."""
        group, thread = pipeline.CooperativeGroup, pipeline.Agent.Thread
        pipe = pipeline.PipelineAsync.create(
            num_stages=STAGES,
            producer_group=group(thread),
            consumer_group=group(thread, 4 * warpgroups),
            barrier_storage=barriers,
            defer_sync=True,
        )
        return TileQueue(counter, slots, warpgroups, pipe)

    @cute.jit
    def take(self) -> Int32:
        """The producer warp takes the number of its next tile, which arrives in its first lane.

        Nothing waits for it before `taken`.
        """
        following = Int32(0)
        if cute.arch.lane_idx() == 0:
            following = cute.arch.grid_dim()[0] + cute.arch.atomic_add(self.place(0), Int32(1))
        return following

    def taken(self, following: Int32) -> Int32:
        """Return the number that `take` has asked for."""
        return cute.arch.shuffle_sync(following, 0)

    @cute.jit
    def publish(
        self, state: pipeline.PipelineState, words: Sequence[Int32], own: Sequence[Int32] = ()
    ):
        """The producer warp says which tile the consumers do next.

        Lane w's `own` are those of consumer warpgroup w, so that the lanes find them in parallel.
        """
        self.pipe.producer_acquire(state)
        lane = cute.arch.lane_idx()
        if const_expr(len(own) > 0):
            if lane < self.warpgroups:
                place = len(words) + lane * len(own)
                for i in cutlass.range_constexpr(len(own)):
                    self.slots[place + i, state.index] = own[i]
            cute.arch.sync_warp()
        with cute.arch.elect_one():
            for i in cutlass.range_constexpr(len(words)):
                self.slots[i, state.index] = words[i]
            self.pipe.producer_commit(state)
        cute.arch.sync_warp()  # the producer looks the tile up, too

    def read(self, state: pipeline.PipelineState, first: Any, count: int) -> list[Int32]:
        """Words of the tile, between `pipe.consumer_wait` and `release`."""
        return [self.slots[first + i, state.index] for i in range(count)]

    @cute.jit
    def release(self, state: pipeline.PipelineState):
        """Every consumer warp says that it will not look up this tile again."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            self.pipe.consumer_release(state)

    @cute.jit
    def finish(self):
        """The producer warp of the last block to finish leaves the counter as it was found."""
        if cute.arch.lane_idx() == 0:
            finished = cute.arch.atomic_add(self.place(1), Int32(1))
            if finished == cute.arch.grid_dim()[0] - 1:
                counts = cute.make_tensor(self.place(0), cute.make_layout(2))
                counts[0] = Int32(0)
                counts[1] = Int32(0)

    def place(self, index: int) -> cute.Pointer:
        address = self.counter + 4 * index
        return cute.make_ptr(cutlass.Int32, address, cute.AddressSpace.gmem, assumed_align=4)
