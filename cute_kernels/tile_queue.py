"""How a persistent block gets its next tile, and how the producer tells the consumers."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32, Int64

STAGES = 2
"""A number is published at the start of a tile and read at its end; the producer may be ahead."""


@dataclass(frozen=True)
class TileQueue:
    """Block b starts with tile b; then tiles go to whoever is free first."""

    counter: Int64
    """Address of two int32 in global memory, zero before and after the launch."""
    slots: cute.Tensor
    """(STAGES,) int32 in shared memory."""
    pipe: pipeline.PipelineAsync

    @staticmethod
    def create(counter: Int64, slots: cute.Tensor, barriers: cute.Pointer, consumer_warps: int):
        """Barriers are initialised, not yet synchronised."""
        group, thread = pipeline.CooperativeGroup, pipeline.Agent.Thread
        pipe = pipeline.PipelineAsync.create(
            num_stages=STAGES,
            producer_group=group(thread),
            consumer_group=group(thread, consumer_warps),
            barrier_storage=barriers,
            defer_sync=True,
        )
        return TileQueue(counter, slots, pipe)

    @cute.jit
    def publish(self, state: pipeline.PipelineState) -> Int32:
        """By the producer warp: the number of its next tile, for the consumers too."""
        following = Int32(0)
        if cute.arch.lane_idx() == 0:
            following = cute.arch.grid_dim()[0] + cute.arch.atomic_add(self.place(0), Int32(1))
        following = cute.arch.shuffle_sync(following, 0)
        self.pipe.producer_acquire(state)
        with cute.arch.elect_one():
            self.slots[state.index] = following
            self.pipe.producer_commit(state)
        return following

    @cute.jit
    def next(self, state: pipeline.PipelineState) -> Int32:
        """By every consumer warp at the end of a tile: what the producer published at its start."""
        self.pipe.consumer_wait(state)
        following = self.slots[state.index]
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            self.pipe.consumer_release(state)
        return following

    @cute.jit
    def finish(self):
        """By the producer warp: the last block to finish leaves the counter as it was found."""
        if cute.arch.lane_idx() == 0:
            finished = cute.arch.atomic_add(self.place(1), Int32(1))
            if finished == cute.arch.grid_dim()[0] - 1:
                counts = cute.make_tensor(self.place(0), cute.make_layout(2))
                counts[0] = Int32(0)
                counts[1] = Int32(0)

    def place(self, index: int) -> cute.Pointer:
        address = self.counter + 4 * index
        return cute.make_ptr(cutlass.Int32, address, cute.AddressSpace.gmem, assumed_align=4)
