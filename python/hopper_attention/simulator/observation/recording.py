"""A record of a block's warps, in program order, for the timeline.

A recording knows no time: each warp has a list of steps, and barriers tie the lists together.  The
cost model (timeline.py) replays it.

    with simulator.record() as recording:
        flash_attn_func(q, k, v)
    timeline = simulator.Timeline(recording.traces[0])
"""

import contextlib
import contextvars
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hopper_attention.simulator.ptx.parser import Instruction, Operand, registers_of

_FREE = {"ld.param", "mov", "cvta", "bra", "pragma"}  # gone or hidden in machine code
_MUFU = {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "sin", "cos"}
_ROUNDINGS = {"cvt.rni.s32.f32", "cvt.rzi.s32.f32"}
_PACKS = {"cvt.pack.sat.u8.s32.b32", "cvt.pack.sat.s8.s32.b32"}
_WIDE = ("u64", "s64", "b64")


@dataclass(frozen=True)
class Work:
    """A straight run of one warp: issue slots, MUFU instructions, shared memory bytes."""

    slots: int
    mufu: int
    shared_bytes: int
    line: int


@dataclass(frozen=True)
class Step:
    """One step of a warp.

    kind: work, wgmma, commit, wgmma_wait, load, store, store_wait, arrive or wait.

    value: Work; clocks-independent size (n of a wgmma, bytes of a copy, groups to keep); key: the
    barrier and its phase.
    """

    kind: str
    value: Any = None
    key: tuple[int, int] | None = None
    line: int = 0


@dataclass
class Trace:
    """One block's warps.  agents count from the block's first."""

    kernel: str
    ctaid: tuple[int, int, int]
    first_agent: int
    warps: list[list[Step]]
    contributions: dict[tuple[int, int], int] = field(default_factory=dict)
    _numbers: dict[int, int] = field(default_factory=dict)
    _kept: list[object] = field(default_factory=list)

    def _key(self, barrier: Any, phase: int) -> tuple[int, int]:
        number = self._numbers.get(id(barrier))
        if number is None:
            number = self._numbers[id(barrier)] = len(self._numbers)
            self._kept.append(barrier)  # its id must stay its own
        return number, phase

    @staticmethod
    def _phase(barrier: Any) -> int:
        return barrier.phase if hasattr(barrier, "phase") else barrier.generation

    def _add(self, agents: list[int], step: Step) -> None:
        for agent in agents:
            if 0 <= agent - self.first_agent < len(self.warps):
                self.warps[agent - self.first_agent].append(step)

    def region(self, warps: list[int], work: Work) -> None:
        for warp in warps:
            self.warps[warp].append(Step("work", work, line=work.line))

    def arrive(self, agents: list[int], barrier: object) -> None:
        """Record an arrival, before the barrier counts it."""
        key = self._key(barrier, self._phase(barrier))
        self.contributions[key] = self.contributions.get(key, 0) + len(agents)
        self._add(agents, Step("arrive", key=key))

    def waited(self, agents: list[int], barrier: object, phase: int | None = None) -> None:
        """Record a wait that is over; phase: the arrival's, by default the last one completed."""
        last = self._phase(barrier) - 1 if phase is None else phase
        if last >= 0:
            self._add(agents, Step("wait", key=self._key(barrier, last)))

    def bulk_load(self, agents: list[int], instruction: Instruction, nbytes: int, barrier) -> None:
        key = self._key(barrier, barrier.phase)
        self.contributions[key] = self.contributions.get(key, 0) + 1
        self._add(agents, Step("load", nbytes, key, instruction.line))

    def bulk_store(self, agents: list[int], instruction: Instruction, nbytes: int) -> None:
        self._add(agents, Step("store", nbytes, line=instruction.line))

    def bulk_wait(self, agents: list[int], keep: int) -> None:
        self._add(agents, Step("store_wait", keep))

    def wgmma(self, warps: list[int], instruction: Instruction, n: int, nbytes: int) -> None:
        for warp in warps:
            self.warps[warp].append(Step("wgmma", (n, nbytes), line=instruction.line))

    def commit(self, warps: list[int]) -> None:
        for warp in warps:
            self.warps[warp].append(Step("commit"))

    def wgmma_wait(self, warps: list[int], keep: int) -> None:
        for warp in warps:
            self.warps[warp].append(Step("wgmma_wait", keep))


def work_of(instructions: list[Instruction]) -> Work:
    """Return the costs of a straight run, from its PTX."""
    slots = mufu = shared = 0
    fused = _fused(instructions)
    for instruction in instructions:
        parts = instruction.parts
        if parts[0] in _FREE or parts[:2] == ("ld", "param"):
            continue
        if instruction.opcode in _ROUNDINGS and instruction.operands[0] in fused:
            continue
        slots += 2 if parts[-1] in _WIDE and parts[0] not in ("ld", "st", "setp") else 1
        mufu += parts[0] in _MUFU and parts[-1] == "f32"
        if any(part.startswith("shared") for part in parts):
            shared += 32 * _bytes_of(instruction)
    return Work(slots, mufu, shared, instructions[0].line)


def _fused(instructions: list[Instruction]) -> set[Operand]:
    """Rounded numbers that do nothing but become bytes: of two of them ptxas makes one F2IP."""
    rounded = [i.operands[0] for i in instructions if i.opcode in _ROUNDINGS]
    pairs = [i.operands[1:3] for i in instructions if i.opcode in _PACKS]
    packed = [operand for pair in pairs if set(pair) <= set(rounded) for operand in pair]
    operands = [operand for i in instructions for operand in i.operands]
    found = Counter[Operand](register for operand in operands for register in registers_of(operand))
    known = Counter(rounded + packed)
    return {operand for operand in packed if found[operand] == known[operand]}


def _bytes_of(instruction: Instruction) -> int:
    parts = instruction.parts
    if parts[0] in ("ldmatrix", "stmatrix"):
        return 4 * int(next((part[1:] for part in parts if part in ("x1", "x2", "x4")), 1))
    digits = "".join(c for c in parts[-1] if c.isdigit())
    count = int(next((part[1:] for part in parts if part in ("v2", "v4", "v8")), 1))
    return int(digits or 32) // 8 * count


@dataclass
class Recording:
    """The traces of the first ``blocks`` blocks of each launch inside of ``record``."""

    blocks: int
    traces: list[Trace] = field(default_factory=list)


_current: contextvars.ContextVar[Recording | None] = contextvars.ContextVar(
    "hopper_attention_simulator_recording", default=None
)


@contextlib.contextmanager
def record(blocks: int = 1) -> Iterator[Recording]:
    """Record launches on the simulator inside the ``with`` block, for Timeline."""
    recording = Recording(blocks)
    token = _current.set(recording)
    try:
        yield recording
    finally:
        _current.reset(token)


def current_recording() -> Recording | None:
    return _current.get()
