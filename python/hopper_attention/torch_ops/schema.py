"""The arguments of operators, derived from the tuples that describe a call.

An operator takes the fields of some NamedTuples, one after another.  Their names and annotations
are the schema's; nobody counts arguments or knows one by its position.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hopper_attention.problem.quantization import Fp8Options
from hopper_attention.problem.values import Bound, Descales, Inputs, Options, SequenceBounds

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
        """Return the operator's arguments as a tuple of groups."""
        remaining = iter(arguments)
        return tuple(group(*islice(remaining, len(group._fields))) for group in self.groups)

    def gradients(self, found: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Return a gradient for every argument: `found` for its group, None for the others."""
        none = ((None,) * len(group._fields) for group in self.groups)
        groups = (found if type(found) is group else rest for group, rest in zip(self.groups, none))
        return tuple(gradient for group in groups for gradient in group)

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


class Results(NamedTuple):
    """Results of forward, behind their gradients."""

    dout: Tensor
    dlse: Tensor | None
    out: Tensor
    lse: Tensor


FORWARD = Signature(Inputs, Options)
BACKWARD = Signature(Results, Inputs, Options)
ATTENTION_FP8 = Signature(Inputs, Options, Fp8Options)
FORWARD_FP8 = Signature(Inputs, Descales, Options, SequenceBounds)
