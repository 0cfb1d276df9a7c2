"""The registry of translators of instructions.

Two tables, which the families fill:

    PURE[name]     instruction -> list of Operation (lane arithmetic, loads, stores, shuffles);
                   these join straight runs and are compiled together
    CONTROL[name]  instruction -> handler(block, unit) -> bool; these end a straight run.  False
                   means the unit cannot proceed yet and will be asked again

An instruction is looked up by its opcode, longest dotted prefix first: ``cp.async.bulk.tensor``
before ``cp.async.bulk``.  HELPERS are the functions that generated code may call.
"""

from collections.abc import Callable

import numpy as np

from hopper_attention.simulator.ptx.parser import Instruction
from hopper_attention.simulator.ptx.vectorize import Operation

PURE: dict[str, Callable[[Instruction], list[Operation]]] = {}
CONTROL: dict[str, Callable[[Instruction], Callable]] = {}
TYPES = {
    "pred", "b8", "u8", "s8", "b16", "u16", "s16", "f16", "bf16", "b32", "u32", "s32", "f32",
    "f16x2", "bf16x2", "b64", "u64", "s64", "f64", "b128",
}  # fmt: skip
HELPERS: dict[str, object] = {"np": np}


def pure(*names: str, modifiers: str | None = None):
    """Register a translator of instructions that join straight runs.

    modifiers: all that it understands, beside types; others are refused.  None: it checks itself.
    """

    def register(function):
        PURE.update(dict.fromkeys(names, _checked(function, names, modifiers)))
        return function

    return register


def control(*names: str, modifiers: str | None = None):
    """Register a translator of instructions that need the block; modifiers: as for ``pure``."""

    def register(function):
        CONTROL.update(dict.fromkeys(names, _checked(function, names, modifiers)))
        return function

    return register


def _checked(function, names: tuple[str, ...], modifiers: str | None):
    if modifiers is None:
        return function
    known = TYPES | set(modifiers.split()) | {part for name in names for part in name.split(".")}

    def checked(instruction: Instruction):
        refuse_unknown(instruction, known)
        return function(instruction)

    return checked


def helper(function):
    """Make a function callable from generated code under its own name, which only one may have."""
    name = function.__name__
    assert HELPERS.setdefault(name, function) is function, f"two helpers are called {name}"
    return function


def refuse_unknown(instruction: Instruction, known: set[str]) -> None:
    """Stop at a modifier that is not in the translator's list: it might change the meaning."""
    for part in instruction.parts[1:]:
        if part not in known:
            raise instruction.unknown(f"modifier .{part}")


def find(table: dict[str, Callable], instruction: Instruction) -> Callable | None:
    parts = instruction.parts
    for n in range(len(parts), 0, -1):
        found = table.get(".".join(parts[:n]))
        if found is not None:
            return found
    return None
