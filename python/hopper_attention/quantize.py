"""Quantisation to FP8 for attention: scales by recipe, rotation, centring.

x is approximated by `values * descale`, where `descale` covers, by recipe:

    per_tensor  (1,)                               everything
    per_head    (batch, heads_kv)                  the rows that meet one key head
    block64     (batch, heads, ceil(seqlen / 64))  64 successive rows of a head; 128 with block128

On a GPU and in the simulator by the kernels of cute_kernels/quantize.py, but for `octaves`, else as
`stated`.  Both agree bit for bit without rotation and centring, signs of NaN aside; with them up to
the rounding of sums: a value may be one step of the format off.  NaN and infinity reach all that
shares their scale: dequantised it is NaN.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hopper_attention import arguments, dispatch, runtime, selection
from hopper_attention.ranges import annotated
from hopper_attention.runtime import Backend

LEAST = 1e-12
"""Of a descale: what is all zeros needs some."""
SUM_ROWS = 256
"""Of one sum of the kernel."""
BLOCK_ROWS = 128
"""Of a block of the kernels."""
GRID = 65535
"""Most blocks along the second and third dimension of a grid."""


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
    recipe: Recipe | str,
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
        x: (batch, seqlen, heads, head_dim), any float dtype; bfloat16 or float16, head_dim a
            multiple of 8 up to 256, for the kernels.
        heads_kv: of keys, where x are queries: with per_head, the heads of a group share a scale.
        hadamard: x is rotated first (`rotated`); queries and keys must be both or neither.
        centered: the mean over seqlen of each channel is taken off first.  Of keys: it adds the
            same number to all scores of a query, which softmax does not see.
        octaves: descales of blocks differ from the largest of their head by powers of two.  Of V:
            the kernel multiplies P by the ratio before it rounds it, and what was 1 remains exact.
        transposed: values lie in memory with successive rows next to each other, each column
            starting at a multiple of 16 bytes and filled up with zeros to the next, as the second
            GEMM wants V.
        dtype: float8_e4m3fn; float8_e5m2 by the statement only.

    Raises TypeError, ValueError for arguments that make no sense, NotImplementedError for what has
    no kernel, before anything is launched.
    """
    recipe = _check(x, recipe, heads_kv, dtype)
    backend = runtime.backend_for(x, "x")
    if backend is not Backend.REFERENCE:
        selection.target_for_fp8(x)
        _check_kernels(x, dtype)
    # A block's scale by its head's largest would take the kernels a pass more.
    if backend is Backend.REFERENCE or x.numel() == 0 or (octaves and recipe.rows):
        return stated(x, recipe, heads_kv, hadamard, centered, octaves, transposed, dtype)
    return _run_kernels(backend, x, recipe, heads_kv, hadamard, centered, transposed)


