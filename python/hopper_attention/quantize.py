"""Quantisation to FP8 for attention: scales by recipe, rotation, centring, V's layout.

x is approximated by `values * descale`, where `descale` covers, by recipe:

    per_tensor  (1,)                                      everything
    per_head    (sequences, heads_kv)                     the rows that meet one key head
    block64     (sequences, heads, ceil(max_seqlen / 64)) 64 successive rows of a sequence and head;
                                                          128 with block128

Sequences are batch entries, or what `lengths` says: packed, where x is (total, heads, head_dim), or
the used rows of batch entries.  `max_seqlen` is an upper bound of their lengths; blocks behind a
sequence's last have the scale of zeros.  A tensor on a GPU means the same as None: all rows.  On a
GPU, values of rows that are in no sequence are not written; whatever lies there is not read either,
be it NaN.

On a GPU and in the simulator by the kernels of cute_kernels/quantization, else as
reference/quantize.py says.  Both agree bit for bit without rotation and centring, signs of NaN
aside; with them up to the rounding of sums: a value may be one step of the format off.  NaN and
infinity reach all that shares their scale: dequantised it is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hopper_attention.cute_kernels.conventions import LEAST_DESCALE as LEAST
from hopper_attention.launch import quantize as run
from hopper_attention.problem.quantization import QuantizationRequest, Quantized, Recipe, Rotary
from hopper_attention.problem.values import DENSE, Lengths
from hopper_attention.reference.quantize import (
    block_rows,
    quantize_reference,
    rotated,
    signs,
    spread,
)

__all__ = [
    "LEAST", "Lengths", "Quantized", "Recipe", "Rotary", "block_rows", "columns_of", "means_of",
    "narrowed", "quantize", "rotated", "signs", "spread", "stated",
]  # fmt: skip


def quantize(
    x: Tensor,
    recipe: Recipe | str,
    *,
    heads_kv: int | None = None,
    hadamard: bool = False,
    centered: bool = False,
    octaves: bool = False,
    arranged: bool = False,
    dtype: torch.dtype = torch.float8_e4m3fn,
    lengths: Lengths = DENSE,
    max_seqlen: int | Tensor | None = None,
    rotary: Rotary | tuple[Tensor, Tensor] | None = None,
) -> Quantized:
    """FP8 values with the largest scales that do not saturate.

    Args:
        x: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) if `lengths` has
            cu_seqlens; any float dtype; bfloat16 or float16, head_dim a multiple of 8 up to 256,
            for the kernels.
        heads_kv: of keys, where x are queries: with per_head, the heads of a group share a scale.
        hadamard: x is rotated first (`rotated`); queries and keys must be both or neither.
        centered: the mean over its sequence of each channel is taken off first.  Of keys: it adds
            the same number to all scores of a query, which softmax does not see.
        octaves: descales of blocks differ from the largest of their head by powers of two.  Of V:
            the kernel multiplies P by the ratio before it rounds it, and what was 1 remains exact.
        arranged: values come as `columns_of` gives them, as the kernel wants V; head_dim then is a
            multiple of 16.
        dtype: float8_e4m3fn; float8_e5m2 by `stated` only.
        lengths: packed or partly used sequences.
        max_seqlen: an upper bound of their lengths; None: all rows.
        rotary: (cos, sin), or a `Rotary`: queries and keys are embedded before all else; positions
            count from each sequence's start.  rotary_dim is a multiple of 16.

    Raises TypeError, ValueError for arguments that make no sense, NotImplementedError for what has
    no kernel, before anything is launched.
    """
    request = QuantizationRequest.of(
        x, recipe, heads_kv=heads_kv, hadamard=hadamard, centered=centered, octaves=octaves,
        arranged=arranged, dtype=dtype, lengths=lengths, max_seqlen=max_seqlen, rotary=rotary,
    )  # fmt: skip
    return run.quantize(x, request)


def stated(
    x: Tensor,
    recipe: Recipe,
    heads_kv: int | None = None,
    hadamard: bool = False,
    centered: bool = False,
    octaves: bool = False,
    arranged: bool = False,
    dtype: torch.dtype = torch.float8_e4m3fn,
    lengths: Lengths = DENSE,
    max_seqlen: int | None = None,
    rotary: Rotary | None = None,
) -> Quantized:
    """`quantize` by the plain reference in PyTorch, on any device and without checks."""
    request = QuantizationRequest(
        recipe, heads_kv, hadamard, centered, octaves, arranged, dtype, lengths, max_seqlen, rotary
    )
    return quantize_reference(x, request)


def means_of(x: Tensor, lengths: Lengths = DENSE, max_seqlen: int | Tensor | None = None) -> Tensor:
    """(sequences, heads, head_dim) float32: what `centered` takes off."""
    return run.means_of(x, lengths, max_seqlen)


def narrowed(
    x: Tensor,
    descale: Tensor,
    *,
    arranged: bool = False,
    lengths: Lengths = DENSE,
    max_seqlen: int | Tensor | None = None,
) -> Quantized:
    """e5m2 as e4m3, by powers of two: exact, but for what is tiny beside its neighbours.

    Of 64 rows whose greatest value is from 2^E to 2^(E + 1), what is at least 2^(E - 15) is
    represented exactly, what is smaller to the nearest multiple of 2^(E - 17): the error is at most
    2^(E - 18).  If E < 2, everything is exact.

    Args:
        x: as for `quantize`, but float8_e5m2, head_dim a multiple of 16; what cannot be loaded 16
            bytes at a time is copied first.
        descale: of x, float32: (1,), (sequences, heads_kv), or of blocks of 64 or 128 rows.
        arranged, lengths, max_seqlen: as for `quantize`.

    Returns:
        values, and descales of blocks of 64 rows.  They are the given ones times powers of two: of
        V, in octaves, if all rows of a head shared one.
    """
    return run.narrowed(x, descale, arranged=arranged, lengths=lengths, max_seqlen=max_seqlen)


def columns_of(
    v: Tensor, lengths: Lengths = DENSE, max_seqlen: int | Tensor | None = None
) -> Tensor:
    """V^T as the FP8 forward kernel reads it: a column's keys together, interleaved in every 16.

    Args:
        v: (batch, seqlen, heads_kv, head_dim_v), float8_e4m3fn, head_dim_v a multiple of 16; or
            (total, heads_kv, head_dim_v), where `lengths` has cu_seqlens.  Rows or columns may lie
            together; what cannot be loaded 16 bytes at a time is copied first.
        lengths: packed or partly used sequences.
        max_seqlen: an upper bound of their lengths; None: all rows.

    Returns:
        (batch, heads_kv, head_dim_v, seqlen rounded up to 16); of packed sequences (1, heads_kv,
        head_dim_v, (total // 128 + sequences) * 128), where sequence i starts at column
        (cu_seqlens[i] // 128 + i) * 128.  From a sequence's length up to the next multiple of 128
        there are zeros, so far as there is room; what is behind that may be anything.

    Raises TypeError, ValueError, NotImplementedError before anything is launched.
    """
    return run.columns_of(v, lengths, max_seqlen)
