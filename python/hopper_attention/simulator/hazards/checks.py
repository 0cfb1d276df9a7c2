"""The checks of one block's shared memory and registers, and the reports of what they find.

An access is held against two things: asynchronous operations that nobody has waited for yet
(`SharedAccesses`, intervals), and accesses that are over but not ordered before it (`Shadow` of
races.py, happens-before).
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hopper_attention.simulator.errors import HazardError, HazardWarning
from hopper_attention.simulator.hazards.races import Clocks, Conflict, Shadow
from hopper_attention.simulator.ptx.parser import Instruction
from hopper_attention.simulator.ptx.vectorize import Operation


@dataclass(eq=False)
class SharedAccess:
    """Bytes [low, high) of shared memory that an asynchronous operation uses until waited for."""

    low: int
    high: int
    writes: bool
    owner: object
    text: str
    warp: int | None = None  # of the warpgroup, where only that one reads


class SharedAccesses:
    """The asynchronous accesses to a block's shared memory that nobody has waited for yet."""

    def __init__(self) -> None:
        self.reads: list[SharedAccess] = []
        self.writes: list[SharedAccess] = []

    def add(self, access: SharedAccess) -> None:
        (self.writes if access.writes else self.reads).append(access)

    def remove(self, access: SharedAccess) -> None:
        (self.writes if access.writes else self.reads).remove(access)

    def collision(
        self, low: int, high: int, writes: bool, pieces: tuple[np.ndarray, int] | None = None
    ) -> SharedAccess | None:
        """An access that one to [low, high) must not overlap; of that only `pieces` are accessed.

        pieces: where they start, and the bytes of each.  Rows that a warpgroup writes may lie on
        both sides of those that another one's WGMMA reads.
        """
        for access in (*self.writes, *(self.reads if writes else ())):
            if access.low < high and low < access.high:
                if pieces is None:
                    return access
                starts, nbytes = pieces
                if ((starts < access.high) & (starts + nbytes > access.low)).any():
                    return access
        return None


class Reports:
    """The hazards that a launch has reported.  mode: "raise", "warn" or "off", see Options."""

    def __init__(self, mode: str):
        self.mode = mode
        self._places: set[tuple[int, str]] = set()

    def add(self, instruction: Instruction, message: str, text: str) -> None:
        """Raise or warn with ``text``; warnings come once a place and message."""
        if self.mode == "off":
            return
        if self.mode == "raise":
            raise HazardError(text)
        if (instruction.line, message) not in self._places:
            self._places.add((instruction.line, message))
            warnings.warn(text, HazardWarning, stacklevel=3)


