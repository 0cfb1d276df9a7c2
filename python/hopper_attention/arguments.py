"""Checks of the public functions' arguments, and the forms that the implementations take.

Messages name the argument, what was given and what is accepted.  Nothing is written before the last
check has passed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

Shape = Sequence[int]
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_HEAD_DIM = 256
ALIGNMENT = 8
"""Elements of 16 bytes."""
UNBOUNDED = 1 << 30
"""What the kernels take for a window side or chunk that hides nothing."""


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, beside the ends of the sequence.

    Query i is aligned with key a = i + seqlen_k - seqlen_q and sees keys a - left .. a + right, of
    those within a's chunk; UNBOUNDED sides and chunk hide nothing.
    """

    left: int = UNBOUNDED
    right: int = UNBOUNDED
    chunk: int = UNBOUNDED

    @property
    def kind(self) -> str:
        """The cheapest kernel's: "full", "causal" or "local"."""
        if self.left == UNBOUNDED and self.chunk == UNBOUNDED and self.right in (0, UNBOUNDED):
            return "causal" if self.right == 0 else "full"
        return "local"


FULL, CAUSAL = Mask(), Mask(right=0)


@dataclass(frozen=True)
class Lengths:
    """Sequences of one side that are not whole batch entries; flash-attn's tensors, int32.

    cu_seqlens (batch + 1): rows of packed sequences.  seqused (batch): used rows of each.
    """

    cu_seqlens: Tensor | None = None
    seqused: Tensor | None = None


WHOLE = Lengths()
"""Every batch entry is a sequence."""


