"""wgmma.fence, mma_async, commit_group, wait_group: what the instructions ask of tensor_core.py."""

import re

import numpy as np

from hopper_attention.simulator.errors import SimulatorError
from hopper_attention.simulator.hardware.formats import ELEMENT_BYTES
from hopper_attention.simulator.hardware.tensor_core import (
    Queue,
    Shape,
    operand_index,
)
from hopper_attention.simulator.hazards.checks import SharedAccess
from hopper_attention.simulator.instructions.registry import control
from hopper_attention.simulator.instructions.synchronisation import operand_values
from hopper_attention.simulator.ptx.parser import Immediate, Instruction, Negated, Vector


def parse_mma(instruction: Instruction) -> Shape:
    parts, operands = instruction.parts, instruction.operands
    found = re.fullmatch(r"m64n(\d+)k(\d+)", parts[4])
    d_kind, a_kind, b_kind = parts[5:8]
    if (
        found is None
        or "sp" in parts
        or len(parts) != 8
        or a_kind not in ELEMENT_BYTES
        or b_kind not in ELEMENT_BYTES
        or d_kind not in (("s32",) if a_kind in ("s8", "u8") else ("f32", "f16"))
    ):
        raise instruction.unknown(instruction.opcode)
    d, a, b, scale_d = operands[:4]
    flags = [operand.value for operand in operands[4:]]
    scales, majors = flags[:2], flags[2:]
    if isinstance(a, Vector):
        majors = [0, *majors]
    n = int(found[1])
    half = d_kind == "f16"
    if len(d.items) != n // (4 if half else 2):
        raise instruction.unknown(f"{len(d.items)} accumulator registers")
    majors = [*majors, 0, 0][:2]
    if any(majors) and ELEMENT_BYTES[a_kind] != 2:
        raise instruction.unknown("MN-major operands of other than 16 bits")
    sign = float(np.prod(scales)) if scales else 1.0
    return Shape(
        instruction, n, (a_kind, b_kind), half, d.items, a, b, scale_d, sign, *map(bool, majors)
    )


def _uniform(unit, operand, what: str) -> int:
    values = operand_values(unit, operand, "W")
    if (values != values[0]).any():
        raise SimulatorError(f"wgmma {what} differs among the lanes of the warpgroup")
    return int(values[0])


@control("wgmma.mma_async")
def _mma(instruction: Instruction):
    shape = parse_mma(instruction)

    def run(block, unit) -> bool:
        if not unit.gather_warpgroup():
            return False
        if shape.rows is None:
            shape.number()
        queue, lanes = unit.warpgroup.queue, unit.lanes
        touched = unit.warpgroup.touched & (shape.mask | shape.a_mask)
        if touched:
            block.hazards.report(
                instruction,
                "registers were used since the last wgmma.fence of this warpgroup",
                lanes.warps,
            )
            unit.warpgroup.touched &= ~touched
        width = ELEMENT_BYTES[shape.kinds[0]]
        if shape.a_rows is not None:
            a = lanes.U[shape.a_rows].copy()
        else:
            a = _uniform(unit, shape.a, "descriptor")
            index = operand_index(a, 64, width, shape.a_mn_major)
            _use(block, instruction, lanes, queue, index, not shape.a_mn_major)
        b = _uniform(unit, shape.b, "descriptor")
        index = operand_index(b, shape.n, width, shape.b_mn_major)
        _use(block, instruction, lanes, queue, index, False)
        if block.trace:
            nbytes = 8 * shape.n + (512 if shape.a_rows is None else 0)  # a warp's share
            block.trace.wgmma(lanes.warps.tolist(), instruction, shape.n, nbytes)
        queue.issue(shape, a, b, _accumulates(unit, shape.scale_d))
        return True

    fragment = shape.a.items if isinstance(shape.a, Vector) else ()
    run.registers = [*shape.accumulator, *fragment]  # type: ignore[attr-defined]
    return run


def _accumulates(unit, scale_d) -> bool:
    if isinstance(scale_d, Immediate):
        return bool(scale_d.value)
    register = scale_d.register if isinstance(scale_d, Negated) else scale_d
    values = unit.lanes.P[register.index]
    if values.any() != values.all():
        raise SimulatorError("wgmma scale-d differs among the lanes of the warpgroup")
    return bool(values[0]) != isinstance(scale_d, Negated)


def _use(block, instruction, lanes, queue: Queue, index: np.ndarray, by_rows: bool) -> None:
    """Record that shared memory is read until the group is waited for.

    by_rows: each warp reads 16 rows of A, so it need not know of the stores to the others'.
    """
    low, high = int(index.min()) << 4, (int(index.max()) + 1) << 4
    block.shared.check(low, high)
    shadow = block.hazards.shadow
    if shadow is not None:
        conflict = shadow.bulk_read(queue.agents, index)
        if conflict and by_rows:
            mine = zip(queue.agents, np.split(index, 4), strict=True)
            found = (shadow.bulk_read(np.array([agent]), rows) for agent, rows in mine)
            conflict = next((c for c in found if c), None)
        if conflict:
            block.hazards.report_conflict(instruction, conflict, False)
    block.hazards.check_overlap(instruction, low, high, False, lanes.warps)
    parts = np.split(index, 4) if by_rows else [index]
    for warp, part in enumerate(parts):
        low, high = int(part.min()) << 4, (int(part.max()) + 1) << 4
        access = SharedAccess(low, high, False, queue, instruction.where())
        access.warp = warp if by_rows else None
        queue.open.accesses.append(access)
        block.hazards.accesses.add(access)


@control("wgmma.fence", modifiers="sync aligned")
def _fence(instruction: Instruction):
    def run(block, unit) -> bool:
        if not unit.gather_warpgroup():
            return False
        unit.warpgroup.touched = 0
        return True

    return run


@control("wgmma.commit_group", modifiers="sync aligned")
def _commit(instruction: Instruction):
    def run(block, unit) -> bool:
        if not unit.gather_warpgroup():
            return False
        if block.trace:
            block.trace.commit(unit.lanes.warps.tolist())
        unit.warpgroup.queue.commit()
        return True

    return run


@control("wgmma.wait_group", modifiers="sync aligned")
def _wait(instruction: Instruction):
    keep = instruction.operands[0].value

    def run(block, unit) -> bool:
        if not unit.gather_warpgroup():
            return False
        if block.trace:
            block.trace.wgmma_wait(unit.lanes.warps.tolist(), keep)
        unit.warpgroup.queue.wait(keep)
        return True

    return run
