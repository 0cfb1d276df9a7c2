"""Registers, lanes and units of warps.

A Warpgroup owns the registers of up to 128 threads: rows are registers, columns are lanes.  A Unit
is a set of its warps that run in lockstep: all four while they are at the same place, fewer after
their branches went different ways.  Within a unit, lanes that diverge are kept on a stack of (pc,
meeting point, active lanes) and meet again at the branch's immediate post-dominator.  Lanes (a
window on the registers) is what instructions compute on: views of a range of columns, or copies of
scattered ones.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from hopper_attention.simulator.errors import SimulatorError
from hopper_attention.simulator.execution.program import EXIT
from hopper_attention.simulator.hardware.asynchronous import NamedBarrier
from hopper_attention.simulator.hardware.tensor_core import Queue
from hopper_attention.simulator.ptx.parser import Instruction

if TYPE_CHECKING:
    from hopper_attention.simulator.execution.block import Block

_VIEWS: dict[int, dict[str, Any]] = {
    1: {"P": np.bool_},
    16: {"H": np.uint16, "S": np.int16, "E": np.float16},
    32: {"U": np.uint32, "I": np.int32, "F": np.float32},
    64: {"W": np.uint64, "J": np.int64, "D": np.float64},
}
_DTYPES: dict[int, Any] = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class Lanes:
    """A window on a warpgroup's registers: the active lanes, in ascending order."""

    def __init__(self, warpgroup: "Warpgroup", lanes: np.ndarray):
        self.lanes, self.count = lanes, len(lanes)
        self.threads = warpgroup.first_thread + lanes
        self.shuffles: dict = {}
        step = int(lanes[1] - lanes[0]) if len(lanes) > 1 else 1
        regular = bool((np.diff(lanes) == step).all())
        self.gathered = not regular
        self._files = warpgroup.registers
        self._copies: dict[int, np.ndarray] = {}
        columns = slice(int(lanes[0]), int(lanes[-1]) + 1, step)
        for bits, file in warpgroup.registers.items():
            if regular:
                part = file[:, columns]
            else:
                part = self._copies[bits] = np.empty((len(file), len(lanes)), file.dtype)
            for letter, dtype in _VIEWS[bits].items():
                setattr(self, letter, part.view(dtype))
        warps = lanes // 32
        self.warps = np.unique(self.threads // 32)
        self.warp_columns = [np.flatnonzero(warps == warp) for warp in np.unique(warps)]
        self.warp_count = len(self.warp_columns)
        self.whole_warps = self.count == 32 * self.warp_count
        self.zero = np.zeros(self.count, np.uint32)
        self.elected = np.zeros(self.count, np.bool_)
        self.leader = np.zeros(self.count, np.uint32)
        for column in self.warp_columns:
            self.elected[column[0]] = True
            self.leader[column] = lanes[column[0]] & 31
        self.special = self._special(warpgroup.shape)

    def _special(self, block: tuple[int, int, int]) -> dict[str, np.ndarray]:
        threads = self.threads
        lane = (self.lanes & 31).astype(np.uint32)
        bit = np.uint32(1) << lane
        return {
            "%tid.x": (threads % block[0]).astype(np.uint32),
            "%tid.y": (threads // block[0] % block[1]).astype(np.uint32),
            "%tid.z": (threads // (block[0] * block[1])).astype(np.uint32),
            "%laneid": lane,
            "%warpid": (threads // 32).astype(np.uint32),
            "%lanemask_eq": bit,
            "%lanemask_lt": bit - np.uint32(1),
            "%lanemask_le": bit - np.uint32(1) | bit,
            "%lanemask_gt": ~(bit - np.uint32(1) | bit),
            "%lanemask_ge": ~(bit - np.uint32(1)),
        }

    def pull(self) -> None:
        """Scattered lanes: copy their registers in before a step, and out after it."""
        for bits, copy in self._copies.items():
            copy[...] = self._files[bits][:, self.lanes]

    def push(self) -> None:
        for bits, copy in self._copies.items():
            self._files[bits][:, self.lanes] = copy


class Warpgroup:
    """Registers of up to four warps, and their asynchronous products."""

    def __init__(self, block: "Block", number: int, threads: int):
        self.number, self.count = number, threads
        self.first_thread = 128 * number
        self.shape: tuple[int, int, int] = block.block
        self.registers: dict[int, np.ndarray] = {
            bits: np.empty((max(1, rows), threads), _DTYPES[bits])
            for bits, rows in block.program.rows.items()
        }
        self._windows: dict[bytes, Lanes] = {}
        self.everyone = np.arange(threads)
        self.block = block
        self.reset()

    def reset(self) -> None:
        for file in self.registers.values():
            file.view(np.uint8)[...] = 0xFF if file.dtype != np.bool_ else 0
        self.queue = Queue(self.block, self)
        self.touched = -1  # every register counts as used before the first wgmma.fence

    def window(self, lanes: np.ndarray) -> Lanes:
        key = lanes.tobytes()
        found = self._windows.get(key)
        if found is None:
            found = self._windows[key] = Lanes(self, lanes)
        return found


class Unit:
    """Warps of one warpgroup in lockstep; stack: [pc, meeting point, active lanes], top last."""

    def __init__(self, block: "Block", warpgroup: Warpgroup, stack: list):
        self.block, self.warpgroup, self.stack = block, warpgroup, stack
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
        """Lanes part.  Warps that part as a whole become units of their own."""
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
        self.block.cluster.units += units[1:]

    def restrict(self, warps: set[int]) -> "Unit":
        """A unit of only some of these warps (numbers within the warpgroup)."""
        stack = []
        for pc, meeting, active in self.stack:
            part = active[np.isin(active // 32, list(warps))]
            if len(part):
                stack.append([pc, meeting, part])
        unit = Unit(self.block, self.warpgroup, stack)
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
        rest = [u for u in self.block.cluster.units if u is not self and u is not other]
        self.paused = any(u.warpgroup is self.warpgroup and self.pc in u.joins for u in rest)
        if not self.paused:
            self.joins.discard(self.pc)
        self._load()

    def gather_warpgroup(self) -> bool:
        """wgmma needs all warps of the warpgroup here, with all lanes."""
        if self.lanes.count == 128:
            return True
        if self.warpgroup.count != 128:
            raise SimulatorError("wgmma in a block whose last warpgroup is not whole")
        self.waiting = "the other warps of its warpgroup (wgmma)"
        return False

    def require_whole_warps(self, instruction: Instruction) -> None:
        """All lanes of the warps that have not exited must be here."""
        if self.lanes.whole_warps:
            return
        live = np.unique(np.concatenate([active for _, _, active in self.stack]))
        if len(live) != self.lanes.count:
            raise SimulatorError(f"{instruction.opcode} is executed by a part of a warp")

    def exit_lanes(self) -> None:
        """The active lanes end; others of the unit go on where they are."""
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
        program = self.block.program.steps
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
