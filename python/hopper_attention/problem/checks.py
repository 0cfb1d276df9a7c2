"""Checks of the public functions' arguments, and the forms that the implementations take.

Messages name the argument, what was given and what is accepted.  Nothing is written before the last
check has passed.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from hopper_attention.problem.values import (
    DTYPES,
    MAX_HEAD_DIM,
    UNBOUNDED,
    Inputs,
    Lengths,
    Options,
    PrecisionOptions,
    Shape,
)

MAX_SINK = 1e38
"""Times log2(e) it must fit float32."""


def check_unsupported(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}: not supported yet; leave it at its default")


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check types and devices, which a plan does not remember."""
    if not isinstance(q, Tensor):
        raise TypeError(f"q: expected a torch.Tensor, got {type(q).__name__}")
    device = q.device
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, q is on {device}")
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise ValueError(f"{name}: expected a plain tensor, not a sparse or nested one")


def check_dtypes(*dtypes: torch.dtype) -> None:
    """Check the dtypes of q, k and v: one of 16 bits, the same for all three."""
    for name, dtype in zip("qkv", dtypes, strict=True):
        if dtype not in DTYPES:
            raise NotImplementedError(
                f"{name} has dtype {dtype}; supported: torch.bfloat16, torch.float16"
            )
        if dtype != dtypes[0]:
            raise ValueError(f"{name} has dtype {dtype}, q has {dtypes[0]}")


def autocast(*tensors: Tensor) -> list[Tensor]:
    """In autocast's dtype where autocast is on, as PyTorch's own attention has them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    narrower = (torch.float32, torch.float16, torch.bfloat16)
    return [t.to(dtype) if t.dtype in narrower else t for t in tensors]


def check_shapes(q: Shape, k: Shape, v: Shape, packed_q: bool, packed_k: bool) -> None:
    """(batch, seqlen, heads, head_dim), or (total, heads, head_dim) where packed."""
    for name, shape, packed in (("q", q, packed_q), ("k", k, packed_k), ("v", v, packed_k)):
        if len(shape) != (3 if packed else 4):
            form = "(total, heads, head_dim)" if packed else "(batch, seqlen, heads, head_dim)"
            raise ValueError(f"{name} has shape {tuple(shape)}; expected {form}")
    for name, shape in (("q", q), ("k", k), ("v", v)):
        if any(rows >= UNBOUNDED for rows in shape[:-2]):
            raise ValueError(f"{name} has shape {tuple(shape)}; at most {UNBOUNDED - 1} rows")
    if not packed_q and not packed_k:
        for name, shape in (("k", k), ("v", v)):
            if shape[0] != q[0]:
                raise ValueError(f"{name} has batch {shape[0]}, q has {q[0]}")
    rows = ("total",) if packed_k else ("batch", "seqlen")
    for what, given, expected in zip((*rows, "heads"), v, k):
        if given != expected:
            raise ValueError(f"v has {what} {given}, k has {expected}")
    (heads, head_dim), (heads_kv, head_dim_k) = q[-2:], k[-2:]
    if head_dim_k != head_dim:
        raise ValueError(f"k has head_dim {head_dim_k}, q has {head_dim}")
    if heads_kv == 0 or heads % heads_kv != 0:
        raise ValueError(f"q has {heads} heads, not a multiple of the {heads_kv} of k and v")
    for name, dim in (("q and k", head_dim), ("v", v[-1])):
        if dim % 8 != 0 or not 0 < dim <= MAX_HEAD_DIM:
            nearest = min(MAX_HEAD_DIM, max(8, -(-dim // 8) * 8))
            raise NotImplementedError(
                f"head_dim {dim} of {name} is not supported; supported: multiples of 8 up to "
                f"{MAX_HEAD_DIM} (nearest: {nearest})"
            )


def check_fp8_head_dims(head_dim: int, head_dim_v: int) -> None:
    """Rows of bytes are addressed in steps of 16."""
    for name, dim in (("q and k", head_dim), ("v", head_dim_v)):
        if dim % 16:
            raise NotImplementedError(
                f"head_dim {dim} of {name} is not supported for FP8; supported: multiples of 16 "
                f"(nearest: {-(-dim // 16) * 16})"
            )


def check_index(
    name: str, index: Tensor | None, size: int, beside: Tensor, beside_name: str = "q"
) -> None:
    """An int32 vector of known size, where `beside` is, or None."""
    if index is None:
        return
    if not isinstance(index, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(index).__name__}")
    if index.device != beside.device:
        raise ValueError(f"{name} is on {index.device}, {beside_name} is on {beside.device}")
    if index.dtype != torch.int32:
        raise ValueError(f"{name} has dtype {index.dtype}; expected torch.int32")
    if index.dim() != 1 or index.shape[0] != size:
        raise ValueError(f"{name} has shape {tuple(index.shape)}; expected a vector of {size}")
    if index.layout is not torch.strided or not index.is_contiguous():
        raise ValueError(f"{name} must be contiguous; use {name}.contiguous()")


def readable(index: Tensor) -> bool:
    """Say whether the values may be looked at: reading from a GPU would wait for it."""
    return not index.is_cuda or bool(os.environ.get("HOPPER_ATTENTION_DEBUG"))


def check_lengths(side: str, lengths: Lengths, rows: int) -> None:
    """The values: ascending, inside the tensor.  On a GPU this waits for it: debugging only.

    `side` is that of the arguments' names; "" if there is but one.
    """
    suffix = f"_{side}" if side else ""
    cu_seqlens, seqused = lengths.cu_seqlens, lengths.seqused
    given = cu_seqlens if cu_seqlens is not None else seqused
    if given is None or not readable(given):
        return
    allotted: list[int] | None = None
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        allotted = [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
        if offsets[0] != 0 or min(allotted, default=0) < 0 or offsets[-1] > rows:
            raise ValueError(f"cu_seqlens{suffix} must ascend from 0 to at most {rows} rows")
    if seqused is not None:
        used = seqused.tolist()
        limits = allotted if allotted is not None else [rows] * len(used)
        if any(not 0 <= n <= limit for n, limit in zip(used, limits, strict=True)):
            raise ValueError(f"seqused{suffix} must be between 0 and the sequences' lengths")


def resolve_out_dtype(out_dtype: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    if out_dtype is None or out_dtype == dtype:
        return dtype
    if out_dtype != torch.float32:
        raise NotImplementedError(
            f"out_dtype={out_dtype} is not supported with inputs of {dtype}; use {dtype} or "
            "torch.float32"
        )
    return out_dtype


def check_differentiable(out_dtype: torch.dtype, dtype: torch.dtype) -> None:
    if out_dtype != dtype:
        raise NotImplementedError(
            f"out_dtype={out_dtype} is not differentiable yet; leave it at {dtype}, or call under "
            "torch.no_grad()"
        )


def resolve_sink(learnable_sink: Tensor | None, q: Tensor) -> Tensor | None:
    """A float32 score for each head."""
    if learnable_sink is None:
        return None
    if not isinstance(learnable_sink, Tensor):
        kind = type(learnable_sink).__name__
        raise TypeError(f"learnable_sink: expected a torch.Tensor, got {kind}")
    if learnable_sink.layout is not torch.strided:
        raise ValueError("learnable_sink: expected a plain tensor, not a sparse one")
    heads = q.shape[-2]
    if learnable_sink.dim() != 1 or learnable_sink.shape[0] != heads:
        shape = tuple(learnable_sink.shape)
        raise ValueError(
            f"learnable_sink has shape {shape}; expected ({heads},), one for each head"
        )
    if learnable_sink.device != q.device:
        raise ValueError(f"learnable_sink is on {learnable_sink.device}, q is on {q.device}")
    if not learnable_sink.dtype.is_floating_point:
        raise ValueError(f"learnable_sink has dtype {learnable_sink.dtype}; expected a float type")
    return learnable_sink.float().contiguous().resolve_neg()


def check_sink_values(sink: Tensor | None) -> None:
    """On the CPU; a GPU would have to be waited for."""
    if sink is None or not sink.is_cpu:
        return
    if not ((sink.abs() <= MAX_SINK) | (sink == -torch.inf)).all():
        raise ValueError(f"learnable_sink must be -inf or between -{MAX_SINK:g} and {MAX_SINK:g}")


FP8_OUT_DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn)
"""Dtypes of out, at their numbers in the kernels (`Output.types`, hopper/forward/output.py)."""


def check_shapes_of(inputs: Inputs) -> None:
    """Check dtypes and shapes, which tensors without data have, too."""
    q, k, v, *_ = inputs
    check_dtypes(q.dtype, k.dtype, v.dtype)
    check_shapes(q.shape, k.shape, v.shape, *inputs.packed)


def check_fp8_shapes_of(inputs: Inputs, options: Options, precision: PrecisionOptions) -> None:
    """Check shapes, head dims and out's dtype for the FP8 kernels."""
    q, k, v, *_ = inputs
    check_shapes(q.shape, k.shape, v.shape, *inputs.packed)
    check_fp8_head_dims(q.shape[-1], v.shape[-1])
    result_type(options.out_dtype, torch.bfloat16, precision)