class Hazards:
    """The checks of a block, whose warps are the cluster's agents from ``first_agent`` on.

    shadow is None where hazards are off: then nothing but asynchronous operations under way is
    tracked.
    """

    shadow: Shadow | None
    accesses: SharedAccesses
    clocks: Clocks
    ctaid: tuple[int, int, int]

    def __init__(self, reports: Reports, kernel: str, first_agent: int, nbytes: int, grain: int):
        self.reports, self.kernel, self.first_agent = reports, kernel, first_agent
        self._size = nbytes, grain
        self.shadow = None

    def start(self, ctaid: tuple[int, int, int], clocks: Clocks) -> None:
        """Begin another block in this one's place."""
        self.ctaid, self.clocks = ctaid, clocks
        self.accesses = SharedAccesses()
        if self.reports.mode == "off":
            return
        if self.shadow is None:
            self.shadow = Shadow(*self._size, clocks)
        else:
            self.shadow.reset(clocks)

    # --- reports

    def report(self, instruction: Instruction, message: str, warps: object = None) -> None:
        """Report once a place and kind; warps: an array or list of numbers, or a text."""
        if isinstance(warps, (np.ndarray, list)):
            warps = ", ".join(map(str, warps))
        at = "" if warps is None else f", warp {warps}"
        text = f"{message}\n  {instruction.where()}\n  block {self.ctaid}{at} of {self.kernel}"
        self.reports.add(instruction, message, text)

    def report_conflict(self, instruction: Instruction, conflict: Conflict, writes: bool) -> None:
        """Report an access of this block that is not ordered after another agent's."""
        message = self._described(conflict, "writes" if writes else "reads")
        self.report(instruction, message, conflict.by - self.first_agent)

    def _described(self, conflict: Conflict, verb: str) -> str:
        if conflict.kind == "unwritten":
            return "reads shared memory that nothing has written"
        who, line = self.clocks.names[conflict.agent], conflict.line
        if not conflict.fenced:
            return (
                f"reads what {who} stored at PTX line {line} without a fence.proxy.async after it"
            )
        if conflict.kind == "read":
            what = f" ({conflict.text})" if conflict.text else ""
            return f"{verb} shared memory that {who} may still read{what}: no barrier between"
        return f"{verb} shared memory that {who} wrote at PTX line {line}: no barrier between"

    def report_early_use(
        self, operations: Iterable[Operation], accumulators: int, fragments: int, warps: str
    ) -> None:
        """Find the operation that uses registers of a wgmma not waited for.

        accumulators, fragments: masks of the 32-bit registers that products under way write and
        read.
        """
        for operation in operations:
            registers = {r for r in operation.registers_read() if r.bits == 32}
            written = {r for _, r in operation.outputs if r.bits == 32}
            for register in registers | written:
                bit = 1 << register.index
                if bit & accumulators or (register in written and bit & fragments):
                    self.report(
                        operation.instruction,
                        f"{register} is used before wgmma.wait_group of the wgmma that uses it",
                        warps,
                    )
                    return

    # --- accesses to shared memory

    def check_lanes(
        self,
        owner: "Hazards",
        instruction: Instruction,
        warps: np.ndarray,
        offsets: np.ndarray,
        nbytes: int,
        writes: bool,
        strong: bool = False,
    ) -> None:
        """Check ordinary accesses of this block's lanes to shared memory of the block of ``owner``.

        warps: one an offset.
        """
        if owner.accesses.writes or (writes and owner.accesses.reads):
            low, high = int(offsets.min()), int(offsets.max()) + nbytes
            owner.check_overlap(instruction, low, high, writes, warps, (offsets, nbytes))
        if owner.shadow is None:
            return
        agents, units = self.first_agent + warps, owner.shadow.units(offsets, nbytes)
        if writes:
            conflict = owner.shadow.write(agents, units, instruction.line, strong)
        else:
            conflict = owner.shadow.read(agents, units, strong)
        if conflict:
            self.report_conflict(instruction, conflict, writes)

    def check_bulk_read(self, instruction: Instruction, warps: np.ndarray, pieces) -> None:
        """Check that the asynchronous proxy may read 16-byte pieces on behalf of these warps."""
        if self.shadow is not None:
            conflict = self.shadow.bulk_read(self.first_agent + warps, pieces)
            if conflict:
                self.report_conflict(instruction, conflict, False)

    def check_overlap(
        self,
        instruction: Instruction,
        low: int,
        high: int,
        writes: bool,
        warps: np.ndarray,
        pieces: tuple[np.ndarray, int] | None = None,
    ) -> None:
        """Check that an access to [low, high) overlaps no asynchronous one not waited for."""
        access = self.accesses.collision(low, high, writes, pieces)
        if access is not None:
            kind = "writes" if writes else "reads"
            use = "being written" if access.writes else "still being read"
            message = f"{kind} shared memory {use} by {access.text}"
            self.report(instruction, message, np.unique(warps))

    # --- fences

    def fence_release(self, warps: np.ndarray) -> None:
        """Let later relaxed arrivals of these warps hand over what they know now."""
        if self.shadow is not None:
            self.clocks.release_fence(self.first_agent + warps)

    def fence_proxy(self, warps: np.ndarray) -> None:
        """Show the stores of these warps to the asynchronous proxy."""
        if self.shadow is not None:
            self.clocks.fence(self.first_agent + warps)
