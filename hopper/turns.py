"""Named barriers of a block, and the ping-pong of its consumer warpgroups."""

from dataclasses import dataclass
from enum import IntEnum

import cutlass
import cutlass.cute as cute
from cutlass import Int32


class Barrier(IntEnum):
    """Named barriers of a block; 0 is __syncthreads."""

    CONSUMERS = 1
    """All consumer threads."""
    TURN = 2
    """TURN + w: consumer w may issue its GEMMs."""


def consumer_warpgroup() -> Int32:
    """Index of the calling consumer warpgroup, warp-uniform; warpgroup 0 is the producer."""
    return cute.arch.make_warp_uniform(cute.arch.warp_idx()) // 4 - 1


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
