"""The quantisation kernels' results in plain PyTorch, which `quantize` gives without a GPU.

Sequences of their own lengths are gathered into one tensor first, (sequences, longest, heads,
head_dim), float32, zeros behind their last rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hopper_attention.cute_kernels.conventions import BLOCK_ROWS, LEAST_DESCALE, OCTAVES
from hopper_attention.problem.quantization import (
    QuantizationRequest,
    Quantized,
    Recipe,
    Rotary,
    number_of_sequences,
)
from hopper_attention.problem.values import DENSE, Lengths

INTERLEAVED = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
"""Which of 16 keys a place of V's columns has: as P lies in registers (`Fp8Fragment`)."""


@dataclass(frozen=True)
class Sequences:
    """The places of sequences in (batch, seqlen, heads, head_dim)."""

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

    @property
    def lengths(self) -> list[int]:
        return [length for _, _, length in self.places]

    @property
    def counts(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.rows.device)

    def gathered(self) -> Tensor:
        shape = (len(self.places), max(self.lengths, default=0), *self.rows.shape[2:])
        found = torch.zeros(shape, device=self.rows.device)
        for i, (entry, start, length) in enumerate(self.places):
            found[i, :length] = self.rows[entry, start : start + length].float()
        return found

    def scattered(self, values: Tensor, out: Tensor) -> Tensor:
        """Put gathered rows back to their places in `out`, whose other rows stay."""
        for i, (entry, start, length) in enumerate(self.places):
            out[entry, start : start + length] = values[i, :length]
        return out


def batched(x: Tensor, lengths: Lengths) -> Tensor:
    """(batch, seqlen, heads, head_dim): packed rows as one batch entry."""
    return x if lengths.cu_seqlens is None else x.unsqueeze(0)


