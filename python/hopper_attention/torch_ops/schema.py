"""The arguments of operators, derived from the tuples that describe a call.

An operator takes the fields of some NamedTuples, one after another.  Their names and annotations
are the schema's; from them follow the number and the places of arguments and of gradients.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from hopper_attention.problem.quantization import Fp8Options
from hopper_attention.problem.values import (
    Bound,
    Descales,
    Inputs,
    Options,
    PrecisionOptions,
    ResultsAndGradients,
    SequenceBounds,
)

TYPES = {
    Tensor: "Tensor",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    torch.dtype: "ScalarType",
    Bound: "SymInt",
}
"""Annotation of a field -> type in an operator's schema."""


class Signature:
    """The arguments of one operator: `groups` are NamedTuple classes with distinct field names."""

    def __init__(self, *groups: type[Any]):
        self.groups = groups
        hints = [hint for group in groups for hint in _hints(group).items()]
        self.types = {name: _type(hint) for name, hint in hints}
        """Name -> type in the schema, in order."""
        assert len(self.types) == len(hints), "two fields have the same name"

    def __str__(self) -> str:
        """Return the arguments in the schema's language."""
        return ", ".join(f"{kind} {name}" for name, kind in self.types.items())

    def groups_of(self, arguments: Iterable[Any]) -> Any:
        """Return the operator's arguments, all of which PyTorch passes, as a tuple of groups."""
        remaining = iter(arguments)
        return tuple(group(*islice(remaining, len(group._fields))) for group in self.groups)

    def gradients(self, found: Any) -> tuple[Tensor | None, ...]:
        """Return a gradient for every argument: those of `found`, one of the groups, and None."""
        assert type(found) in self.groups, f"{type(found)} is no group of the operator's"
        gradients: list[Tensor | None] = []
        for group in self.groups:
            gradients += found if type(found) is group else [None] * len(group._fields)
        return tuple(gradients)

    def tensors(self, arguments: Iterable[Any]) -> dict[str, Any]:
        """Return the arguments that are tensors by name, those that are absent included."""
        pairs = zip(self.types.items(), arguments)
        return {name: value for (name, kind), value in pairs if kind.startswith("Tensor")}


def _hints(group: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(group, include_extras=True)


def _type(hint: Any) -> str:
    """Return the schema's type of an annotation, one of TYPES or that or None."""
    if hint in TYPES:
        return TYPES[hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (kind,) = (one for one in typing.get_args(hint) if one is not type(None))
        return f"{TYPES[kind]}?"
    raise TypeError(f"{hint} has no type in a schema")


FORWARD = Signature(Inputs, Options)
BACKWARD = Signature(ResultsAndGradients, Inputs, Options)
ATTENTION_FP8 = Signature(Inputs, Options, Fp8Options)
FORWARD_FP8 = Signature(Inputs, Descales, Options, SequenceBounds, PrecisionOptions)
