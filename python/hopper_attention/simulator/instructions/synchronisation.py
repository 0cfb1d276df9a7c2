"""mbarrier, named barriers, fences."""

import numpy as np

from ..asynchronous import Mbarrier, NamedBarrier
from ..errors import BarrierError
from ..ptx import SINK, Address, Immediate, Instruction, Symbol
from ..vectorize import Operation
from . import control, pure


def operand_values(unit, operand, view: str = "U") -> np.ndarray:
    """Value of an operand in every active lane."""
    lanes = unit.lanes
    if isinstance(operand, Immediate):
        return np.full(lanes.count, operand.value)
    if isinstance(operand, Symbol):
        return np.broadcast_to(lanes.symbol(operand.name), (lanes.count,))
    return getattr(lanes, view)[operand.index]


def shared_addresses(unit, operand: Address) -> np.ndarray:
    return operand_values(unit, operand.base).astype(np.int64) + operand.offset


def _require_shared(instruction: Instruction) -> None:
    if "shared::cluster" in instruction.parts or "cluster" in instruction.parts[2:3]:
        raise instruction.unknown("mbarriers of other blocks of a cluster")


@control("mbarrier.init")
def _init(instruction: Instruction):
    _require_shared(instruction)

    def run(machine, unit) -> bool:
        counts = operand_values(unit, instruction.operands[1])
        addresses = shared_addresses(unit, instruction.operands[0])
        for lane, (where, count) in enumerate(zip(addresses, counts, strict=True)):
            machine.shared.index(np.array([where]), 8, 8)
            if not 0 < count < 1 << 20:
                raise BarrierError(f"mbarrier.init with count {count}")
            barrier = Mbarrier(int(where), int(count), int(count))
            barrier.unfenced_warp = int(unit.lanes.threads[lane]) // 32
            machine.mbarriers[int(where)] = barrier
        return True

    return run


@control("mbarrier.inval")
def _invalidate(instruction: Instruction):
    def run(machine, unit) -> bool:
        for where in shared_addresses(unit, instruction.operands[0]):
            machine.mbarriers.pop(int(where), None)
        return True

    return run


@control("mbarrier.arrive", "mbarrier.arrive.expect_tx", "mbarrier.expect_tx")
def _arrive(instruction: Instruction):
    """[state,] [barrier] [, count] or, with expect_tx, [barrier], bytes."""
    _require_shared(instruction)
    parts, operands = instruction.parts, list(instruction.operands)
    if "noComplete" in parts:
        raise instruction.unknown("mbarrier.arrive.noComplete")
    state = None if isinstance(operands[0], Address) else operands.pop(0)
    expects, arrives = "expect_tx" in parts, "arrive" in parts

    def run(machine, unit) -> bool:
        lanes = unit.lanes
        where = shared_addresses(unit, operands[0])
        amount = operand_values(unit, operands[1]) if len(operands) > 1 else np.ones_like(where)
        for k in range(lanes.count):
            barrier = machine.mbarrier(int(where[k]))
            if state is not None and state != SINK:
                lanes.W[state.index][k] = barrier.phase
            if expects:
                barrier.expect(int(amount[k]))
            if arrives:
                barrier.arrive(1 if expects else int(amount[k]))
        return True

    return run


@control("mbarrier.try_wait", "mbarrier.test_wait")
def _try_wait(instruction: Instruction):
    """Fails once, then sleeps until the phase flips: a peek alone must not deadlock."""
    _require_shared(instruction)
    target, place, phase = instruction.operands[:3]
    by_parity = "parity" in instruction.parts
    may_sleep = "try_wait" in instruction.parts

    def run(machine, unit) -> bool:
        lanes = unit.lanes
        where = shared_addresses(unit, place)
        wanted = operand_values(unit, phase, "U" if by_parity else "W")
        keys = {(int(a), int(p)) for a, p in zip(where[:1], wanted[:1], strict=True)}
        if (where != where[0]).any() or (wanted != wanted[0]).any():
            keys = set(zip(where.tolist(), wanted.tolist(), strict=True))
        passed = {}
        for a, p in keys:
            barrier = machine.mbarrier(a)
            passed[a, p] = barrier.passed(p) if by_parity else barrier.phase > p
        if all(passed.values()):
            lanes.P[target.index] = True
            unit.failed_wait = None
            return True
        token = frozenset(keys)
        if may_sleep and unit.failed_wait == token and not any(passed.values()):
            unit.waiting = "; ".join(str(machine.mbarrier(a)) for a, _ in sorted(keys))
            return False
        unit.failed_wait = token
        results = [passed[a, p] for a, p in zip(where.tolist(), wanted.tolist(), strict=True)]
        lanes.P[target.index] = results
        return True

    return run


@control("bar", "barrier")
def _bar(instruction: Instruction):
    parts, operands = instruction.parts, instruction.operands
    if "cluster" in parts:
        return _cluster_barrier(instruction)
    mode = next((p for p in parts[1:] if p in ("sync", "arrive")), None)
    if mode is None or "red" in parts:
        raise instruction.unknown(instruction.opcode)

    def run(machine, unit) -> bool:
        if unit.waiting_barrier is not None:
            barrier, generation = unit.waiting_barrier
            if barrier.generation == generation:
                return False
            unit.waiting_barrier = None
            return True
        unit.require_whole_warps(instruction)
        number = int(operand_values(unit, operands[0])[0])
        if not 0 <= number < 16:
            raise BarrierError(f"named barrier {number}; 0 to 15 exist")
        if len(operands) > 1:
            count = int(operand_values(unit, operands[1])[0])
        else:
            count = machine.live_threads()
        barrier = machine.named_barriers.setdefault(number, NamedBarrier(number))
        generation = barrier.generation
        barrier.arrive(32 * unit.lanes.warp_count, count, len(operands) == 1)
        if mode == "arrive" or barrier.generation != generation:
            return True
        unit.waiting_barrier = barrier, generation
        unit.waiting = f"barrier {number}"
        return False

    return run


@control("bar.warp.sync")
def _warp_barrier(instruction: Instruction):
    """The lanes of a warp run in lockstep and meet where branches join."""
    return lambda machine, unit: True


def _cluster_barrier(instruction: Instruction):
    """A cluster of one block: arrive does nothing, wait is a block barrier's ordering only."""

    def run(machine, unit) -> bool:
        return True

    return run


@control("griddepcontrol")
def _grid_dependency(instruction: Instruction):
    """Launches run one after another, so dependencies have been met."""
    return lambda machine, unit: True


@pure("fence", "membar")
def _fence(instruction: Instruction) -> list[Operation]:
    parts = instruction.parts
    if "proxy" in parts and any(part.startswith("async") for part in parts):
        return [Operation(instruction, "C.fence_proxy(L)", [], [], "store")]
    if "mbarrier_init" in parts:
        return [Operation(instruction, "C.fence_mbarriers(L)", [], [], "store")]
    if any(p in parts for p in ("acq_rel", "sc", "cta", "gl", "sys", "gpu", "proxy")):
        return []
    raise instruction.unknown(instruction.opcode)


@pure("nanosleep", "pmevent")
def _nothing(instruction: Instruction) -> list[Operation]:
    return []