def check_unsupported(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}: not supported yet; leave it at its default")


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What every call must check anew: types, devices, and what only backward could serve."""
    if not isinstance(q, Tensor):
        raise TypeError(f"q: expected a torch.Tensor, got {type(q).__name__}")
    device, grad_enabled = q.device, torch.is_grad_enabled()
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, q is on {device}")
        if grad_enabled and tensor.requires_grad:
            raise NotImplementedError(
                f"{name} requires grad, and there is no backward yet; use torch.no_grad()"
            )


def check_dtypes(*dtypes: torch.dtype) -> None:
    """Of q, k and v."""
    for name, dtype in zip("qkv", dtypes, strict=True):
        if dtype not in DTYPES:
            raise NotImplementedError(
                f"{name} has dtype {dtype}; supported: torch.bfloat16, torch.float16"
            )
        if dtype != dtypes[0]:
            raise ValueError(f"{name} has dtype {dtype}, q has {dtypes[0]}")


def check_shapes(q: Shape, k: Shape, v: Shape, packed_q: bool, packed_k: bool) -> None:
    """(batch, seqlen, heads, head_dim), or (total, heads, head_dim) where packed."""
    for name, shape, packed in (("q", q, packed_q), ("k", k, packed_k), ("v", v, packed_k)):
        if len(shape) != (3 if packed else 4):
            form = "(total, heads, head_dim)" if packed else "(batch, seqlen, heads, head_dim)"
            raise ValueError(f"{name} has shape {tuple(shape)}; expected {form}")
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


def addressable(name: str, tensor: Tensor) -> Tensor:
    """The tensor as TMA can address it: contiguous rows, everything else in steps of 16 bytes.

    That goes for strides which an extent of 1 leaves unused, too: those are replaced.
    """
    *outer, last = tensor.stride()
    if last == 1 and not (any(s % ALIGNMENT for s in outer) or tensor.data_ptr() % 16):
        return tensor
    if tensor.numel() == 0:
        return tensor
    if last != 1:
        raise ValueError(
            f"{name}: the last dimension must be contiguous (stride 1, got {last}); "
            f"use {name}.contiguous()"
        )
    for axis, stride in enumerate(outer):
        if tensor.shape[axis] > 1 and stride % ALIGNMENT != 0:
            raise ValueError(
                f"{name}: stride {stride} of dimension {axis} is not a multiple of "
                f"{ALIGNMENT} elements (16 bytes); use {name}.contiguous()"
            )
    if tensor.data_ptr() % 16 != 0:
        raise ValueError(f"{name}: the data pointer is not aligned to 16 bytes; use {name}.clone()")
    strides = [s if n > 1 else ALIGNMENT for n, s in zip(tensor.shape, outer)]
    return tensor.as_strided(tensor.shape, [*strides, 1])


def check_index(name: str, index: Tensor | None, size: int, q: Tensor) -> None:
    """An int32 vector of known size beside q, or None."""
    if index is None:
        return
    if not isinstance(index, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(index).__name__}")
    if index.device != q.device:
        raise ValueError(f"{name} is on {index.device}, q is on {q.device}")
    if index.dtype != torch.int32:
        raise ValueError(f"{name} has dtype {index.dtype}; expected torch.int32")
    if index.dim() != 1 or index.shape[0] != size or not index.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(index.shape)}; expected a contiguous vector of {size}"
        )


def check_lengths(side: str, lengths: Lengths, rows: int) -> None:
    """The values: ascending, inside the tensor.  On a GPU this waits for it: debugging only."""
    cu_seqlens, seqused = lengths.cu_seqlens, lengths.seqused
    given = cu_seqlens if cu_seqlens is not None else seqused
    if given is None or (given.is_cuda and not os.environ.get("HOPPER_ATTENTION_DEBUG")):
        return
    allotted: list[int] | None = None
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        allotted = [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
        if offsets[0] < 0 or min(allotted, default=0) < 0 or offsets[-1] > rows:
            raise ValueError(f"cu_seqlens_{side} must ascend from 0 to at most {rows} rows")
    if seqused is not None:
        used = seqused.tolist()
        limits = allotted if allotted is not None else [rows] * len(used)
        if any(not 0 <= n <= limit for n, limit in zip(used, limits, strict=True)):
            raise ValueError(f"seqused_{side} must be between 0 and the sequences' lengths")


def resolve_scale(softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return 1.0 / math.sqrt(head_dim)
    return _positive("softmax_scale", softmax_scale)


def resolve_softcap(softcap: float) -> float | None:
    """None for 0, which means no softcap."""
    return _positive("softcap", softcap) if softcap else None


def _positive(name: str, value: float) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def resolve_mask(
    causal: bool,
    window_size: Sequence[int | None],
    attention_chunk: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Mask:
    """The least mask that hides the same; the bounds may exceed the sequences' true lengths."""
    if attention_chunk == 0 and window_size == (-1, -1):
        return CAUSAL if causal else FULL
    try:
        left, right = (-1 if w is None else int(w) for w in window_size)
    except (TypeError, ValueError):
        raise ValueError(f"window_size must be (left, right), got {window_size!r}") from None
    if not isinstance(attention_chunk, int) or attention_chunk < 0:
        raise ValueError(f"attention_chunk must be an integer from 0, got {attention_chunk!r}")
    if causal:
        right = 0
    bounded = 0 <= left < max_seqlen_k - 1, 0 <= right < max_seqlen_q - 1 or causal
    return Mask(
        left if bounded[0] else UNBOUNDED,
        right if bounded[1] else UNBOUNDED,
        attention_chunk if 0 < attention_chunk < max_seqlen_k else UNBOUNDED,
    )


def resolve_sink(learnable_sink: Tensor | None, q: Tensor) -> Tensor | None:
    """A float32 score for each head."""
    if learnable_sink is None:
        return None
    heads = q.shape[-2]
    if not isinstance(learnable_sink, Tensor):
        kind = type(learnable_sink).__name__
        raise TypeError(f"learnable_sink: expected a torch.Tensor, got {kind}")
    if tuple(learnable_sink.shape) != (heads,):
        shape = tuple(learnable_sink.shape)
        raise ValueError(
            f"learnable_sink has shape {shape}; expected ({heads},), one for each head"
        )
    if learnable_sink.device != q.device:
        raise ValueError(f"learnable_sink is on {learnable_sink.device}, q is on {q.device}")
    if not learnable_sink.dtype.is_floating_point:
        raise ValueError(f"learnable_sink has dtype {learnable_sink.dtype}; expected a float type")
    if learnable_sink.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("learnable_sink requires grad, and there is no backward yet")
    return learnable_sink.float().contiguous()