def stated(
    x: Tensor,
    recipe: Recipe,
    heads_kv: int | None = None,
    hadamard: bool = False,
    centered: bool = False,
    octaves: bool = False,
    transposed: bool = False,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> Quantized:
    """What `quantize` gives, in plain PyTorch."""
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
    if descale.numel() == 0:
        return descale
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
    room = values.new_zeros((batch, heads, head_dim, -(-seqlen // 16) * 16))
    columns = _columns(room, seqlen)
    columns.copy_(values)
    return columns


def _columns(room: Tensor, seqlen: int) -> Tensor:
    """(batch, seqlen, heads, head_dim) of (batch, heads, head_dim, at least seqlen)."""
    return room[..., :seqlen].permute(0, 3, 1, 2)


def _check(x: Tensor, recipe: Recipe | str, heads_kv: int | None, dtype: torch.dtype) -> Recipe:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        raise ValueError("x: expected a plain tensor, not a sparse or nested one")
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (batch, seqlen, heads, head_dim)")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; expected a float dtype")
    if recipe not in list(Recipe):
        names = ", ".join(r.value for r in Recipe)
        raise ValueError(f"recipe {recipe!r} is none of {names}")
    if heads_kv is not None and (heads_kv < 1 or x.shape[2] % heads_kv != 0):
        raise ValueError(f"x has {x.shape[2]} heads, not a multiple of heads_kv = {heads_kv}")
    if dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise NotImplementedError(
            f"dtype {dtype}: supported: torch.float8_e4m3fn, torch.float8_e5m2"
        )
    return Recipe(recipe)


def _check_kernels(x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype not in arguments.DTYPES:
        raise NotImplementedError(
            f"x has dtype {x.dtype}; the kernels take torch.bfloat16 and torch.float16 "
            "(nearest: x.bfloat16())"
        )
    if dtype is not torch.float8_e4m3fn:
        raise NotImplementedError(
            f"dtype {dtype} has no kernel; use torch.float8_e4m3fn, or quantize.stated"
        )
    head_dim = x.shape[-1]
    if head_dim % 8 != 0 or not 0 < head_dim <= arguments.MAX_HEAD_DIM:
        nearest = min(arguments.MAX_HEAD_DIM, max(8, -(-head_dim // 8) * 8))
        raise NotImplementedError(
            f"head_dim {head_dim} of x is not supported; supported: multiples of 8 up to "
            f"{arguments.MAX_HEAD_DIM} (nearest: {nearest})"
        )
    for axis, what, most in ((0, "batch", GRID), (1, "seqlen", GRID * BLOCK_ROWS)):
        if x.shape[axis] > most:
            raise NotImplementedError(
                f"x has {what} {x.shape[axis]}; supported: up to {most} (split it)"
            )
    arguments.addressable("x", x)


@annotated("quantize")
def _run_kernels(
    backend: Backend,
    x: Tensor,
    recipe: Recipe,
    heads_kv: int | None,
    hadamard: bool,
    centered: bool,
    transposed: bool,
) -> Quantized:
    x = arguments.addressable("x", x)
    batch, seqlen, heads, head_dim = x.shape
    element = arguments.DTYPES[x.dtype]
    table = _Table.of(x, recipe, heads_kv)
    pointers = {
        "mean": _means(backend, x) if centered else None,
        "signs": _scaled_signs(x.device, head_dim) if hadamard else None,
        "tops": torch.zeros_like(table.descale) if recipe.rows is None else None,
    }
    present = {name: tensor for name, tensor in pointers.items() if tensor is not None}
    values = {
        **dict.fromkeys(pointers, 0),
        **{name: tensor.data_ptr() for name, tensor in present.items()},
        "block_rows": recipe.rows or 0,
        "group": table.group,
        "rotation_size": head_dim & -head_dim if hadamard else 1,
    }

    def launch(instance: str, tensors: tuple[Tensor, ...], *addressed: str) -> None:
        scalars = [values[name] for name in runtime.scalar_names(instance)]
        pointees = [present[name] for name in addressed if name in present]
        runtime.launch(backend, instance, tensors, scalars, pointees)

    tops = pointers["tops"]
    if tops is not None:
        instance = dispatch.abs_max_instance(element, head_dim)
        launch(instance, (x, table.of_heads(tops)[..., 0]), "mean", "signs")
    shape = (batch, heads, head_dim, -(-seqlen // 16) * 16) if transposed else x.shape
    out = x.new_empty(shape, dtype=torch.float8_e4m3fn)
    instance = dispatch.quantize_instance(element, head_dim, transposed)
    launch(instance, (x, out, table.of_heads(table.descale)), "mean", "signs", "tops")
    return Quantized(_columns(out, seqlen) if transposed else out, table.descale)


@dataclass(frozen=True)
class _Table:
    """Where the kernels find the scale of a head."""

    descale: Tensor
    batch: int
    group: int
    """Successive heads with one scale."""

    @staticmethod
    def of(x: Tensor, recipe: Recipe, heads_kv: int | None) -> _Table:
        batch, seqlen, heads, _ = x.shape
        if recipe is Recipe.PER_TENSOR:
            shape: tuple[int, ...] = (1,)
            group = heads
        elif recipe.rows is None:
            shape = (batch, heads_kv or heads)
            group = heads // shape[1]
        else:
            shape = (batch, heads, -(-seqlen // recipe.rows))
            group = 1
        return _Table(x.new_empty(shape, dtype=torch.float32), batch, group)

    def of_heads(self, table: Tensor) -> Tensor:
        """(batch, heads / group, blocks or 1), of one that lies as `descale` does."""
        if table.ndim == 1:
            return table.view(1, 1, 1).expand(self.batch, 1, 1)
        return table if table.ndim == 3 else table.unsqueeze(2)


def _means(backend: Backend, x: Tensor) -> Tensor:
    """(batch, heads, head_dim) float32, over seqlen; always in the same order."""
    batch, seqlen, heads, head_dim = x.shape
    shape = (-(-seqlen // SUM_ROWS), batch, heads, head_dim)
    sums = x.new_empty(shape, dtype=torch.float32)
    instance = dispatch.column_sums_instance(arguments.DTYPES[x.dtype])
    runtime.launch(backend, instance, (x, sums), [])
    return sums.sum(dim=0).div_(seqlen)


_scaled: dict[tuple[torch.device, int, int], Tensor] = {}


def _scaled_signs(device: torch.device, head_dim: int) -> Tensor:
    """`signs` / sqrt(n), float32.  Kept, but for a graph that is being captured: it is its own."""
    on_gpu = device.type == "cuda"
    key = (device, runtime.current_stream(device.index) if on_gpu else 0, head_dim)
    if key in _scaled:
        return _scaled[key]
    # Computed where they are wanted, from Python integers: a graph may not copy from the host.
    place = torch.arange(WORD, device=device)
    words = [torch.full((WORD,), word, device=device) for word in _sign_words(head_dim)]
    bits = torch.cat([word >> place & 1 for word in words])[:head_dim]
    table = (1 - 2 * bits).float() / (head_dim & -head_dim) ** 0.5
    if not (on_gpu and torch.cuda.is_current_stream_capturing()):
        _scaled[key] = table
    return table


WORD = 32


@functools.cache
def _sign_words(head_dim: int) -> list[int]:
    """A bit for every column, set where it is negative."""
    negative = [int(sign < 0) for sign in signs(head_dim).tolist()]
    parts = [negative[i : i + WORD] for i in range(0, head_dim, WORD)]
    return [sum(bit << i for i, bit in enumerate(part)) for part in parts]
