"""Named barriers of a block, and the turns that its consumer warpgroups take."""

import functools
import operator
from dataclasses import dataclass
from enum import IntEnum

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32
from hopper_attention.cute_kernels.fragments import opaque


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
class Turns:
    """In which order consumers do what would take longer at the same time.  Here: in any."""

    def before_gemms(self) -> None: ...

    def after_gemms(self) -> None:
        """When they are issued."""

    def before_exponentials(self, k_state: pipeline.PipelineState) -> None:
        """Of the block of K in that stage."""

    def after_exponentials(self, row_sum: cute.Tensor) -> None: ...


@dataclass(frozen=True)
class GemmTurns(Turns):
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
            turns.after_gemms()
        return turns

    def before_gemms(self) -> None:
        cute.arch.barrier(barrier_id=self.own, number_of_threads=256)

    def after_gemms(self) -> None:
        cute.arch.barrier_arrive(barrier_id=self.following, number_of_threads=256)


@dataclass(frozen=True)
class ExponentialTurns(Turns):
    """Warps that share a sub-core use its MUFU one after another: 0, 1, ..., 0, ...

    Where two consumers have their exponentials at the same time, each takes twice as long, and
    then both have GEMMs to wait for.  A warp's turn is a phase of an mbarrier of its own.  As it
    has one for each block of K, the stage of K, of which there is an even number, has its parity.
    """

    own: cute.Pointer
    following: cute.Pointer
    zero: Int32
    """Unknown to ptxas."""

    @staticmethod
    @cute.jit
    def prepare(barriers: cute.Pointer, count: cutlass.Constexpr):
        """By the whole block, which is synchronised before they are used."""
        if cute.arch.thread_idx()[0] == 0:
            for i in cutlass.range_constexpr(count):
                cute.arch.mbarrier_init(barriers + i, 1)

    @staticmethod
    @cute.jit
    def start(barriers: cute.Pointer, warpgroups: cutlass.Constexpr):
        """The last one gives the first one its first turn."""
        warpgroup = consumer_warpgroup()
        following = warpgroup + 1 if warpgroup < warpgroups - 1 else 0
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % 4
        own, next_one = (barriers + 4 * w + warp for w in (warpgroup, following))
        turns = ExponentialTurns(own, next_one, cute.arch.grid_dim()[2] - 1)
        if warpgroup == warpgroups - 1:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(turns.following)
        return turns

    def before_exponentials(self, k_state: pipeline.PipelineState) -> None:
        cute.arch.mbarrier_wait(self.own, k_state.index & 1)

    def after_exponentials(self, row_sum: cute.Tensor) -> None:
        """When the rows are summed: ptxas may do at any time what depends on nothing."""
        sums = [row_sum[i].bitcast(Int32) for i in range(cute.size(row_sum))]
        done = functools.reduce(operator.or_, sums) & self.zero
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(self.following + done)
