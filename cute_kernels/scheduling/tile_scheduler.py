"""Which tile of work has which number; tile_queue.py says who takes which number."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from hopper_attention.cute_kernels.primitives.arithmetic import ceil_div, maximum, minimum
from hopper_attention.cute_kernels.scheduling.sequence import Lengths

L2_BYTES = 32 << 20
"""Keys and values of the heads that run at the same time should fit: 50 MB less what streams."""


@dataclass(frozen=True)
class Tile:
    m_block: Any
    head: Any
    batch: Any


@dataclass(frozen=True)
class DenseScheduler:
    """Tiles in the order of their numbers walk through sections of (batch, head) pairs.

    Within a section the pair changes fastest and the row block slowest, last rows first: under a
    causal mask those see the most keys, and a long tile started last would leave the GPU idle.
    """

    m_blocks: Any
    heads: Any
    pairs: Any
    """batch * heads"""
    section: Any
    """Pairs whose keys and values share L2."""

    @staticmethod
    def create(seqlen_q, seqlen_k, heads, heads_kv, batch, tile_m: int, key_bytes: int):
        """`key_bytes`: bytes of one key and its value."""
        pairs, group = batch * heads, heads // heads_kv
        resident = maximum(L2_BYTES // key_bytes // maximum(seqlen_k, 1), 1)
        resident = minimum(resident, ceil_div(pairs, group))  # so that the product fits 32 bits
        section = minimum(resident * group, pairs)
        return DenseScheduler(ceil_div(seqlen_q, tile_m), heads, pairs, section)

    @property
    def tiles(self):
        """How many tiles there are: numbers 0 to tiles - 1."""
        return self.m_blocks * self.pairs

    def tile(self, number) -> Tile:
        section_blocks = self.section * self.m_blocks
        first_pair = number // section_blocks * self.section
        within = number % section_blocks
        width = minimum(self.section, self.pairs - first_pair)  # the last section may be narrower
        pair = first_pair + within % width
        return Tile(self.m_blocks - 1 - within // width, pair % self.heads, pair // self.heads)


@dataclass(frozen=True)
class VarlenScheduler:
    """Sequences one after another; of each the row blocks, last first, and of each all heads.

    The host does not know the lengths, so there are as many numbers as there could be row blocks;
    those left over are of batch entry `batch`, which does not exist.
    """

    lengths: Lengths
    batch: Any
    heads: Any
    rows: Any
    """Rows of queries in all, used or not."""
    tile_m: cutlass.Constexpr
    group: Any = 1
    """Rows a query; the heads are then groups of heads (`sequence.TileRows`)."""

    @property
    def tiles(self):
        return (self.rows // self.tile_m + self.batch) * self.heads

    @cute.jit
    def tile(self, number: Int32) -> Tile:
        """A whole warp finds the tile: each lane looks at one sequence of 32."""
        wanted = number // self.heads
        lane = cute.arch.lane_idx()
        first = Int32(0)
        before = Int32(0)  # row blocks of the sequences before `first`
        m_blocks = self.m_blocks(lane)
        until = before + inclusive_sum(m_blocks, lane)
        total = cute.arch.shuffle_sync(until, 31)
        while total <= wanted and first + 32 < self.batch:
            first += 32
            before = total
            m_blocks = self.m_blocks(first + lane)
            until = before + inclusive_sum(m_blocks, lane)
            total = cute.arch.shuffle_sync(until, 31)
        passed = cute.arch.popc(cute.arch.vote_ballot_sync(until <= wanted))
        source = minimum(passed, 31)
        row_block = maximum(cute.arch.shuffle_sync(until, source) - 1 - wanted, 0)
        batch = first + passed if passed < 32 else self.batch
        return Tile(row_block, number % self.heads, minimum(batch, self.batch))

    @cute.jit
    def m_blocks(self, batch: Int32) -> Int32:
        length = Int32(0)
        if batch < self.batch:
            length = self.lengths.of(batch).length
        return ceil_div(length * self.group, self.tile_m)


@cute.jit
def inclusive_sum(value: Int32, lane: Int32) -> Int32:
    """Over the lanes of a warp up to this one."""
    for distance in (1, 2, 4, 8, 16):
        other = cute.arch.shuffle_sync_up(value, distance)
        value = value + (other if lane >= distance else 0)
    return value
