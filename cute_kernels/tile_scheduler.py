"""Which tile of work a block takes: one tile a block, longest first, K/V of neighbours in L2."""

from dataclasses import dataclass
from typing import Any

from hopper_attention.cute_kernels.arithmetic import ceil_div, maximum, minimum

L2_BYTES = 32 << 20
"""Keys and values of the heads that run at the same time should fit: 50 MB less what streams."""


@dataclass(frozen=True)
class Tile:
    m_block: Any
    head: Any
    batch: Any


@dataclass(frozen=True)
class TileScheduler:
    """Blocks in launch order walk through sections of (batch, head) pairs.

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
        pairs = batch * heads
        resident = maximum(L2_BYTES // key_bytes // maximum(seqlen_k, 1), 1)
        section = minimum(resident * (heads // heads_kv), pairs)
        return TileScheduler(ceil_div(seqlen_q, tile_m), heads, pairs, section)

    @property
    def blocks(self):
        """Size of the one-dimensional grid."""
        return self.m_blocks * self.pairs

    def tile(self, block) -> Tile:
        section_blocks = self.section * self.m_blocks
        first_pair = block // section_blocks * self.section
        within = block % section_blocks
        width = minimum(self.section, self.pairs - first_pair)  # the last section may be narrower
        pair = first_pair + within % width
        return Tile(self.m_blocks - 1 - within // width, pair % self.heads, pair // self.heads)
