"""The quantisation kernels: problems, tables of scales, launches."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hopper_attention.cute_kernels.conventions import SUM_ROWS
from hopper_attention.dispatch import instances, target
from hopper_attention.dispatch.target import Executor
from hopper_attention.launch import runtime
from hopper_attention.launch.arguments import Value, launch
from hopper_attention.nvtx import annotated
from hopper_attention.problem import memory
from hopper_attention.problem.quantization import (
    QuantizationRequest,
    Quantized,
    Recipe,
    Rotary,
    check_arranged,
    check_head_dim,
    check_kernels,
    check_rows,
    in_blocks,
    number_of_sequences,
)
from hopper_attention.problem.values import DENSE, DTYPES, Lengths
from hopper_attention.reference.quantize import (
    Sequences,
    arranged_columns,
    arranged_shape,
    batched,
    means,
    narrowed_reference,
    quantize_reference,
    signs,
)


def quantize(x: Tensor, request: QuantizationRequest) -> Quantized:
    """`quantize.quantize`: values and descales, by kernels or the reference."""
    assert request.max_seqlen is not None  # as `QuantizationRequest.of` leaves it
    problem = _Problem(x, request.lengths, request.max_seqlen, request.rotary)
    executor = _executor(x, "x")
    if executor is not Executor.REFERENCE:
        check_kernels(x, request.dtype)
    if executor is Executor.REFERENCE or problem.empty:
        return quantize_reference(x, request)
    return _run_kernels(executor, problem, request)


def means_of(x: Tensor, lengths: Lengths = DENSE, max_seqlen: int | Tensor | None = None) -> Tensor:
    """`quantize.means_of`: means of columns, by kernels or the reference."""
    max_rows = check_rows("x", x, lengths, max_seqlen)
    executor, problem = _executor(x, "x"), _Problem(x, lengths, max_rows)
    if executor is Executor.REFERENCE or problem.empty:
        sequences = Sequences.of(x, lengths)
        return means(sequences.gathered(), sequences.counts)[:, 0]
    check_kernels(x, torch.float8_e4m3fn)
    return _means(executor, problem)


def narrowed(
    x: Tensor,
    descale: Tensor,
    *,
    arranged: bool = False,
    lengths: Lengths = DENSE,
    max_seqlen: int | Tensor | None = None,
) -> Quantized:
    """`quantize.narrowed`: e4m3 from e5m2, by a kernel or the reference."""
    max_rows = check_rows("x", x, lengths, max_seqlen)
    if x.dtype != torch.float8_e5m2:
        raise NotImplementedError(f"x has dtype {x.dtype}; supported: torch.float8_e5m2")
    check_arranged("x", x)
    problem = _Problem(x, lengths, max_rows)
    given = in_blocks(descale, x, problem.sequences, max_rows)
    executor = _executor(x, "x")
    if executor is not Executor.REFERENCE:
        check_head_dim(x)
    if executor is Executor.REFERENCE or problem.empty:
        values, factor = narrowed_reference(x, arranged, lengths, max_rows)
    else:
        values, factor = _narrow(executor, problem, arranged)
    return Quantized(values, factor * given)


def columns_of(
    v: Tensor, lengths: Lengths = DENSE, max_seqlen: int | Tensor | None = None
) -> Tensor:
    """`quantize.columns_of`: V^T for the FP8 kernels, by a kernel or the reference."""
    max_seqlen = check_rows("v", v, lengths, max_seqlen)
    if v.dtype != torch.float8_e4m3fn:
        raise NotImplementedError(f"v has dtype {v.dtype}; supported: torch.float8_e4m3fn")
    check_arranged("v", v)
    executor = _executor(v, "v")
    if executor is Executor.REFERENCE:
        return arranged_columns(v, lengths)
    return _arrange(executor, _Problem(v, lengths, max_seqlen))


def _executor(x: Tensor, name: str) -> Executor:
    """Raises NotImplementedError where there are no FP8 kernels."""
    executor = target.executor_for(x, name)
    if executor is not Executor.REFERENCE:
        target.target_for_fp8(x)
    return executor


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
        return memory.addressable("x", batched(self.x, self.lengths))

    @functools.cached_property
    def values(self) -> dict[str, Value]:
        """The kernels' arguments that describe x and its sequences, by name."""
        cos, sin, interleaved, offsets = self.rotary or (None, None, False, 0)
        return {
            "cu_seqlens": self.lengths.cu_seqlens,
            "seqused": self.lengths.seqused,
            "sequences": self.sequences,
            "max_seqlen": self.max_seqlen,
            "rotary_cos": None if cos is None else _loadable_floats(cos),
            "rotary_sin": None if sin is None else _loadable_floats(sin),
            "rotary_dim": 0 if cos is None else 2 * cos.shape[1],
            "rotary_positions": 0 if cos is None else cos.shape[0],
            "rotary_interleaved": int(interleaved),
            "rotary_offset": 0 if isinstance(offsets, Tensor) else offsets,
            "rotary_offsets": offsets if isinstance(offsets, Tensor) else None,
        }


