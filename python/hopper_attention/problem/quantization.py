"""The arguments of quantisation as values, and their checks before anything is launched."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hopper_attention.cute_kernels.conventions import BLOCK_ROWS
from hopper_attention.problem import checks, memory, scalars
from hopper_attention.problem.values import (
    DENSE,
    DTYPES,
    MAX_HEAD_DIM,
    Bound,
    Lengths,
    PrecisionOptions,
)


class Recipe(str, enum.Enum):
    PER_TENSOR = "per_tensor"
    PER_HEAD = "per_head"
    BLOCK64 = "block64"
    BLOCK128 = "block128"

    @property
    def rows(self) -> int | None:
        """Rows that share a scale; None if they are not counted."""
        return {Recipe.BLOCK64: 64, Recipe.BLOCK128: 128}.get(self)


class Quantized(NamedTuple):
    values: Tensor
    """FP8 numbers in x's layout; or arranged, as `columns_of` gives them."""
    descale: Tensor
    """float32."""


class Rotary(NamedTuple):
    """Rotary embedding of the first columns, by flash-attn's conventions, before all else.

    Not rounded to x's dtype in between.
    """

    cos: Tensor
    """(positions, rotary_dim / 2), any float dtype."""
    sin: Tensor
    interleaved: bool = False
    """True: columns 2i and 2i + 1 are a pair; false: i and i + rotary_dim / 2."""
    offsets: int | Tensor = 0
    """Position of a sequence's first row, or of each one's: (sequences,) int32."""


class QuantizationRequest(NamedTuple):
    """How a tensor is quantised: the arguments of `quantize.quantize` of these names."""

    recipe: Recipe
    heads_kv: int | None = None
    hadamard: bool = False
    centered: bool = False
    octaves: bool = False
    arranged: bool = False
    dtype: torch.dtype = torch.float8_e4m3fn
    lengths: Lengths = DENSE
    max_seqlen: int | None = None
    """None: all rows."""
    rotary: Rotary | None = None

    @staticmethod
    def of(x: Tensor, recipe: Any, **arguments: Any) -> QuantizationRequest:
        """Return the request for x, in the forms that implementations take.

        Raises TypeError, ValueError or NotImplementedError that names the argument.
        """
        given = QuantizationRequest(recipe, **arguments)
        rows = check_rows("x", x, given.lengths, given.max_seqlen)
        recipe, heads_kv = check_options(x, recipe, given.heads_kv, given.dtype)
        if given.arranged:
            check_arranged("x", x)
        rotary = given.rotary
        if rotary is not None:
            rotary = checked_rotary(rotary, x, given.lengths, rows)
        return given._replace(recipe=recipe, heads_kv=heads_kv, max_seqlen=rows, rotary=rotary)


def number_of_sequences(x: Tensor, lengths: Lengths) -> int:
    return x.shape[0] if lengths.cu_seqlens is None else lengths.cu_seqlens.shape[0] - 1


class Fp8Options(NamedTuple):
    """How `attention_fp8` quantises: its arguments of these names."""

    recipe: str
    hadamard: bool
    two_level: bool | None
    accumulate_every: int
    exact_softmax: bool
    bound_q: Bound | None
    """max_seqlen_q, a name that `Options` has already."""
    bound_k: Bound | None

    @staticmethod
    def of(
        recipe: Any,
        hadamard: Any,
        two_level: Any,
        accumulate_every: Any,
        exact_softmax: Any,
        max_seqlen_q: Any,
        max_seqlen_k: Any,
    ) -> Fp8Options:
        """Raises TypeError or ValueError that names the argument."""
        try:
            recipe = Recipe(recipe).value
        except ValueError:
            have = ", ".join(r.value for r in Recipe)
            raise ValueError(f"recipe must be one of {have}; got {recipe!r}") from None
        precision = PrecisionOptions.of(two_level, accumulate_every, exact_softmax)
        bounds = (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k))
        return Fp8Options(
            recipe,
            scalars.flag("hadamard", hadamard),
            *precision,
            *(scalars.bound(name, n) for name, n in bounds),
        )

    @property
    def precision(self) -> PrecisionOptions:
        return PrecisionOptions(self.two_level, self.accumulate_every, self.exact_softmax)

    @property
    def recipe_of_values(self) -> Recipe:
        """V's: P without exponentials can take no scale of a block of V."""
        recipe = Recipe(self.recipe)
        return recipe if self.exact_softmax or recipe.rows is None else Recipe.PER_HEAD

    def checked(self) -> Fp8Options:
        """Raises what `of` does."""
        return Fp8Options.of(*self)


