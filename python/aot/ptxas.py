"""The report of ptxas on a kernel, and the gate that a compiled instance must pass."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Resources:
    """The worst of an object's kernels.  Bytes, but for registers and barriers."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    barriers: int
    serialized_wgmma: bool
    """ptxas waits after every WGMMA: results stay right, the overlap is gone."""


class GateError(RuntimeError):
    """A compiled kernel is not what its instance promises."""


def parse_remarks(remarks: str) -> Resources:
    """Read the report that `remarks{ptx}` writes."""

    def worst(pattern: str) -> int:
        return max((int(n) for n in re.findall(pattern, remarks)), default=0)

    if "Used " not in remarks:
        raise GateError(f"ptxas reported no register count; its remarks: {remarks!r}")
    return Resources(
        registers=worst(r"Used (\d+) registers"),
        stack=worst(r"(\d+) bytes stack frame"),
        spill_stores=worst(r"(\d+) bytes spill stores"),
        spill_loads=worst(r"(\d+) bytes spill loads"),
        barriers=worst(r"used (\d+) barriers"),
        serialized_wgmma="wgmma.mma_async instructions are serialized" in remarks,
    )


def check_resources(instance: Any, resources: Resources) -> None:
    """Raise `GateError` for spills and waits, unless the instance says why it may have them."""
    if instance.spills_because:
        return
    figures = asdict(resources)
    faults = [
        f"{figures[figure]} bytes of {what}: shrink the tile or raise the role's registers"
        for figure, what in (
            ("stack", "stack frame"),
            ("spill_stores", "register spill stores"),
            ("spill_loads", "register spill loads"),
        )
        if figures[figure]
    ]
    if resources.serialized_wgmma:
        faults.append(
            "WGMMA serialised by ptxas: too few registers for what is under way (C7512), or"
            " something reads or moves accumulators between a WGMMA and its wait (C7514): pin"
            " the fragment after wait_group"
        )
    if faults:
        faults.append("or say in the instance why it may: spills_because")
    _refuse(instance, faults)


def check_claims(instance: Any, opcodes: Mapping[str, int] | None) -> None:
    """Raise `GateError` unless the SASS has every opcode that the instance claims.

    `opcodes` counts what it has; None where there was no disassembler to count with.
    """
    missing = [] if opcodes is None else [o for o in instance.claims if not opcodes[o]]
    faults = [
        f"no {opcode} in the SASS, which the instance claims: another operation or layout was"
        " compiled than meant"
        for opcode in missing
    ]
    _refuse(instance, faults)


def _refuse(instance: Any, faults: Sequence[str]) -> None:
    if faults:
        raise GateError(f"instance {instance.name} fails the build: " + "; ".join(faults))
