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
quantize_statement.py says.  Both agree bit for bit without rotation and centring, signs of NaN
aside; with them up to the rounding of sums: a value may be one step of the format off.  NaN and
infinity reach all that shares their scale: dequantised it is NaN.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hopper_attention import arguments, dispatch, runtime, selection
from hopper_attention.arguments import WHOLE, Lengths
from hopper_attention.quantize_arguments import (
    check_arranged,
    check_head_dim,
    check_kernels,
    check_options,
    check_rows,
    checked_rotary,
    in_blocks,
)
from hopper_attention.quantize_statement import (
    LEAST,
    Quantized,
    Recipe,
    Rotary,
    Sequences,
    arranged_columns,
    arranged_shape,
    batched,
    block_rows,
    means,
    narrowed_stated,
    number_of_sequences,
    rotated,
    signs,
    spread,
    stated,
)
from hopper_attention.ranges import annotated
from hopper_attention.runtime import Backend

__all__ = [
    "LEAST", "Quantized", "Recipe", "Rotary", "block_rows", "columns_of", "means_of", "narrowed",
    "quantize", "rotated", "signs", "spread", "stated",
]  # fmt: skip

SUM_ROWS = 256
"""Of one sum of the kernel."""


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
    lengths: Lengths = WHOLE,
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
        dtype: float8_e4m3fn; float8_e5m2 by the statement only.
        lengths: packed or partly used sequences.
        max_seqlen: an upper bound of their lengths; None: all rows.
        rotary: (cos, sin), or a `Rotary`: queries and keys are embedded before all else; positions
            count from each sequence's start.  rotary_dim is a multiple of 16.

    Raises TypeError, ValueError for arguments that make no sense, NotImplementedError for what has
    no kernel, before anything is launched.
    """
    max_rows = check_rows("x", x, lengths, max_seqlen)
    recipe, heads_kv = check_options(x, recipe, heads_kv, dtype)
    if arranged:
        check_arranged("x", x)
    embedding = None if rotary is None else checked_rotary(rotary, x, lengths, max_rows)
    backend, problem = _backend(x, "x"), _Problem(x, lengths, max_rows, embedding)
    if backend is not Backend.REFERENCE:
        check_kernels(x, dtype)
    if backend is Backend.REFERENCE or problem.empty:
        return stated(
            x, recipe, heads_kv, hadamard, centered, octaves, arranged, dtype, lengths, max_rows,
            embedding,
        )  # fmt: skip
    return _run_kernels(backend, problem, recipe, heads_kv, hadamard, centered, octaves, arranged)


def means_of(x: Tensor, lengths: Lengths = WHOLE, max_seqlen: int | Tensor | None = None) -> Tensor:
    """(sequences, heads, head_dim) float32: what `centered` takes off."""
    max_rows = check_rows("x", x, lengths, max_seqlen)
    backend, problem = _backend(x, "x"), _Problem(x, lengths, max_rows)
    if backend is Backend.REFERENCE or problem.empty:
        sequences = Sequences.of(x, lengths)
        return means(sequences.gathered(), sequences.counts)[:, 0]
    check_kernels(x, torch.float8_e4m3fn)
    return _means(backend, problem)


def narrowed(
    x: Tensor,
    descale: Tensor,
    *,
    arranged: bool = False,
    lengths: Lengths = WHOLE,
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
    max_rows = check_rows("x", x, lengths, max_seqlen)
    if x.dtype != torch.float8_e5m2:
        raise NotImplementedError(f"x has dtype {x.dtype}; supported: torch.float8_e5m2")
    check_arranged("x", x)
    problem = _Problem(x, lengths, max_rows)
    given = in_blocks(descale, x, problem.sequences, max_rows)
    backend = _backend(x, "x")
    if backend is not Backend.REFERENCE:
        check_head_dim(x)
    if backend is Backend.REFERENCE or problem.empty:
        values, factor = narrowed_stated(x, arranged, lengths, max_rows)
    else:
        values, factor = _narrow(backend, problem, arranged)
    return Quantized(values, factor * given)


def columns_of(
    v: Tensor, lengths: Lengths = WHOLE, max_seqlen: int | Tensor | None = None
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
    max_seqlen = check_rows("v", v, lengths, max_seqlen)
    if v.dtype != torch.float8_e4m3fn:
        raise NotImplementedError(f"v has dtype {v.dtype}; supported: torch.float8_e4m3fn")
    check_arranged("v", v)
    backend = _backend(v, "v")
    if backend is Backend.REFERENCE:
        return arranged_columns(v, lengths)
    return _arrange(backend, _Problem(v, lengths, max_seqlen))


def _backend(x: Tensor, name: str) -> Backend:
    """Raises NotImplementedError where there are no FP8 kernels."""
    backend = runtime.backend_for(x, name)
    if backend is not Backend.REFERENCE:
        selection.target_for_fp8(x)
    return backend


@dataclass(frozen=True)
class _Problem:
    """Rows and where their sequences lie, as the kernels take them."""

    x: Tensor
    lengths: Lengths
    max_seqlen: int
    rotary: Rotary | None = None

    @property
    def sequences(self) -> int:
        return number_of_sequences(self.x, self.lengths)

    @property
    def empty(self) -> bool:
        return self.x.numel() == 0 or self.sequences == 0 or self.max_seqlen == 0

    @functools.cached_property
    def rows(self) -> Tensor:
        """(batch or 1, seqlen or total, heads, head_dim)"""
        return arguments.addressable("x", batched(self.x, self.lengths))

    @functools.cached_property
    def rotary_arguments(self) -> tuple[dict[str, int], dict[str, Tensor | None]]:
        """Scalars, and what is passed by its address."""
        if self.rotary is None:
            names = ("dim", "interleaved", "positions", "offset")
            addressed = dict.fromkeys(("rotary_cos", "rotary_sin", "rotary_offsets"))
            return {f"rotary_{name}": 0 for name in names}, addressed
        cos, sin, interleaved, offsets = self.rotary
        scalars = {
            "rotary_dim": 2 * cos.shape[1],
            "rotary_interleaved": int(interleaved),
            "rotary_positions": cos.shape[0],
            "rotary_offset": 0 if isinstance(offsets, Tensor) else offsets,
        }
        tables: dict[str, Tensor | None] = {
            "rotary_cos": _loadable_floats(cos),
            "rotary_sin": _loadable_floats(sin),
            "rotary_offsets": offsets if isinstance(offsets, Tensor) else None,
        }
        return scalars, tables

    def launch(
        self,
        backend: Backend,
        instance: str,
        tensors: tuple[Tensor, ...],
        scalars: dict[str, int],
        addressed: dict[str, Tensor | None],
    ) -> None:
        """`addressed`: what is passed by its address, or 0; scalars and these go by name."""
        rotary, tables = self.rotary_arguments
        addressed = {
            "cu_seqlens": self.lengths.cu_seqlens,
            "seqused": self.lengths.seqused,
            **tables,
            **addressed,
        }
        present = {name: tensor for name, tensor in addressed.items() if tensor is not None}
        values = {
            **dict.fromkeys(addressed, 0),
            **{name: tensor.data_ptr() for name, tensor in present.items()},
            "sequences": self.sequences,
            "max_seqlen": self.max_seqlen,
            **rotary,
            **scalars,
        }
        names = runtime.scalar_names(instance)
        pointees = [present[name] for name in names if name in present]
        runtime.launch(backend, instance, tensors, [values[name] for name in names], pointees)


@annotated("quantize")
def _run_kernels(
    backend: Backend,
    problem: _Problem,
    recipe: Recipe,
    heads_kv: int | None,
    hadamard: bool,
    centered: bool,
    octaves: bool,
    arranged: bool,
) -> Quantized:
    x = problem.rows
    heads, head_dim = x.shape[2:]
    element = arguments.DTYPES[x.dtype]
    table = _Table.of(problem, recipe, heads_kv)
    descale = x.new_empty(table.shape, dtype=torch.float32)
    tops = None
    if recipe.rows is None or octaves:
        tops = x.new_zeros(table.tops_shape, dtype=torch.float32)
    addressed = {
        "mean": _means(backend, problem) if centered else None,
        "signs": _scaled_signs(x.device, head_dim) if hadamard else None,
        "tops": tops,
    }
    scalars = {
        "tops_stride": table.tops_stride,
        "block_rows": recipe.rows or 0,
        "group": table.group,
        "rotation_size": head_dim & -head_dim if hadamard else 1,
    }
    if tops is not None:
        instance = dispatch.abs_max_instance(element, head_dim)
        of_heads = tops.view(-1, heads // table.group).expand(problem.sequences, -1)
        problem.launch(backend, instance, (x, of_heads), scalars, addressed)
    shape = arranged_shape(problem.x, problem.lengths) if arranged else x.shape
    out = x.new_empty(shape, dtype=torch.float8_e4m3fn)
    instance = dispatch.quantize_instance(element, head_dim, arranged)
    tensors = (x, out, table.of_heads(descale))
    problem.launch(backend, instance, tensors, scalars, addressed)
    return Quantized(out if arranged else out.view(problem.x.shape), descale)


@annotated("narrow")
def _narrow(backend: Backend, problem: _Problem, arranged: bool) -> Quantized:
    x = arguments.made_addressable("x", batched(problem.x, problem.lengths))
    shape = arranged_shape(problem.x, problem.lengths) if arranged else x.shape
    out = x.new_empty(shape, dtype=torch.float8_e4m3fn)
    blocks = (problem.sequences, x.shape[2], -(-problem.max_seqlen // 64))
    factor = x.new_empty(blocks, dtype=torch.float32)
    instance = dispatch.narrow_instance(x.shape[3], arranged)
    problem.launch(backend, instance, (x, out, factor), {}, {})
    return Quantized(out if arranged else out.view(problem.x.shape), factor)


@dataclass(frozen=True)
class _Table:
    """Where the kernels find and put the scale of a head."""

    shape: tuple[int, ...]
    sequences: int
    group: int
    """Successive heads with one scale."""
    tops_shape: tuple[int, int]
    """Of the greatest magnitudes that AbsMax finds."""

    @staticmethod
    def of(problem: _Problem, recipe: Recipe, heads_kv: int | None) -> _Table:
        sequences, heads = problem.sequences, problem.x.shape[-2]
        if recipe is Recipe.PER_TENSOR:
            return _Table((1,), sequences, heads, (1, 1))
        if recipe.rows is None:
            shape = (sequences, heads_kv or heads)
            return _Table(shape, sequences, heads // shape[1], shape)
        blocks = -(-problem.max_seqlen // recipe.rows)
        return _Table((sequences, heads, blocks), sequences, 1, (sequences, heads))

    @property
    def tops_stride(self) -> int:
        """From sequence to sequence."""
        rows, columns = self.tops_shape
        return columns if rows == self.sequences else 0

    def of_heads(self, descale: Tensor) -> Tensor:
        """(sequences, heads / group, blocks or 1)"""
        if descale.ndim == 1:
            return descale.view(1, 1, 1).expand(self.sequences, 1, 1)
        return descale if descale.ndim == 3 else descale.unsqueeze(2)


def _means(backend: Backend, problem: _Problem) -> Tensor:
    """(sequences, heads, head_dim) float32, always added in the same order."""
    x = problem.rows
    batch, seqlen, heads, head_dim = x.shape
    chunks = -(-seqlen // SUM_ROWS)
    if problem.lengths.cu_seqlens is not None:  # as arranged columns
        chunks = seqlen // SUM_ROWS + problem.sequences
    sums = x.new_empty((batch, chunks, heads, head_dim), dtype=torch.float32)
    instance = dispatch.column_sums_instance(arguments.DTYPES[x.dtype])
    problem.launch(backend, instance, (x, sums), {}, {})
    means = x.new_empty((problem.sequences, heads, head_dim), dtype=torch.float32)
    instance = dispatch.column_means_instance()
    problem.launch(backend, instance, (sums, means), {"padded": seqlen}, {})
    return means


def _loadable_floats(table: Tensor) -> Tensor:
    """float32, in rows of whole vectors of 32 bytes."""
    table = table.float().contiguous()
    return table if table.data_ptr() % 32 == 0 else table.clone()


@annotated("arrange")
def _arrange(backend: Backend, problem: _Problem) -> Tensor:
    v, lengths = problem.x, problem.lengths
    out = v.new_empty(arranged_shape(v, lengths))
    if problem.empty:
        return out
    rows = batched(v, lengths)
    source = _loadable_columns(rows)
    instance = dispatch.arrange_instance(source is not None)
    if source is None:
        source = arguments.made_addressable("v", rows)
    problem.launch(backend, instance, (source, out), {}, {})
    return out


def _loadable_columns(v: Tensor) -> Tensor | None:
    """(batch, heads, columns, seqlen rounded up to 16), if keys lie together and 16 can be loaded.

    What is behind the last key of the last column must be memory of the tensor's.
    """
    if v.stride(3) == 1 or v.stride(1) != 1:
        return None
    columns = v.permute(0, 2, 3, 1)
    shape = (*columns.shape[:3], -(-v.shape[1] // 16) * 16)
    end = v.storage_offset() + sum((n - 1) * s for n, s in zip(shape, columns.stride())) + 1
    if end > v.untyped_storage().nbytes():  # of bytes
        return None
    try:
        return arguments.addressable("v", columns.as_strided(shape, columns.stride()))
    except ValueError:
        return None


_scaled: dict[tuple[torch.device, int, int], Tensor] = {}


def _scaled_signs(device: torch.device, head_dim: int) -> Tensor:
    """`signs` / sqrt(n), float32.

    It is kept, unless it belongs to a graph that is being captured or is no real tensor: the call
    that makes a fake one fails later.
    """
    on_gpu = device.type == "cuda"
    key = (device, runtime.current_stream(device.index) if on_gpu else 0, head_dim)
    if key in _scaled:
        return _scaled[key]
    # Computed where they are wanted, from Python integers: a graph may not copy from the host.
    place = torch.arange(WORD, device=device)
    words = [torch.full((WORD,), word, device=device) for word in _sign_words(head_dim)]
    bits = torch.cat([word >> place & 1 for word in words])[:head_dim]
    table = (1 - 2 * bits).float() / (head_dim & -head_dim) ** 0.5
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    if not capturing and type(table) is Tensor:
        _scaled[key] = table
    return table


WORD = 32


@functools.cache
def _sign_words(head_dim: int) -> list[int]:
    """A bit for every column, set where it is negative."""
    negative = [int(sign < 0) for sign in signs(head_dim).tolist()]
    parts = [negative[i : i + WORD] for i in range(0, head_dim, WORD)]
    return [sum(bit << i for i, bit in enumerate(part)) for part in parts]
