"""Which key blocks a block of query rows attends to.

Query row i of a sequence sees key j if j < seqlen_k and, under a causal mask, j <= i + seqlen_k -
seqlen_q (bottom-right aligned: the last query sees the last key).
"""

from dataclasses import dataclass
from typing import Any

from hopper_attention.cute_kernels.arithmetic import ceil_div, maximum, minimum


@dataclass(frozen=True)
class BlockRange:
    """Key blocks [0, count) of `tile_n` keys; the first `unmasked` of them need no mask."""

    count: Any
    unmasked: Any

    @staticmethod
    def of(m_block, seqlen_q, seqlen_k, tile_m: int, tile_n: int, causal: bool) -> "BlockRange":
        """For query rows [m_block * tile_m, (m_block + 1) * tile_m)."""
        visible_to_all = visible_to_any = seqlen_k
        if causal:
            diagonal = m_block * tile_m + seqlen_k - seqlen_q + 1
            visible_to_all = maximum(minimum(diagonal, seqlen_k), 0)
            visible_to_any = maximum(minimum(diagonal + (tile_m - 1), seqlen_k), 0)
        return BlockRange(ceil_div(visible_to_any, tile_n), visible_to_all // tile_n)
