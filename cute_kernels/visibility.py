"""Which keys a query sees, and which key blocks a block of query rows must visit.

Query i of a sequence is aligned with key i + seqlen_k - seqlen_q (bottom right: the last query with
the last key).  It sees a contiguous range of keys; both ends never decrease from query to query.
"""

from dataclasses import dataclass
from typing import Any

from hopper_attention.cute_kernels.arithmetic import ceil_div, clamp, maximum, minimum

UNBOUNDED = 1 << 30
"""A window side or a chunk that hides nothing; lengths must be smaller."""


@dataclass(frozen=True)
class Visibility:
    """The mask of one sequence.  Sides and chunk are read for `kind` "local" only."""

    kind: str
    seqlen_q: Any
    seqlen_k: Any
    window_left: Any = UNBOUNDED
    """Keys before the aligned one that are seen."""
    window_right: Any = UNBOUNDED
    chunk: Any = UNBOUNDED
    """Keys are seen only within the aligned key's chunk: [n * chunk, (n + 1) * chunk)."""

    def begin(self, row):
        """First key that query `row` sees."""
        if self.kind != "local":
            return 0
        aligned = row + (self.seqlen_k - self.seqlen_q)
        chunk = maximum(aligned, 0) // self.chunk * self.chunk
        return maximum(aligned - self.window_left, chunk)

    def end(self, row):
        """One past the last key that query `row` sees; not above `begin` if it sees none."""
        if self.kind == "full":
            return self.seqlen_k
        aligned = row + (self.seqlen_k - self.seqlen_q)
        if self.kind == "causal":
            return minimum(aligned + 1, self.seqlen_k)
        chunk_end = (maximum(aligned, 0) // self.chunk + 1) * self.chunk
        return minimum(minimum(aligned + self.window_right + 1, chunk_end), self.seqlen_k)


@dataclass(frozen=True)
class BlockRange:
    """Key blocks [first, end) of `tile_n` keys; [unmasked_first, unmasked_end) need no mask."""

    first: Any
    end: Any
    unmasked_first: Any
    unmasked_end: Any

    @staticmethod
    def of(visibility: Visibility, m_block, tile_m: int, tile_n: int, group=1) -> "BlockRange":
        """For the rows [m_block * tile_m, (m_block + 1) * tile_m), `group` of them a query."""
        first_row = m_block * tile_m
        top = first_row // group
        bottom = minimum((first_row + tile_m - 1) // group, visibility.seqlen_q - 1)
        any_begin = maximum(visibility.begin(top), 0)
        any_end = maximum(visibility.end(bottom), 0)
        all_begin = maximum(visibility.begin(bottom), 0)
        all_end = maximum(visibility.end(top), 0)
        first = any_begin // tile_n
        end = maximum(ceil_div(any_end, tile_n), first)
        unmasked_end = clamp(all_end // tile_n, first, end)
        unmasked_first = clamp(ceil_div(all_begin, tile_n), first, unmasked_end)
        return BlockRange(first, end, unmasked_first, unmasked_end)
