"""Quantisation to FP8 for attention, stated plainly: scales by recipe, rotation, centring.

x is approximated by `values * descale`, where `descale` covers, by recipe:

    per_tensor  (1,)                               everything
    per_head    (batch, heads_kv)                  the rows that meet one key head
    block64     (batch, heads, ceil(seqlen / 64))  64 successive rows of a head; 128 with block128
"""

from __future__ import annotations

import enum
import functools
from typing import NamedTuple

import torch
from torch import Tensor

LEAST = 1e-12
"""Of a descale: what is all zeros needs some."""


class Recipe(str, enum.Enum):
    PER_TENSOR = "per_tensor"
    PER_HEAD = "per_head"
    BLOCK64 = "block64"
    BLOCK128 = "block128"

    @property
    def rows(self) -> int | None:
        """Of a block."""
        return {Recipe.BLOCK64: 64, Recipe.BLOCK128: 128}.get(self)


class Quantized(NamedTuple):
    values: Tensor
    """(batch, seqlen, heads, head_dim), FP8."""
    descale: Tensor
    """float32."""


def quantize(
    x: Tensor,
    recipe: Recipe,
    *,
    heads_kv: int | None = None,
    hadamard: bool = False,
    centered: bool = False,
    octaves: bool = False,
    transposed: bool = False,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> Quantized:
    """FP8 values with the largest scales that do not saturate.

    Args:
        x: (batch, seqlen, heads, head_dim), any float dtype.
        heads_kv: of keys, where x are queries: with per_head, the heads of a group share a scale.
        hadamard: x is rotated first (`rotated`); queries and keys must be both or neither.
        centered: the mean over seqlen of each channel is taken off first.  Of keys: it adds the
            same number to all scores of a query, which softmax does not see.
        octaves: descales of blocks differ from the largest of their head by powers of two.  Of V:
            the kernel multiplies P by the ratio before it rounds it, and what was 1 remains exact.
        transposed: values lie in memory with successive rows next to each other, each column
            starting at a multiple of 16 bytes, as the second GEMM wants V.
    """
    x = x.float()
    if centered:
        x = x - x.mean(dim=1, keepdim=True)
    if hadamard:
        x = rotated(x)
    descale = descale_of(x, recipe, heads_kv, torch.finfo(dtype).max)
    if octaves and descale.ndim == 3:
        descale = in_octaves(descale)
    values = (x / spread(descale, x)).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return Quantized(_stored(values.to(dtype), transposed), descale)


def descale_of(x: Tensor, recipe: Recipe, heads_kv: int | None, largest: float) -> Tensor:
    """What maps the greatest magnitude that shares it to the format's greatest number."""
    batch, seqlen, heads, _ = x.shape
    if recipe is Recipe.PER_TENSOR:
        top = x.abs().amax().reshape(1) if x.numel() else x.new_zeros(1)
    elif recipe is Recipe.PER_HEAD:
        tops = x.abs().amax(dim=(1, 3)) if seqlen else x.new_zeros(batch, heads)
        top = tops.unflatten(1, (heads_kv or heads, -1)).amax(dim=2)
    else:
        rows = recipe.rows
        assert rows is not None
        padded = torch.nn.functional.pad(x.abs().amax(dim=3), (0, 0, 0, -seqlen % rows))
        top = padded.unflatten(1, (-1, rows)).amax(dim=2).transpose(1, 2)
    return (top / largest).clamp(min=LEAST).contiguous()


def in_octaves(descale: Tensor) -> Tensor:
    """The least that are not smaller and powers of two below the largest of their head."""
    largest = descale.amax(dim=2, keepdim=True)
    _, exponent = torch.frexp(largest / descale)  # of a mantissa from 1/2: one more than log2's
    return torch.ldexp(largest, 1 - exponent)


def spread(descale: Tensor, x: Tensor) -> Tensor:
    """The factor of every row of x, (batch, seqlen, heads, 1), or of everything."""
    _, seqlen, heads, _ = x.shape
    if descale.ndim < 2:
        return descale.reshape(1, 1, 1, 1)
    if descale.ndim == 2:
        return descale.repeat_interleave(heads // descale.shape[1], dim=1)[:, None, :, None]
    rows = block_rows(descale.shape[2], seqlen)
    return descale.repeat_interleave(rows, dim=2)[:, :, :seqlen].transpose(1, 2)[..., None]


def block_rows(blocks: int, seqlen: int) -> int:
    """Rows of a block, by how many blocks there are.  Raises ValueError if neither 64 nor 128."""
    for rows in (128, 64):
        if blocks == -(-seqlen // rows):
            return rows
    raise ValueError(f"{blocks} blocks for {seqlen} rows; blocks have 64 or 128 rows")


def rotated(x: Tensor) -> Tensor:
    """x D H / sqrt(n): random signs D and Hadamard's matrix H of n, head_dim's greatest power of 2.

    Of head dims that are no power of two, parts of n columns are rotated each by itself.  Scores of
    rotated queries and keys are what they were, but outliers are spread over n columns (QuIP,
    arXiv 2307.13304; FlashAttention-3, arXiv 2407.08608, section 3.3).
    """
    head_dim = x.shape[-1]
    n = head_dim & -head_dim
    parts = (x * signs(head_dim).to(x)).unflatten(-1, (-1, n))
    return (parts @ hadamard_matrix(n).to(x)).flatten(-2)


@functools.cache
def hadamard_matrix(n: int) -> Tensor:
    """Sylvester's, orthonormal; n a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), matrix)
    return matrix / n**0.5


@functools.cache
def signs(head_dim: int) -> Tensor:
    """+-1 a column, always the same."""
    generator = torch.Generator().manual_seed(0x4841)
    return torch.randint(0, 2, (head_dim,), generator=generator, dtype=torch.float64) * 2 - 1


def _stored(values: Tensor, transposed: bool) -> Tensor:
    if not transposed:
        return values.contiguous()
    batch, seqlen, heads, head_dim = values.shape
    room = values.new_empty((batch, heads, head_dim, -(-seqlen // 16) * 16))
    columns = room[..., :seqlen].permute(0, 3, 1, 2)
    columns.copy_(values)
    return columns
