"""Kernel arguments by name, and steps that several launches share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hopper_attention.dispatch import manifest
from hopper_attention.dispatch.target import Executor
from hopper_attention.launch import runtime
from hopper_attention.problem.values import Inputs

Value = Tensor | float | int | None


class KernelArguments(NamedTuple):
    """A kernel's arguments as `runtime.launch` takes them."""

    tensors: list[Tensor]
    scalars: list[float | int]
    pointees: list[Tensor]
    """The tensors whose addresses are among the scalars."""


def bind(instance: str, values: Mapping[str, Value]) -> KernelArguments:
    """Return the instance's arguments, found by their names among `values`.

    An argument that is an address takes a tensor, or None for 0.  `values` may have more names
    than this instance has arguments: one call's values serve all of its kernels.
    """
    found = KernelArguments([], [], [])
    for name, is_tensor in manifest.arguments(instance):
        value = values[name]
        if is_tensor:
            assert isinstance(value, Tensor), f"{instance}: {name} is {value!r}, not a tensor"
            found.tensors.append(value)
        elif isinstance(value, Tensor):
            found.scalars.append(value.data_ptr())
            found.pointees.append(value)
        else:
            found.scalars.append(0 if value is None else value)
    return found


def launch(
    executor: Executor, instance: str, values: Mapping[str, Value], sm_margin: int = 0
) -> None:
    """Run one kernel instance on the arguments that `bind` finds."""
    runtime.launch(executor, instance, *bind(instance, values), sm_margin)


def clear_unused(inputs: Inputs, out: Tensor, lse: Tensor) -> None:
    """Clear rows of no sequence; on a GPU only with seqused_q, since it costs a pass over out."""
    if inputs.varlen and (inputs.seqused_q is not None or not inputs.q.is_cuda):
        out.zero_()
        lse.fill_(-torch.inf)


def as_entry(tensor: Tensor, rank: int) -> Tensor:
    """Packed tensors are one batch entry."""
    return tensor.unsqueeze(0) if tensor.ndim < rank else tensor
