"""Backward's workspace: statistics of every query row, and dQ while it accumulates.

A sequence's rows start at a multiple of WORKSPACE_ROWS and are followed by padding up to the next
one, so that blocks of rows never touch two sequences: with `cu_seqlens`, entry b starts at row
(cu_seqlens[b] + b * WORKSPACE_ROWS) rounded down.  All of it is float32:

    lse    (entries, heads, rows)   LSE * log2(e); +inf in rows without keys and in padding,
                                    where exp2(score - lse) therefore is 0
    delta  (entries, heads, rows)   dLSE - rowsum(dO * O), 0 in padding: what is added to dP
    dq     (entries, heads, rows, tile_head_dim)   dQ / softmax_scale; the elements of a block of
                                    rows in the order that hopper/backward/dq_tile.py or
                                    ampere/dq_bands.py gives them
"""

import cutlass.cute as cute
from cutlass import Int32
from hopper_attention.cute_kernels.conventions import WORKSPACE_ROWS
from hopper_attention.cute_kernels.scheduling.sequence import Sequence


@cute.jit
def first_row(packed: bool, queries: Sequence, batch: Int32) -> Int32:
    """The row of their entry of the workspace at which the rows of sequence `batch` start."""
    row = Int32(0)
    if packed:
        row = (queries.offset + batch * WORKSPACE_ROWS) // WORKSPACE_ROWS * WORKSPACE_ROWS
    return row
