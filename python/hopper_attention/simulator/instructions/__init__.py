"""The instruction set by family.

Two tables, filled by the modules of this package:

    PURE[name]     instruction -> list of Operation (lane arithmetic, loads, stores, shuffles);
                   these join straight runs and are compiled together
    CONTROL[name]  instruction -> handler(machine, unit) -> bool; these end a straight run.  False
                   means the unit cannot proceed yet and will be asked again

An instruction is looked up by its opcode, longest dotted prefix first: ``cp.async.bulk.tensor``
before ``cp.async.bulk``.  HELPERS are the functions that generated code may call.
"""

from collections.abc import Callable

import numpy as np

from ..ptx import Instruction
from ..vectorize import Operation

PURE: dict[str, Callable[[Instruction], list[Operation]]] = {}
CONTROL: dict[str, Callable[[Instruction], Callable]] = {}
HELPERS: dict[str, object] = {"np": np}


def pure(*names: str):
    """Register a translator of instructions that join straight runs."""

    def register(function):
        PURE.update(dict.fromkeys(names, function))
        return function

    return register


def control(*names: str):
    """Register a translator of instructions that need the machine."""

    def register(function):
        CONTROL.update(dict.fromkeys(names, function))
        return function

    return register


def helper(function):
    """Make a function callable from generated code under its own name."""
    HELPERS[function.__name__] = function
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


from . import arithmetic, bulk, control_flow, conversion, memory, synchronisation, warp, wgmma  # noqa: E402, F401
