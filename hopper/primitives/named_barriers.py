"""Named barriers of a block, and the ping-pong order of its consumer warpgroups."""

from dataclasses import dataclass
from enum import IntEnum

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from hopper_attention.cute_kernels.primitives.fragments import opaque


class NamedBarrier(IntEnum):
    """Named barriers of a block; 0 is __syncthreads."""

    CONSUMERS = 1
    """All consumer threads."""
    PING_PONG = 2
    """PING_PONG + w: consumer w may issue its GEMMs."""
    QUERIES = 5
    """QUERIES + w: the threads of consumer w."""


def consumer_warpgroup() -> Int32:
    """Index of the calling consumer warpgroup, warp-uniform; warpgroup 0 is the producer."""
    return cute.arch.make_warp_uniform(cute.arch.warp_idx()) // 4 - 1


@dataclass(frozen=True)
class PingPong:
    """Ping-pong: consumers issue their GEMMs in turn, 0, 1, ..., 0, ...

    Barrier PING_PONG + w completes when consumer w waits for its turn and the one before has
    signalled that its own is over.
    """

    own: Int32
    """The barrier of this consumer warpgroup."""
    following: Int32
    """The barrier of the one whose turn comes next."""

    @staticmethod
    @cute.jit
    def start(warpgroups: cutlass.Constexpr):
        """The last one signals to the first one that it may begin."""
        warpgroup = consumer_warpgroup()
        following = warpgroup + 1 if warpgroup < warpgroups - 1 else 0
        ping_pong = PingPong(
            opaque(warpgroup + NamedBarrier.PING_PONG), opaque(following + NamedBarrier.PING_PONG)
        )
        if warpgroup == warpgroups - 1:
            ping_pong.signal()
        return ping_pong

    def wait(self) -> None:
        """Wait until this consumer may issue its GEMMs."""
        cute.arch.barrier(barrier_id=self.own, number_of_threads=256)

    def signal(self) -> None:
        """Let the following consumer issue its GEMMs, when these are issued."""
        cute.arch.barrier_arrive(barrier_id=self.following, number_of_threads=256)

    def pass_turn(self) -> None:
        """Issue nothing in this consumer's turn."""
        self.wait()
        self.signal()


class NoPingPong:
    """Consumers issue their GEMMs whenever they can."""

    def wait(self) -> None: ...

    def signal(self) -> None: ...

    def pass_turn(self) -> None: ...