def quantize_reference(x: Tensor, request: QuantizationRequest) -> Quantized:
    """`quantize.quantize`, step by step on whole tensors."""
    sequences = Sequences.of(x, request.lengths)
    rows = sequences.gathered()
    if request.rotary is not None:
        rows = embedded(rows, request.rotary)
    if request.centered:
        exists = torch.arange(rows.shape[1], device=x.device) < sequences.counts[:, None]
        rows = torch.where(exists[..., None, None], rows - means(rows, sequences.counts), 0)
    if request.hadamard:
        rows = rotated(rows)
    recipe, dtype = request.recipe, request.dtype
    largest = torch.finfo(dtype).max
    descale = descale_of(rows, recipe, request.heads_kv, largest)
    if recipe.rows is not None:
        longest = x.shape[-3] if request.max_seqlen is None else request.max_seqlen
        blocks = -(-longest // recipe.rows)
        behind = (0, blocks - descale.shape[2])
        descale = torch.nn.functional.pad(descale, behind, value=LEAST_DESCALE)
        if request.octaves:
            descale = power_of_two_scale(descale)
    factor = _of_rows(descale, recipe.rows, rows)
    values = (rows / factor).clamp(-largest, largest).to(dtype)
    out = torch.zeros(sequences.rows.shape, dtype=dtype, device=x.device)
    out = sequences.scattered(values, out).view(x.shape)
    if request.arranged:
        out = arranged_columns(out, request.lengths)
    return Quantized(out, descale)


def means(rows: Tensor, counts: Tensor) -> Tensor:
    """Return means by sequence, head and channel: (sequences, 1, heads, head_dim)."""
    return rows.sum(dim=1, keepdim=True) / counts.clamp(min=1).view(-1, 1, 1, 1)


def narrowed_reference(
    x: Tensor, arranged: bool, lengths: Lengths = DENSE, max_seqlen: int | None = None
) -> Quantized:
    """`narrowed`, but for the given descale: instead of descales there are the powers of two."""
    sequences = Sequences.of(x, lengths)
    rows = sequences.gathered()
    blocks = -(-(x.shape[-3] if max_seqlen is None else max_seqlen) // 64)
    amax = block_amax(rows, 64)
    amax = torch.nn.functional.pad(amax, (0, blocks - amax.shape[2]))
    _, exponent = torch.frexp(amax)  # of a mantissa from 1/2
    steps = (exponent - 1 - 8).clamp(min=-7)  # 448 is 1.75 * 2^8
    factor = torch.where(amax < torch.inf, torch.ldexp(torch.ones_like(amax), steps), amax)
    values = (rows / _of_rows(factor, 64, rows)).to(torch.float8_e4m3fn)
    out = torch.zeros(sequences.rows.shape, dtype=values.dtype, device=x.device)
    out = sequences.scattered(values, out).view(x.shape)
    return Quantized(arranged_columns(out, lengths) if arranged else out, factor.contiguous())


def embedded(rows: Tensor, rotary: Rotary) -> Tensor:
    """Every product and sum rounded to float32; zeros behind the last row stay."""
    longest, half = rows.shape[1], rotary.cos.shape[1]
    offsets = torch.as_tensor(rotary.offsets, device=rows.device).view(-1, 1)
    positions = offsets + torch.arange(longest, device=rows.device)
    positions = positions.clamp(max=len(rotary.cos) - 1)  # rows that do not exist
    cos, sin = (table.float()[positions].unsqueeze(2) for table in (rotary.cos, rotary.sin))
    turned, rest = rows[..., : 2 * half], rows[..., 2 * half :]
    if rotary.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        pairs = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([pairs, rest], dim=-1)


def descale_of(x: Tensor, recipe: Recipe, heads_kv: int | None, largest: float) -> Tensor:
    """Return descales that map the greatest magnitudes to the format's greatest number."""
    batch, seqlen, heads, _ = x.shape
    if recipe is Recipe.PER_TENSOR:
        top = x.abs().amax().reshape(1) if x.numel() else x.new_zeros(1)
    elif recipe is Recipe.PER_HEAD:
        amax = x.abs().amax(dim=(1, 3)) if seqlen else x.new_zeros(batch, heads)
        top = amax.unflatten(1, (heads_kv or heads, -1)).amax(dim=2)
    else:
        assert recipe.rows is not None
        top = block_amax(x, recipe.rows)
    # On a GPU a division by a number is a multiplication by its reciprocal: another rounding.
    return (top / torch.full_like(top, largest)).clamp(min=LEAST_DESCALE).contiguous()


def block_amax(x: Tensor, rows: int) -> Tensor:
    """(batch, heads, blocks): the greatest magnitudes of so many rows."""
    padded = torch.nn.functional.pad(x.abs().amax(dim=3), (0, 0, 0, -x.shape[1] % rows))
    return padded.unflatten(1, (-1, rows)).amax(dim=2).transpose(1, 2)


def power_of_two_scale(descale: Tensor) -> Tensor:
    """The least that are not smaller and powers of two below the largest of their head.

    At most OCTAVES below: whatever is smaller is rounded to zeros beside the largest.
    """
    if descale.numel() == 0:
        return descale
    largest = descale.amax(dim=2, keepdim=True)
    # Of floats that are not negative: the difference of the exponents, less what mantissas borrow.
    steps = (largest.view(torch.int32) - descale.view(torch.int32)) >> 23
    return torch.ldexp(largest.expand_as(descale), -steps.clamp(0, OCTAVES))


def spread(
    descale: Tensor, x: Tensor, lengths: Lengths = DENSE, max_seqlen: int | None = None
) -> Tensor:
    """The factor of every row of x, (batch, seqlen, heads, 1) or (total, heads, 1), or of all.

    Rows of no sequence have 1.
    """
    if descale.ndim < 2:
        return descale.reshape((1,) * x.ndim)
    rows = None
    if descale.ndim == 3:
        rows = block_rows(descale.shape[2], x.shape[-3] if max_seqlen is None else max_seqlen)
    if not lengths.given:
        return _of_rows(descale, rows, x)
    sequences = Sequences.of(x, lengths)
    shape = (len(sequences.places), max(sequences.lengths, default=0), *x.shape[-2:])
    factor = _of_rows(descale, rows, x.new_empty(shape, device="meta")).expand(*shape[:3], 1)
    out = factor.new_ones((*sequences.rows.shape[:3], 1))
    return sequences.scattered(factor, out).view(*x.shape[:-1], 1)


def _of_rows(descale: Tensor, rows: int | None, x: Tensor) -> Tensor:
    """`spread` of what was gathered; blocks have so many rows, and there may be more of them."""
    _, seqlen, heads, _ = x.shape
    if descale.ndim < 2:
        return descale.reshape(1, 1, 1, 1)
    if descale.ndim == 2:
        return descale.repeat_interleave(heads // descale.shape[1], dim=1)[:, None, :, None]
    assert rows is not None
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


def hadamard_matrix(n: int) -> Tensor:
    """Sylvester's, orthonormal, float64 on the CPU; n a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    pair = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64, device="cpu")
    while len(matrix) < n:
        matrix = torch.kron(pair, matrix)
    return matrix / n**0.5


def signs(head_dim: int) -> Tensor:
    """+-1 a column, always the same, float64 on the CPU.

    It is made anew at every call: one that was kept would remain what the first call's default
    device, inference mode or dispatch mode made of it.
    """
    generator = torch.Generator("cpu").manual_seed(0x4841)
    bits = torch.randint(0, 2, (head_dim,), generator=generator, dtype=torch.float64, device="cpu")
    return bits * 2 - 1


def arranged_shape(v: Tensor, lengths: Lengths) -> tuple[int, int, int, int]:
    """Return the shape of `columns_of(v, lengths)`."""
    *_, heads, head_dim = v.shape
    if lengths.cu_seqlens is None:
        batch, seqlen = v.shape[:2]
        return batch, heads, head_dim, -(-seqlen // 16) * 16
    blocks = v.shape[0] // BLOCK_ROWS + number_of_sequences(v, lengths)
    return 1, heads, head_dim, blocks * BLOCK_ROWS


def arranged_columns(v: Tensor, lengths: Lengths = DENSE) -> Tensor:
    """`columns_of`; zeros everywhere behind a sequence's last key."""
    out = torch.zeros(arranged_shape(v, lengths), dtype=torch.uint8, device=v.device)
    sequences = Sequences.of(v, lengths)
    for i, (entry, offset, length) in enumerate(sequences.places):
        keys = sequences.rows[entry, offset : offset + length].view(torch.uint8)
        groups = torch.nn.functional.pad(keys, (0, 0, 0, 0, 0, -length % 16)).unflatten(0, (-1, 16))
        columns = groups[:, INTERLEAVED].flatten(0, 1).permute(1, 2, 0)
        start = (offset // BLOCK_ROWS + i - entry) * BLOCK_ROWS
        out[entry, :, :, start : start + columns.shape[2]] = columns
    return out.view(v.dtype)
