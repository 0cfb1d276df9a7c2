"""Memory of tensors: which ones TMA can address, and which may be written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 8
"""Elements of 16 bytes."""
Description = tuple[int, tuple[int, ...], tuple[int, ...]]
"""A tensor's address, shape and strides, as the extension takes them."""


def address_shape_stride(name: str, tensor: Tensor) -> Description:
    """Return address, shape and strides of the tensor as `addressable` makes it."""
    address, strides = tensor.data_ptr(), tensor.stride()
    outer_bits = strides[0] | strides[1] | strides[-2]  # of three or four dimensions
    if strides[-1] == 1 and not (outer_bits % ALIGNMENT or address % 16):
        return address, tensor.shape, strides
    tensor = addressable(name, tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def addressable(name: str, tensor: Tensor) -> Tensor:
    """The tensor as TMA can address it: contiguous rows, everything else in steps of 16 bytes.

    That goes for strides which an extent of 1 leaves unused, too: those are replaced.
    """
    *outer, last = tensor.stride()
    step = 16 // tensor.element_size()
    aligned = all(stride % step == 0 for stride in outer) and tensor.data_ptr() % 16 == 0
    if (last == 1 and aligned) or tensor.numel() == 0:
        return tensor
    if last != 1:
        raise ValueError(
            f"{name}: the last dimension must be contiguous (stride 1, got {last}); "
            f"use {name}.contiguous()"
        )
    for axis, stride in enumerate(outer):
        if tensor.shape[axis] > 1 and stride % step != 0:
            raise ValueError(
                f"{name}: stride {stride} of dimension {axis} is not a multiple of "
                f"{step} elements (16 bytes); use {name}.contiguous()"
            )
    if tensor.data_ptr() % 16 != 0:
        raise ValueError(f"{name}: the data pointer is not aligned to 16 bytes; use {name}.clone()")
    used = [s if n > 1 else step for n, s in zip(tensor.shape, outer)]
    return tensor.as_strided(tensor.shape, [*used, 1])


def made_addressable(name: str, tensor: Tensor) -> Tensor:
    """Return what `addressable` does, or a copy: for tensors that the caller has not laid out."""
    try:
        return addressable(name, tensor)
    except ValueError:
        return tensor.clone(memory_format=torch.contiguous_format)


def check_out(out: Any, q: Tensor, k: Tensor, v: Tensor, out_dtype: torch.dtype | None) -> None:
    """A tensor for the result."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a torch.Tensor, got {type(out).__name__}")
    shape, dtype = (*q.shape[:-1], v.shape[-1]), q.dtype if out_dtype is None else out_dtype
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; expected {shape}")
    if out.dtype != dtype:
        raise ValueError(f"out has dtype {out.dtype}; expected {dtype}")
    if out.device != q.device:
        raise ValueError(f"out is on {out.device}, q is on {q.device}")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out requires grad, which what is written cannot; use out.detach()")
    if _overlaps_itself(out):
        raise ValueError("out overlaps itself: several of its elements are one")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        plain = type(out) is type(tensor) is Tensor and not torch.compiler.is_compiling()
        if plain and not out.is_meta and _overlap(out, tensor):
            raise ValueError(f"out overlaps {name}: it is written while others are read")


def _overlaps_itself(tensor: Tensor) -> bool:
    reach = 0
    for stride, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n > 1:
            if stride <= reach:
                return True
            reach += (n - 1) * stride
    return False


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Say whether elements may be shared; columns of the same rows are told apart."""
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() or not a.numel():
        return False
    (first, n), (second, m) = ((x.data_ptr(), _reach(x)) for x in (a, b))
    if first + n <= second or second + m <= first:
        return False
    row = a.stride(-3)
    if a.stride(0) != b.stride(0) or row != b.stride(-3) or row == 0 or a.stride(0) % row:
        return True
    column = (second - first) % (row * a.element_size())
    width, other = (_reach(x[(0,) * (x.ndim - 2)]) for x in (a, b))
    return column < width or column + other > row * a.element_size()


def _reach(tensor: Tensor) -> int:
    """Bytes from the first element to behind the last."""
    steps = ((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (sum(steps) + 1) * tensor.element_size() if tensor.numel() else 0
