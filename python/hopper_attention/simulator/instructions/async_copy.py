"""cp.async of Ampere: copies of 4, 8 or 16 bytes a lane, their groups, arrival on an mbarrier."""

import numpy as np

from hopper_attention.simulator.hardware.asynchronous import Event
from hopper_attention.simulator.instructions.memory import address
from hopper_attention.simulator.instructions.registry import pure
from hopper_attention.simulator.ptx.parser import Immediate, Instruction, Register
from hopper_attention.simulator.ptx.vectorize import Operation


def _one(instruction: Instruction, line: str, inputs=()) -> list[Operation]:
    return [
        Operation(
            instruction, line, [], list(inputs), "store", guard=instruction.guard,
            constants=(instruction,),
        )
    ]  # fmt: skip


@pure(
    "cp.async",
    modifiers="ca cg shared shared::cta global L2::cache_hint L2::64B L2::128B L2::256B",
)
def _copy(instruction: Instruction) -> list[Operation]:
    """[shared], [global], bytes {, bytes to read or a predicate to ignore the source} {, policy}"""
    target, source, size, *rest = instruction.operands
    if "L2::cache_hint" in instruction.parts:
        rest = rest[:-1]
    where, target_base = address(instruction, target)
    place, source_base = address(instruction, source)
    inputs = [target_base, source_base]
    count = str(size.value)
    if rest and isinstance(rest[0], Register) and rest[0].bits == 1:
        inputs.append(("P", rest[0]))
        count = f"np.where({{2}}, 0, {size.value})"
    elif rest and isinstance(rest[0], (Register, Immediate)):
        inputs.append(("U", rest[0]))
        count = "{2}"
    place = place.replace("{0}", "{1}")
    return _one(instruction, f"C.copy_async(L, {{k0}}, {where}, {place}, {size.value}, {count})",
                inputs)  # fmt: skip


@pure("cp.async.commit_group", modifiers="")
def _commit(instruction: Instruction) -> list[Operation]:
    return _one(instruction, "C.commit_async(L)")


@pure("cp.async.wait_group", "cp.async.wait_all", modifiers="")
def _wait(instruction: Instruction) -> list[Operation]:
    everything = "wait_all" in instruction.parts
    keep = 0 if everything else instruction.operands[0].value
    return _one(instruction, f"C.wait_async(L, {keep}, {everything})")


@pure("cp.async.mbarrier.arrive", modifiers="noinc shared shared::cta b64")
def _arrive(instruction: Instruction) -> list[Operation]:
    """The barrier counts an arrival of each lane once the lane's copies so far are done."""
    where, base = address(instruction, instruction.operands[0])
    noinc = "noinc" in instruction.parts
    return _one(instruction, f"C.arrive_async(L, {{k0}}, {where}, {noinc})", [base])


class Copy:
    """One cp.async of a unit's lanes."""

    def __init__(self, warps: np.ndarray, agents: np.ndarray, units: np.ndarray | None):
        self.warps, self.agents, self.units = warps, agents, units
        self.event: Event | None = None

    def finish(self) -> None:
        assert self.event is not None
        self.event.complete()

    def lanes_of(self, warp: int) -> np.ndarray:
        return np.flatnonzero(self.warps == warp)


class CopyGroups:
    """cp.async groups of one warp."""

    def __init__(self) -> None:
        self.open: list[Copy] = []
        self.groups: list[list[Copy]] = []

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def take(self, keep: int, everything: bool) -> list[Copy]:
        """Copies that a wait is for; they are not tracked any longer."""
        count = max(0, len(self.groups) - keep)
        taken = [copy for group in self.groups[:count] for copy in group]
        del self.groups[:count]
        if everything:
            taken += self.open
            self.open = []
        return taken

    def all(self) -> list[Copy]:
        return [copy for group in self.groups for copy in group] + self.open
