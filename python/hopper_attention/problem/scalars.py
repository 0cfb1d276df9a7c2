"""Checks of numbers, flags and bounds: one meaning of an integer for every function."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_dispatch_mode, _get_tracing_state, _TorchDispatchModeKey
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling


def flag(name: str, value: Any) -> bool:
    if value is True or value is False:
        return value
    if type(value).__name__ in ("bool", "bool_") and getattr(value, "ndim", 0) == 0:  # numpy's
        return bool(value)
    raise TypeError(f"{name}: expected True or False, got {shown(value)}")


def integer(name: str, value: Any, least: int, most: int = 2**31 - 1) -> int:
    """Return an integer of Python, NumPy or any type with `__index__` as Python's.

    No bool, no float, no tensor: reading a tensor may wait for a device.
    """
    if type(value) is int and least <= value <= most:
        return value
    if isinstance(value, (bool, Tensor)) or type(value).__name__ == "bool_":  # NumPy 1's
        raise TypeError(f"{name}: expected an integer, got {shown(value)}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {shown(value)}") from None
    if not least <= number <= most:
        bounds = f"from {least}" if most == 2**31 - 1 else f"between {least} and {most}"
        raise ValueError(f"{name} must be {bounds}, got {number}")
    return number


INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def bound(name: str, value: Any) -> int | None:
    """An upper bound of lengths; None: not known here, so the tensor's rows are one.

    An integer as `integer` has it, or a tensor of one.  Of a tensor on another device it is None,
    as reading would wait for the device, and so is that of any tensor while something traces: it
    would be a constant of what is traced.

    Raises TypeError or ValueError that names the argument.
    """
    compiling = is_compiling()
    if type(value) is int and (compiling or 0 <= value < 2**31):
        return value  # to a compiler perhaps a number that only the device knows: not comparable
    if value is None:
        return None
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]  # as good as an integer
    if isinstance(value, Tensor):
        if value.dtype not in INTEGERS or value.numel() != 1:
            kind = f"a {value.dtype} tensor of shape {tuple(value.shape)}"
            raise ValueError(f"{name}: expected one integer, got {kind}")
        if type(value) is not Tensor or not value.is_cpu or compiling or _traced():
            return None
        value = value.item()
    return integer(name, value, 0)


def _traced() -> bool:
    """Say whether a tracer other than a compiler, or a transform over many tensors, is at work."""
    return (
        _get_tracing_state() is not None
        or peek_interpreter_stack() is not None
        or _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None
    )


def real(name: str, value: Any, limits: tuple[float, float]) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {shown(value)}")
    low, high = limits
    if not (value >= low and value <= high):  # type: ignore[operator]  # false for NaN
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got {shown(value)}")
    return float(value)


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else type(value).__name__
