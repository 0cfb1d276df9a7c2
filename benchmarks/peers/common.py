"""Code that the adapters share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from hopper_attention.bench.measure.inputs import Inputs
from hopper_attention.bench.measure.runner import Unsupported


def require(module: str) -> ModuleType:
    """Raises Unsupported where the module cannot be imported, whatever the reason."""
    try:
        return importlib.import_module(module)
    except Exception as fault:  # a broken installation raises anything
        raise Unsupported(f"cannot import {module}: {type(fault).__name__}: {fault}") from None


def refuse_if(condition: object, reason: str) -> None:
    if condition:
        raise Unsupported(reason)


def with_backward(
    inputs: Inputs, forward: Callable[[], Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """Return the call to time: forward, or only the gradients of one forward that has run."""
    if inputs.problem.direction != "backward":
        return lambda: (forward(),)
    with torch.enable_grad():
        out = forward()
    leaves = (inputs.q, inputs.k, inputs.v)
    return lambda: torch.autograd.grad(out, leaves, inputs.grad_out, retain_graph=True)


def without_support(call: Callable[[], object], *errors: type[Exception]) -> None:
    """Run `call` once; its NotImplementedError or one of `errors` means Unsupported."""
    unsupported: tuple[type[Exception], ...] = (NotImplementedError, *errors)
    try:
        call()
    except unsupported as fault:
        lines = str(fault).strip().splitlines()
        raise Unsupported(lines[0] if lines else type(fault).__name__) from None
