"""What the quantisation kernels compute, in plain PyTorch: what `quantize` gives without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hopper_attention.arguments import WHOLE, Lengths

COLUMN_BLOCK = 128
"""Keys: packed sequences start at multiples of it in V's columns."""
INTERLEAVED = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
"""Which of 16 keys a place of V's columns has: as P lies in registers (`Fp8Fragment`)."""


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of (batch, seqlen, heads, head_dim) lie."""

    rows: Tensor
    """That tensor; packed ones are one batch entry."""
    places: list[tuple[int, int, int]]
    """(batch entry, offset, length)"""

    @staticmethod
    def of(x: Tensor, lengths: Lengths) -> Sequences:
        cu_seqlens, seqused = lengths.cu_seqlens, lengths.seqused
        rows = batched(x, lengths)
        batch, seqlen = rows.shape[:2]
        places = [(i, 0, seqlen) for i in range(batch)]
        if cu_seqlens is not None:
            ends = cu_seqlens.tolist()
            places = [(0, start, end - start) for start, end in zip(ends, ends[1:])]
        if seqused is not None:
            used = seqused.tolist()
            places = [(entry, start, n) for (entry, start, _), n in zip(places, used)]
        return Sequences(rows, places)


def batched(x: Tensor, lengths: Lengths) -> Tensor:
    """(batch, seqlen, heads, head_dim): packed rows as one batch entry."""
    return x if lengths.cu_seqlens is None else x.unsqueeze(0)


def number_of_sequences(x: Tensor, lengths: Lengths) -> int:
    return x.shape[0] if lengths.cu_seqlens is None else lengths.cu_seqlens.shape[0] - 1


def arranged_shape(v: Tensor, lengths: Lengths) -> tuple[int, int, int, int]:
    """Of `columns_of(v, lengths)`."""
    *_, heads, head_dim = v.shape
    if lengths.cu_seqlens is None:
        batch, seqlen = v.shape[:2]
        return batch, heads, head_dim, -(-seqlen // 16) * 16
    blocks = v.shape[0] // COLUMN_BLOCK + number_of_sequences(v, lengths)
    return 1, heads, head_dim, blocks * COLUMN_BLOCK


def arranged_columns(v: Tensor, lengths: Lengths = WHOLE) -> Tensor:
    """`columns_of`; zeros everywhere behind a sequence's last key."""
    out = torch.zeros(arranged_shape(v, lengths), dtype=torch.uint8, device=v.device)
    sequences = Sequences.of(v, lengths)
    for i, (entry, offset, length) in enumerate(sequences.places):
        keys = sequences.rows[entry, offset : offset + length].view(torch.uint8)
        groups = torch.nn.functional.pad(keys, (0, 0, 0, 0, 0, -length % 16)).unflatten(0, (-1, 16))
        columns = groups[:, INTERLEAVED].flatten(0, 1).permute(1, 2, 0)
        start = (offset // COLUMN_BLOCK + i - entry) * COLUMN_BLOCK
        out[entry, :, :, start : start + columns.shape[2]] = columns
    return out.view(v.dtype)
