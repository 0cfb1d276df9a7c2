"""Which keys a query sees, and which blocks of keys a block of queries must visit; or transposed.

Query i of a sequence is aligned with key i + seqlen_k - seqlen_q (bottom right: the last query with
the last key).  It sees a contiguous range of keys; both ends never decrease from query to query.
"""

from dataclasses import dataclass
from typing import Any

from hopper_attention.cute_kernels.conventions import UNBOUNDED
from hopper_attention.cute_kernels.primitives.arithmetic import (
    ceil_div,
    clamp,
    maximum,
    minimum,
    select,
)


@dataclass(frozen=True)
class MaskRange:
    """The mask of one sequence.  Sides and chunk are read for `kind` "local" only."""

    kind: str
    seqlen_q: Any
    seqlen_k: Any
    window_left: Any = UNBOUNDED
    """Keys before the aligned one that are seen."""
    window_right: Any = UNBOUNDED
    chunk: Any = UNBOUNDED
    """Keys are seen only within the aligned key's chunk: [n * chunk, (n + 1) * chunk)."""

    bounds_end = True
    """False if `end` hides nothing, so that a mask need not look at it."""

    @property
    def bounds_begin(self) -> bool:
        return self.kind == "local"

    @property
    def transposed(self) -> "TransposedMaskRange":
        """This mask from the keys' side."""
        return TransposedMaskRange(self)

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
class TransposedMaskRange:
    """Which queries see a key: a `MaskRange` transposed, again a contiguous range.

    `end` does not know seqlen_q: rows behind the last query are no concern of the mask.
    """

    mask: MaskRange

    bounds_begin = True

    @property
    def bounds_end(self) -> bool:
        return self.mask.kind == "local"

    def begin(self, key):
        """First query that sees `key`; UNBOUNDED for keys that do not exist."""
        mask = self.mask
        return select(key < mask.seqlen_k, self._first_query(key), UNBOUNDED)

    def _first_query(self, key):
        mask = self.mask
        if mask.kind == "full":
            return 0
        aligned = key - (mask.seqlen_k - mask.seqlen_q)
        if mask.kind == "causal":
            return aligned
        # Queries aligned in front of the first key share its chunk.
        chunk = key // mask.chunk * mask.chunk
        chunk_first = select(chunk > 0, chunk - (mask.seqlen_k - mask.seqlen_q), 0)
        return maximum(aligned - mask.window_right, chunk_first)

    def end(self, key):
        """One past the last query that sees `key`, if that is above `begin`."""
        mask = self.mask
        if mask.kind != "local":
            return UNBOUNDED
        shift = mask.seqlen_k - mask.seqlen_q
        chunk_end = (key // mask.chunk + 1) * mask.chunk
        return minimum(key + mask.window_left + 1, chunk_end) - shift


@dataclass(frozen=True)
class BlockRange:
    """Key blocks [first, end) of `tile_n` keys; [unmasked_first, unmasked_end) need no mask."""

    first: Any
    end: Any
    unmasked_first: Any
    unmasked_end: Any

    @staticmethod
    def of(mask_range: MaskRange, m_block, tile_m: int, tile_n: int, group=1) -> "BlockRange":
        """Return the range for rows from m_block * tile_m on, `group` of them a query."""
        first_row = m_block * tile_m
        top = first_row // group
        bottom = minimum((first_row + tile_m - 1) // group, mask_range.seqlen_q - 1)
        any_begin = maximum(mask_range.begin(top), 0)
        any_end = maximum(mask_range.end(bottom), 0)
        all_begin = maximum(mask_range.begin(bottom), 0)
        all_end = maximum(mask_range.end(top), 0)
        first = any_begin // tile_n
        end = maximum(ceil_div(any_end, tile_n), first)
        unmasked_end = clamp(all_end // tile_n, first, end)
        unmasked_first = clamp(ceil_div(all_begin, tile_n), first, unmasked_end)
        return BlockRange(first, end, unmasked_first, unmasked_end)

    @staticmethod
    def within(
        tile: "BlockRange", mask_range: MaskRange, row_block, rows: int, tile_n: int, group=1
    ) -> "BlockRange":
        """Return those of a tile's blocks that rows from row_block * rows on see.

        If they see no key, or do not exist: none, in front of the tile's first block.
        """
        own = BlockRange.of(mask_range, row_block, rows, tile_n, group)
        exist = row_block * rows // group < mask_range.seqlen_q
        end = select(exist, minimum(own.end, tile.end), tile.first)
        some = own.first < end
        first, end = select(some, own.first, tile.first), select(some, end, tile.first)
        unmasked_end = clamp(own.unmasked_end, first, end)
        return BlockRange(first, end, clamp(own.unmasked_first, first, unmasked_end), unmasked_end)

    @staticmethod
    def of_keys(transposed: TransposedMaskRange, n_block, tile_n: int, tile_m: int) -> "BlockRange":
        """Query blocks, for the keys [n_block * tile_n, (n_block + 1) * tile_n) of the sequence.

        Pairs of blocks are the same as `of` has.  A block of which not all keys exist is masked
        throughout: their scores are 0, and their probabilities would not be.
        """
        seqlen_q, seqlen_k = transposed.mask.seqlen_q, transposed.mask.seqlen_k
        top = n_block * tile_n
        bottom = minimum(top + tile_n, seqlen_k) - 1
        any_begin = maximum(transposed.begin(top), 0)
        any_end = clamp(transposed.end(bottom), 0, seqlen_q)
        all_begin = maximum(transposed.begin(top + tile_n - 1), 0)
        all_end = maximum(transposed.end(top), 0)
        first = any_begin // tile_m
        end = maximum(ceil_div(any_end, tile_m), first)
        unmasked_end = clamp(all_end // tile_m, first, end)
        unmasked_first = clamp(ceil_div(all_begin, tile_m), first, unmasked_end)
        return BlockRange(first, end, unmasked_first, unmasked_end)
