"""Checks of what goes with FP8 tensors: descales, bounds, classes of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hopper_attention.cute_kernels.conventions import LEAST_DESCALE
from hopper_attention.problem import checks, memory
from hopper_attention.problem.checks import check_shapes_of
from hopper_attention.problem.values import Inputs, Lengths


def check_operands(inputs: Inputs) -> None:
    """Check tensors that are about to be quantised: 16 bits, as the kernels can load them."""
    checks.check_dtypes(inputs.q.dtype, inputs.k.dtype, inputs.v.dtype)
    check_shapes_of(inputs)
    for name, tensor in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v)):
        memory.addressable(name, tensor)


def sequence_bounds(inputs: Inputs, *given: int | None) -> tuple[int, int]:
    """Upper bounds of the sequences' lengths: of packed ones what the caller says."""
    sides = (("q", inputs.q, inputs.queries), ("k", inputs.k, inputs.keys))
    bound_q, bound_k = (
        _bound(f"max_seqlen_{side}", x.shape[-3], lengths, bound)
        for (side, x, lengths), bound in zip(sides, given, strict=True)
    )
    return bound_q, bound_k


def _bound(name: str, rows: int, lengths: Lengths, given: int | None) -> int:
    if lengths.cu_seqlens is None or given is None:
        return rows
    if checks.readable(lengths.cu_seqlens):
        used = lengths.cu_seqlens.diff() if lengths.seqused is None else lengths.seqused
        if (used > given).any():
            raise ValueError(f"{name} is {given}, less than a sequence of {used.max()}")
    return given


def check_classes(**tensors: Tensor | None) -> None:
    """Neither sharding rules nor anything else is known of the operators' operands."""
    for name, tensor in tensors.items():
        if tensor is not None and is_traceable_wrapper_subclass(tensor):
            raise NotImplementedError(
                f"{name} is a {type(tensor).__name__}; FP8 takes plain tensors (DTensor.to_local())"
            )


def checked_descale(
    name: str, descale: Tensor | None, x: Tensor, heads_kv: int, sequences: int, seqlen: int
) -> Tensor:
    if descale is None:
        return torch.ones(1, device=x.device)
    _check_scales(name, descale, x)
    heads = x.shape[-2]
    blocks = [-(-seqlen // rows) for rows in (64, 128)]
    fitting = [(1,), (), (sequences, heads_kv), *((sequences, heads, n) for n in blocks)]
    if tuple(descale.shape) not in fitting:
        side = "q" if name == "q_descale" else "k"
        raise ValueError(
            f"{name} has shape {tuple(descale.shape)}; expected (1,), (batch, heads_kv) = "
            f"{(sequences, heads_kv)}, or of blocks of 64 or 128 rows {fitting[3]} or "
            f"{fitting[4]}, as many as a max_seqlen_{side} of {seqlen} has"
        )
    if descale.is_cpu and ((descale > 0) & (descale < LEAST_DESCALE)).any():
        raise ValueError(f"{name} must be 0 or at least {LEAST_DESCALE:g}")
    return descale.resolve_neg()


def check_scale_of_values(v: Tensor, v_descale: Tensor) -> None:
    """Check V for a softmax without exponentials: P cannot take the scales of its blocks."""
    if v.dtype == torch.float8_e5m2:
        raise NotImplementedError(
            "exact_softmax=False: v is float8_e5m2, whose values get scales of blocks; use "
            "float8_e4m3fn or exact_softmax=True"
        )
    if v_descale.ndim == 3 and v_descale.shape[2] > 1:
        raise NotImplementedError(
            f"exact_softmax=False: v_descale has {v_descale.shape[2]} blocks; use one number, "
            "(batch, heads_kv), or exact_softmax=True"
        )


def checked_out_descale(descale: Tensor | None, out_dtype: torch.dtype, q: Tensor) -> Tensor | None:
    if descale is None:
        return None
    if out_dtype != torch.float8_e4m3fn:
        raise ValueError("out_descale: only with out_dtype=torch.float8_e4m3fn; leave it out")
    _check_scales("out_descale", descale, q)
    if descale.numel() != 1:
        raise ValueError(f"out_descale has shape {tuple(descale.shape)}; expected (1,)")
    if descale.is_cpu and not (descale > 0).all():
        raise ValueError("out_descale must be positive")
    return descale.resolve_neg()


def _check_scales(name: str, descale: Any, x: Tensor) -> None:
    if not isinstance(descale, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(descale).__name__}")
    if descale.device != x.device:
        raise ValueError(f"{name} is on {descale.device}, its tensor is on {x.device}")
    if descale.dtype != torch.float32:
        raise ValueError(f"{name} has dtype {descale.dtype}; expected torch.float32")
    if descale.layout is not torch.strided:
        raise ValueError(f"{name}: expected a plain tensor, not a sparse one")
    if descale.is_cpu and not ((descale >= 0) & (descale < torch.inf)).all():
        raise ValueError(f"{name} must be finite and not negative")
