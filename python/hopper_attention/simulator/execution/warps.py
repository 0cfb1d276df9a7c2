"""Units of warps: which warps run in lockstep, where they are, which of their lanes are active.

All warps of a warpgroup are one unit while they are at the same place, several after their branches
went different ways.  Within a unit, lanes that diverge are kept on a stack of (pc, meeting point,
active lanes) and meet again at the branch's immediate post-dominator.
"""

import numpy as np

from hopper_attention.simulator.errors import SimulatorError
from hopper_attention.simulator.execution.block import Block
from hopper_attention.simulator.execution.lanes import Lanes, Warpgroup
from hopper_attention.simulator.execution.program import EXIT
from hopper_attention.simulator.hardware.asynchronous import NamedBarrier
from hopper_attention.simulator.ptx.parser import Instruction


class Unit:
    """Warps of one warpgroup in lockstep.

    stack: [pc, meeting point, active lanes], top last; units: all of the cluster, to which those
    that part from this one are added.
    """

    def __init__(self, block: Block, warpgroup: Warpgroup, stack: list, units: list["Unit"]):
        self.block, self.warpgroup, self.stack, self.units = block, warpgroup, stack, units
        self.failed_wait: frozenset | None = None
        self.waiting_barrier: tuple[NamedBarrier, int] | None = None
        self.waiting = ""
        self.blocked_at = -1
        self.joins: set[int] = set()
        self.paused = False
        self.pc = self.meeting = 0
        self.lanes: Lanes
        self._load()

    def _load(self) -> None:
        self.pc, self.meeting, active = self.stack[-1]
        self.lanes = self.warpgroup.window(active)

    @property
    def warps(self) -> list[int]:
        first = self.warpgroup.first_thread // 32
        lanes = np.concatenate([active for _, _, active in self.stack])
        return (first + np.unique(lanes // 32)).tolist()

    def advance(self, pc: int) -> None:
        self.pc = self.stack[-1][0] = pc
        while self.stack[-1][0] == self.stack[-1][1]:
            self.stack.pop()
            self._load()

    def diverge(self, taken: np.ndarray, target: int, following: int, join: int) -> None:
        """Let lanes part.  Warps that part as a whole become units of their own."""
        lanes = self.lanes
        kinds = []
        for columns in lanes.warp_columns:
            part = taken[columns]
            kinds.append(2 if part.all() else 0 if not part.any() else 1)
        if len(set(kinds)) == 1:
            top = self.stack[-1]
            top[0] = join
            if join == EXIT:
                self.stack.pop()
            for pc, active in ((target, lanes.lanes[taken]), (following, lanes.lanes[~taken])):
                if pc != join:
                    self.stack.append([pc, join, active])
            self._load()
            return
        warps = [int(lanes.lanes[columns[0]]) // 32 for columns in lanes.warp_columns]
        start = 0
        parts = []
        for k in range(1, len(kinds) + 1):
            if k == len(kinds) or kinds[k] != kinds[start] or warps[k] != warps[k - 1] + 1:
                parts.append((set(warps[start:k]), kinds[start]))
                start = k
        if join != EXIT:
            self.joins.add(join)
        units = [self.restrict(chosen) for chosen, _ in parts]
        for unit, (_, kind) in zip(units, parts, strict=True):
            if kind == 1:
                chosen = np.isin(lanes.lanes, unit.lanes.lanes)
                unit.diverge(taken[chosen], target, following, join)
            else:
                unit.advance(target if kind == 2 else following)
        first = units[0]
        self.stack, self.joins = first.stack, first.joins
        self._load()
        self.units += units[1:]

    def restrict(self, warps: set[int]) -> "Unit":
        """Return a unit of only some of these warps (numbers within the warpgroup)."""
        stack = []
        for pc, meeting, active in self.stack:
            part = active[np.isin(active // 32, list(warps))]
            if len(part):
                stack.append([pc, meeting, part])
        unit = Unit(self.block, self.warpgroup, stack, self.units)
        unit.joins = set(self.joins)
        return unit

    def can_merge(self, other: "Unit") -> bool:
        return (
            other.warpgroup is self.warpgroup
            and self.waiting_barrier is None
            and other.waiting_barrier is None
            and len(self.stack) == len(other.stack)
            and all(a[:2] == b[:2] for a, b in zip(self.stack, other.stack, strict=True))
        )

    def merge(self, other: "Unit") -> None:
        for mine, theirs in zip(self.stack, other.stack, strict=True):
            mine[2] = np.union1d(mine[2], theirs[2])
        self.failed_wait = self.failed_wait if self.failed_wait == other.failed_wait else None
        self.joins &= other.joins
        self.blocked_at = -1
        rest = [u for u in self.units if u is not self and u is not other]
        self.paused = any(u.warpgroup is self.warpgroup and self.pc in u.joins for u in rest)
        if not self.paused:
            self.joins.discard(self.pc)
        self._load()

    def gather_warpgroup(self) -> bool:
        """True if all warps of the warpgroup are here, with all lanes, as wgmma needs."""
        if self.lanes.count == 128:
            return True
        if self.warpgroup.count != 128:
            raise SimulatorError("wgmma in a block whose last warpgroup is not whole")
        self.waiting = "the other warps of its warpgroup (wgmma)"
        return False

    def require_whole_warps(self, instruction: Instruction) -> None:
        """Raise unless all lanes of the warps that have not exited are here."""
        if self.lanes.whole_warps:
            return
        live = np.unique(np.concatenate([active for _, _, active in self.stack]))
        if len(live) != self.lanes.count:
            raise SimulatorError(f"{instruction.opcode} is executed by a part of a warp")

    def exit_lanes(self) -> None:
        """End the active lanes; others of the unit go on where they are."""
        ended = self.lanes.lanes
        self.block.exit_threads(self.lanes)
        self.stack[-1][0] += 1
        rest = [[pc, meeting, np.setdiff1d(lanes, ended)] for pc, meeting, lanes in self.stack]
        self.stack = [entry for entry in rest if len(entry[2])]
        while self.stack and self.stack[-1][0] == self.stack[-1][1]:
            self.stack.pop()
        if self.stack:
            self._load()

    def run(self, steps: int) -> None:
        program = self.block.launch.program.steps
        self.paused = False
        for _ in range(steps):
            step = program[self.pc]
            lanes = self.lanes
            if lanes.gathered:
                lanes.pull()
                done = step.execute(self.block, self)
                lanes.push()
            else:
                done = step.execute(self.block, self)
            if not self.stack:
                return
            if not done:
                self.blocked_at = self.block.cluster.version
                return
            if self.joins and self.pc in self.joins:
                self.paused = True
                return
