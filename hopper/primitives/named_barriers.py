"""Named barriers of a block, and the turns that its consumer warpgroups take."""

from dataclasses import dataclass
from enum import IntEnum

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from hopper_attention.cute_kernels.primitives.fragments import opaque


class Barrier(IntEnum):
    """Named barriers of a block; 0 is __syncthreads."""

    CONSUMERS = 1
    """All consumer threads."""
    TURN = 2
    """TURN + w: consumer w may issue its GEMMs."""
    QUERIES = 5
    """QUERIES + w: the threads of consumer w."""


def consumer_warpgroup() -> Int32:
    """Index of the calling consumer warpgroup, warp-uniform; warpgroup 0 is the producer."""
    return cute.arch.make_warp_uniform(cute.arch.warp_idx()) // 4 - 1


@dataclass(frozen=True)
class GemmTurns:
    """Ping-pong: consumers issue their GEMMs in turn, 0, 1, ..., 0, ...

    Barrier TURN + w completes when consumer w waits for its turn and the one before has given it.
    """

    own: Int32
    """Barrier of this consumer warpgroup."""
    following: Int32
    """Barrier of the one whose turn comes next."""

    @staticmethod
    @cute.jit
    def start(warpgroups: cutlass.Constexpr):
        """The last one gives the first one its first turn."""
        warpgroup = consumer_warpgroup()
        following = warpgroup + 1 if warpgroup < warpgroups - 1 else 0
        turns = GemmTurns(opaque(warpgroup + Barrier.TURN), opaque(following + Barrier.TURN))
        if warpgroup == warpgroups - 1:
            turns.give()
        return turns

    def wait(self) -> None:
        """Before the GEMMs are issued."""
        cute.arch.barrier(barrier_id=self.own, number_of_threads=256)

    def give(self) -> None:
        """When they are."""
        cute.arch.barrier_arrive(barrier_id=self.following, number_of_threads=256)


class NoTurns:
    """Consumers issue their GEMMs whenever they can."""

    def wait(self) -> None: ...

    def give(self) -> None: ...
