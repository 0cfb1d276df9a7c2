"""Which warps execute an instruction, where `setmaxnreg` splits a kernel into roles."""

from __future__ import annotations

from collections.abc import Sequence

from hopper_attention.sass.control_flow import ControlFlow
from hopper_attention.sass.disassembler import Instruction

PRODUCER, CONSUMER, ALL = "producer", "consumer", "all"

MARKERS = {"USETMAXREG.DEALLOC": PRODUCER, "USETMAXREG.TRY_ALLOC": CONSUMER}


def roles_of(code: Sequence[Instruction]) -> list[str]:
    """Return for every instruction the role whose register change dominates it, or `all`."""
    flow = ControlFlow(code)
    block_of = {i: block for block in flow.graph for i in flow.graph.nodes[block]["range"]}
    starts = [
        (block_of[i], role)
        for i, instruction in enumerate(code)
        for marker, role in MARKERS.items()
        if instruction.opcode.startswith(marker)
    ]
    role_of = {
        block: next((role for start, role in starts if flow.dominates(start, block)), ALL)
        for block in flow.graph
    }
    return [role_of[block_of[i]] for i in range(len(code))]