def check_index_tensors(inputs: Inputs) -> None:
    q, k, queries, keys = inputs.q, inputs.k, inputs.queries, inputs.keys
    batch = _batch(q, k, queries, keys)
    for side, tensor, lengths in (("q", q, queries), ("k", k, keys)):
        check_index(f"cu_seqlens_{side}", lengths.cu_seqlens, batch + 1, q)
        check_index(f"seqused_{side}", lengths.seqused, batch, q)
        check_lengths(side, lengths, tensor.shape[-3])


def result_type(
    out_dtype: torch.dtype | None, dtype: torch.dtype, fp8: PrecisionOptions | None
) -> tuple[torch.dtype, int]:
    """out's dtype, and its number among those that the kernel stores."""
    if fp8 is None:
        out_dtype = resolve_out_dtype(out_dtype, dtype)
        return out_dtype, int(out_dtype == torch.float32)
    out_dtype = out_dtype or dtype
    if out_dtype not in FP8_OUT_DTYPES:
        have = ", ".join(map(str, FP8_OUT_DTYPES))
        raise NotImplementedError(f"out_dtype={out_dtype} is not supported for FP8; use {have}")
    return out_dtype, FP8_OUT_DTYPES.index(out_dtype)


def _batch(q: Tensor, k: Tensor, queries: Lengths, keys: Lengths) -> int:
    """Number of sequences, which whatever names it first says; the others are held to it."""
    sides = (("q", q, queries), ("k", k, keys))
    counts = {}
    for name, tensor, lengths in sides:
        cu_seqlens = lengths.cu_seqlens
        if cu_seqlens is None:
            counts[name] = tensor.shape[0]
        elif not isinstance(cu_seqlens, Tensor):
            kind = type(cu_seqlens).__name__
            raise TypeError(f"cu_seqlens_{name}: expected a torch.Tensor, got {kind}")
        elif cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            shape = tuple(cu_seqlens.shape)
            raise ValueError(f"cu_seqlens_{name} has shape {shape}; expected (batch + 1,)")
        else:
            counts[f"cu_seqlens_{name}"] = cu_seqlens.shape[0] - 1
    (first, batch), (second, other) = counts.items()
    if batch != other:
        raise ValueError(f"{second} has {other} sequences, {first} has {batch}")
    return batch
