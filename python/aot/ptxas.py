"""What ptxas reports about a kernel, and the gate that a compiled instance must pass."""

import re
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


def check(instance: Any, resources: Resources, opcodes: dict[str, int] | None) -> None:
    """Raise `GateError` unless the kernel keeps its instance's promises.

    `opcodes` counts the claimed SASS opcodes; None where there was no disassembler to count with.
    """
    faults = []
    if not instance.spills_because:
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
    if opcodes is not None:
        missing = [opcode for opcode in instance.claims if not opcodes[opcode]]
        faults += [
            f"no {opcode} in the SASS, which the instance claims: another operation or layout was"
            " compiled than meant"
            for opcode in missing
        ]
    if faults:
        raise GateError(f"instance {instance.name} fails the build: " + "; ".join(faults))