@annotated("quantize")
def _run_kernels(executor: Executor, problem: _Problem, request: QuantizationRequest) -> Quantized:
    x, recipe = problem.rows, request.recipe
    heads, head_dim = x.shape[2:]
    element = DTYPES[x.dtype]
    table = _Table.of(problem, recipe, request.heads_kv)
    descale = x.new_empty(table.shape, dtype=torch.float32)
    amax = None
    if recipe.rows is None or request.octaves:
        amax = x.new_zeros(table.amax_shape, dtype=torch.float32)
    out = _new_values(problem, x, request.arranged)
    values: dict[str, Value] = {
        **problem.values,
        "x": x,
        "values": out,
        "descale": table.of_heads(descale),
        "mean": _means(executor, problem) if request.centered else None,
        "signs": _scaled_signs(x.device, head_dim) if request.hadamard else None,
        "rotation_size": rotation_size(head_dim) if request.hadamard else 1,
        "amax": amax,
        "amax_stride": table.amax_stride,
        "block_rows": recipe.rows or 0,
        "group": table.group,
    }
    if amax is not None:
        of_heads = amax.view(-1, heads // table.group).expand(problem.sequences, -1)
        launch(
            executor, instances.abs_max_instance(element, head_dim), {**values, "amax": of_heads}
        )
    launch(executor, instances.quantize_instance(element, head_dim, request.arranged), values)
    return Quantized(out if request.arranged else out.view(problem.x.shape), descale)


def _new_values(problem: _Problem, x: Tensor, arranged: bool) -> Tensor:
    """Room for the FP8 values of `x`, problem.x's rows, in their layout or V's."""
    shape = arranged_shape(problem.x, problem.lengths) if arranged else x.shape
    return x.new_empty(shape, dtype=torch.float8_e4m3fn)


@annotated("narrow")
def _narrow(executor: Executor, problem: _Problem, arranged: bool) -> Quantized:
    x = memory.made_addressable("x", batched(problem.x, problem.lengths))
    out = _new_values(problem, x, arranged)
    blocks = (problem.sequences, x.shape[2], -(-problem.max_seqlen // 64))
    factors = x.new_empty(blocks, dtype=torch.float32)
    values = {**problem.values, "x": x, "values": out, "factors": factors}
    launch(executor, instances.narrow_instance(x.shape[3], arranged), values)
    return Quantized(out if arranged else out.view(problem.x.shape), factors)


@dataclass(frozen=True)
class _Table:
    """The table in which the kernels find and put the scale of a head."""

    shape: tuple[int, ...]
    sequences: int
    group: int
    """Successive heads with one scale."""
    amax_shape: tuple[int, int]
    """Shape of the greatest magnitudes that AbsMax finds."""

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
    def amax_stride(self) -> int:
        """The distance from sequence to sequence, in elements."""
        rows, columns = self.amax_shape
        return columns if rows == self.sequences else 0

    def of_heads(self, descale: Tensor) -> Tensor:
        """(sequences, heads / group, blocks or 1)"""
        if descale.ndim == 1:
            return descale.view(1, 1, 1).expand(self.sequences, 1, 1)
        return descale if descale.ndim == 3 else descale.unsqueeze(2)


def _means(executor: Executor, problem: _Problem) -> Tensor:
    """(sequences, heads, head_dim) float32, always added in the same order."""
    x = problem.rows
    batch, seqlen, heads, head_dim = x.shape
    chunks = -(-seqlen // SUM_ROWS)
    if problem.lengths.cu_seqlens is not None:  # sequences start as in `columns_of`
        chunks = seqlen // SUM_ROWS + problem.sequences
    sums = x.new_empty((batch, chunks, heads, head_dim), dtype=torch.float32)
    means = x.new_empty((problem.sequences, heads, head_dim), dtype=torch.float32)
    values = {**problem.values, "x": x, "sums": sums, "means": means, "padded": seqlen}
    launch(executor, instances.column_sums_instance(DTYPES[x.dtype]), values)
    launch(executor, instances.column_means_instance(), values)
    return means


def _loadable_floats(table: Tensor) -> Tensor:
    """float32, in rows of whole vectors of 32 bytes."""
    table = table.float().contiguous()
    return table if table.data_ptr() % 32 == 0 else table.clone()


@annotated("arrange")
def _arrange(executor: Executor, problem: _Problem) -> Tensor:
    v, lengths = problem.x, problem.lengths
    out = v.new_empty(arranged_shape(v, lengths))
    if problem.empty:
        return out
    rows = batched(v, lengths)
    source = _loadable_columns(rows)
    instance = instances.arrange_instance(source is not None)
    if source is None:
        source = memory.made_addressable("v", rows)
    launch(executor, instance, {**problem.values, "v": source, "columns": out})
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
        return memory.addressable("v", columns.as_strided(shape, columns.stride()))
    except ValueError:
        return None


def rotation_size(head_dim: int) -> int:
    """Return how many columns are rotated together: the largest power of two in the head dim."""
    return head_dim & -head_dim


_scaled: dict[tuple[torch.device, int, int], Tensor] = {}


def _scaled_signs(device: torch.device, head_dim: int) -> Tensor:
    """Return `signs` / sqrt(rotation_size), float32.

    It is kept, unless it belongs to a graph that is being captured, or was made while tracing.
    """
    on_gpu = device.type == "cuda"
    key = (device, runtime.current_stream(device.index) if on_gpu else 0, head_dim)
    if key in _scaled:
        return _scaled[key]
    # Computed where they are wanted, from Python integers: a graph may not copy from the host.
    place = torch.arange(WORD, device=device)
    words = [torch.full((WORD,), word, device=device) for word in _sign_words(head_dim)]
    bits = torch.cat([word >> place & 1 for word in words])[:head_dim]
    table = (1 - 2 * bits).float() / rotation_size(head_dim) ** 0.5
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