GRID = 65535
"""Most blocks along the second and third dimension of a grid."""


def check_rows(name: str, x: Tensor, lengths: Lengths, max_seqlen: int | Tensor | None) -> int:
    """The upper bound of the sequences' lengths."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        raise ValueError(f"{name}: expected a plain tensor, not a sparse or nested one")
    if not isinstance(lengths, Lengths):
        raise TypeError(
            f"lengths: expected hopper_attention.quantize.Lengths, got {type(lengths).__name__}"
        )
    packed = lengths.cu_seqlens is not None
    form = "(total, heads, head_dim)" if packed else "(batch, seqlen, heads, head_dim)"
    if x.ndim != (3 if packed else 4):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {form}")
    rows = x.shape[-3]
    max_seqlen = scalars.bound("max_seqlen", max_seqlen)
    if not lengths.given:
        if max_seqlen not in (None, rows):
            raise ValueError(f"max_seqlen {max_seqlen}: without lengths all {rows} rows are used")
    else:
        _check_lengths(name, x, lengths, max_seqlen)
    bound = rows if max_seqlen is None else max_seqlen
    for what, given, most in (
        ("sequences", number_of_sequences(x, lengths), GRID),
        ("max_seqlen", bound, GRID * BLOCK_ROWS),
    ):
        if given > most:
            raise NotImplementedError(f"{what} {given} of {name}; supported: up to {most}")
    return bound


def _check_lengths(name: str, x: Tensor, lengths: Lengths, max_seqlen: int | None) -> None:
    cu_seqlens, seqused = lengths.cu_seqlens, lengths.seqused
    sequences = x.shape[0]
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"cu_seqlens: expected a torch.Tensor, got {type(cu_seqlens).__name__}")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(
                f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected (sequences + 1,)"
            )
        sequences = cu_seqlens.shape[0] - 1
    checks.check_index("cu_seqlens", cu_seqlens, sequences + 1, x, name)
    checks.check_index("seqused", seqused, sequences, x, name)
    checks.check_lengths("", lengths, x.shape[-3])
    if x.is_cpu and max_seqlen is not None:
        used = seqused if seqused is not None else cu_seqlens.diff()  # type: ignore[union-attr]
        if used.numel() and int(used.max()) > max_seqlen:
            raise ValueError(
                f"max_seqlen {max_seqlen} is less than a sequence of {used.max()} rows"
            )


def check_options(
    x: Tensor, recipe: Recipe | str, heads_kv: int | None, dtype: torch.dtype
) -> tuple[Recipe, int | None]:
    """Recipe and heads_kv in the forms that the implementations take."""
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; expected a float dtype")
    if recipe not in list(Recipe):
        names = ", ".join(r.value for r in Recipe)
        raise ValueError(f"recipe {recipe!r} is none of {names}")
    if heads_kv is not None:
        heads_kv = scalars.integer("heads_kv", heads_kv, -(2**31))
        if heads_kv < 1 or x.shape[-2] % heads_kv != 0:
            raise ValueError(f"x has {x.shape[-2]} heads, not a multiple of heads_kv = {heads_kv}")
    if dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise NotImplementedError(
            f"dtype {dtype}: supported: torch.float8_e4m3fn, torch.float8_e5m2"
        )
    return Recipe(recipe), heads_kv


def checked_rotary(
    rotary: Rotary | tuple[Tensor, Tensor], x: Tensor, lengths: Lengths, max_seqlen: int
) -> Rotary:
    if not isinstance(rotary, tuple) or not 2 <= len(rotary) <= 4:
        raise TypeError(f"rotary: expected (cos, sin) or a Rotary, got {type(rotary).__name__}")
    cos, sin, interleaved, offsets = Rotary(*rotary)
    for name, table in (("cos", cos), ("sin", sin)):
        if not isinstance(table, Tensor):
            raise TypeError(f"rotary: expected a torch.Tensor as {name}, got {_kind(table)}")
        if table.device != x.device:
            raise ValueError(f"rotary: {name} is on {table.device}, x is on {x.device}")
        if table.dtype not in (torch.float32, *DTYPES):
            raise ValueError(f"rotary: {name} has dtype {table.dtype}; expected float32 or 16 bits")
        if table.ndim != 2 or table.shape != cos.shape:
            raise ValueError(
                f"rotary: {name} has shape {tuple(table.shape)}; expected (positions, "
                "rotary_dim / 2), both alike"
            )
    positions, dim = cos.shape[0], 2 * cos.shape[1]
    if dim % 16 != 0 or not 0 < dim <= x.shape[-1]:
        raise NotImplementedError(
            f"rotary: rotary_dim {dim}; supported: multiples of 16 up to head_dim {x.shape[-1]}"
        )
    interleaved = scalars.flag("rotary: interleaved", interleaved)
    first = 0
    if isinstance(offsets, Tensor):
        sequences = number_of_sequences(x, lengths)
        checks.check_index("rotary: offsets", offsets, sequences, x, "x")
        if offsets.is_cpu and sequences > 0:
            if int(offsets.min()) < 0:
                raise ValueError("rotary: offsets must not be negative")
            first = int(offsets.max())
    else:
        first = offsets = scalars.integer("rotary: offsets", offsets, 0)
    if first + max_seqlen > positions:
        raise ValueError(
            f"rotary: cos and sin have {positions} positions; needed: {first + max_seqlen}, "
            "offset and max_seqlen"
        )
    return Rotary(cos, sin, interleaved, offsets)


def _kind(value: object) -> str:
    return type(value).__name__


def check_arranged(name: str, x: Tensor) -> None:
    if x.shape[-1] % 16:
        raise NotImplementedError(
            f"head_dim {x.shape[-1]} of {name} is not supported; supported: multiples of 16 "
            f"(nearest: {-(-x.shape[-1] // 16) * 16})"
        )


def check_kernels(x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype not in DTYPES:
        raise NotImplementedError(
            f"x has dtype {x.dtype}; the kernels take torch.bfloat16 and torch.float16 "
            "(nearest: x.bfloat16())"
        )
    if dtype is not torch.float8_e4m3fn:
        raise NotImplementedError(
            f"dtype {dtype} has no kernel; use torch.float8_e4m3fn, or quantize.stated"
        )
    check_head_dim(x)
    memory.addressable("x", x)


def check_head_dim(x: Tensor) -> None:
    """Check the head dim of a tensor for the quantisation kernels."""
    head_dim = x.shape[-1]
    if head_dim % 8 != 0 or not 0 < head_dim <= MAX_HEAD_DIM:
        nearest = min(MAX_HEAD_DIM, max(8, -(-head_dim // 8) * 8))
        raise NotImplementedError(
            f"head_dim {head_dim} of x is not supported; supported: multiples of 8 up to "
            f"{MAX_HEAD_DIM} (nearest: {nearest})"
        )


def in_blocks(descale: Tensor, x: Tensor, sequences: int, max_seqlen: int) -> Tensor:
    """(sequences or 1, heads or 1, blocks of 64 rows or 1).  Raises what `narrowed` raises."""
    if not isinstance(descale, Tensor):
        raise TypeError(f"descale: expected a torch.Tensor, got {type(descale).__name__}")
    if descale.device != x.device:
        raise ValueError(f"descale is on {descale.device}, x is on {x.device}")
    if descale.dtype != torch.float32:
        raise ValueError(f"descale has dtype {descale.dtype}; expected torch.float32")
    shape, heads = tuple(descale.shape), x.shape[-2]
    if shape in ((), (1,)):
        return descale.reshape(1, 1, 1)
    if descale.ndim == 2 and shape[0] == sequences and shape[1] > 0 and heads % shape[1] == 0:
        return descale.repeat_interleave(heads // shape[1], dim=1).unsqueeze(2)
    blocks = {rows: -(-max_seqlen // rows) for rows in (64, 128)}
    if shape == (sequences, heads, blocks[64]):
        return descale
    if shape == (sequences, heads, blocks[128]):
        return descale.repeat_interleave(2, dim=2)[:, :, : blocks[64]]
    raise ValueError(
        f"descale has shape {shape}; expected (1,), (sequences, heads_kv) = ({sequences}, a "
        f"divisor of {heads}), or ({sequences}, {heads}, blocks) with {blocks[64]} or "
        f"{blocks[128]} blocks"
    )
