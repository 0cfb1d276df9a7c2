"""The copies of Ampere, cp.async: 4, 8 or 16 bytes a lane, their groups, arrival on an mbarrier."""

import numpy as np

from hopper_attention.simulator.errors import MisalignedAccess, SimulatorError
from hopper_attention.simulator.hardware.asynchronous import Copy, CopyGroups
from hopper_attention.simulator.instructions.memory import address
from hopper_attention.simulator.instructions.registry import helper, pure
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
    """Translate [shared], [global], bytes {, bytes to read, or predicate to ignore} {, policy}."""
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
    return _one(instruction, f"copy_async(C, L, {{k0}}, {where}, {place}, {size.value}, {count})",
                inputs)  # fmt: skip


@pure("cp.async.commit_group", modifiers="")
def _commit(instruction: Instruction) -> list[Operation]:
    return _one(instruction, "commit_copies(C, L)")


@pure("cp.async.wait_group", "cp.async.wait_all", modifiers="")
def _wait(instruction: Instruction) -> list[Operation]:
    everything = "wait_all" in instruction.parts
    keep = 0 if everything else instruction.operands[0].value
    return _one(instruction, f"wait_for_copies(C, L, {keep}, {everything})")


@pure("cp.async.mbarrier.arrive", modifiers="noinc shared shared::cta b64")
def _arrive(instruction: Instruction) -> list[Operation]:
    """Translate an arrival of each lane, which counts once its copies so far are done."""
    where, base = address(instruction, instruction.operands[0])
    noinc = "noinc" in instruction.parts
    return _one(instruction, f"arrive_after_copies(C, L, {{k0}}, {where}, {noinc})", [base])


# ------------------------------------------------------------------------------------ as executed


@helper
def copy_async(block, lanes, instruction: Instruction, target, source, size: int, count) -> None:
    """Read global memory at once; shared memory is written at some time before the wait."""
    try:
        offsets = np.broadcast_to(target, (lanes.count,)).astype(np.int64) - block.window
        source = np.broadcast_to(source, (lanes.count,)).astype(np.uint64)
        count = np.broadcast_to(np.asarray(count, np.int64), (lanes.count,))
        index = block.shared.index(offsets, 4, size)
        if (source % np.uint64(size)).any():
            raise MisalignedAccess(f"cp.async of {size} bytes from a misaligned address")
        if (count > size).any():
            raise SimulatorError(f"cp.async reads {int(count.max())} of {size} bytes")
        words = _read_words(block.launch.memory, source, size, count)
        hazards, warps = block.hazards, lanes.warp_of_lane
        hazards.check_lanes(hazards, instruction, warps, offsets, size, True)
        units = None
        if hazards.shadow is not None:
            units = hazards.shadow.units(offsets, size)
            hazards.shadow.hide(units)
    except SimulatorError as error:
        raise instruction.located(error) from error
    view = block.shared.views[4]
    for k in range(size // 4):
        view[index + k] = 0xFFFFFFFF

    def effect() -> None:
        for k in range(size // 4):
            view[index + k] = words[k]

    copy = Copy(warps, units, block.events.issue(effect, instruction.where()))
    for warp in lanes.warps.tolist():
        block.copies.setdefault(warp, CopyGroups()).open.append(copy)


def _read_words(memory, source: np.ndarray, size: int, count: np.ndarray) -> np.ndarray:
    """Load the 32-bit words of each lane's source, (size / 4, lanes), 0 from byte ``count`` on."""
    words = np.zeros((size // 4, len(source)), np.uint32)
    for k in range(size // 4):
        chosen = np.flatnonzero(count > 4 * k)
        if len(chosen):
            words[k, chosen] = memory.load(source[chosen] + np.uint64(4 * k), 4, 1)[0]
            left = count[chosen] - 4 * k
            short = left < 4
            keep = (np.uint64(1) << (8 * left[short]).astype(np.uint64)) - 1
            words[k, chosen[short]] &= keep.astype(np.uint32)
    return words


@helper
def commit_copies(block, lanes) -> None:
    for warp in lanes.warps.tolist():
        block.copies.setdefault(warp, CopyGroups()).commit()


@helper
def wait_for_copies(block, lanes, keep: int, everything: bool) -> None:
    for warp in lanes.warps.tolist():
        if warp in block.copies:
            _finish(block, block.copies[warp].take(keep, everything), warp)


def _finish(block, copies: list[Copy], warp: int) -> None:
    """Complete copies, whose data this warp may then use."""
    shadow = block.hazards.shadow
    for copy in copies:
        copy.event.complete()
        if shadow is not None and copy.units is not None:
            units = copy.units[copy.warps == warp]
            shadow.show(np.full(len(units), block.first_agent + warp), units)


@helper
def arrive_after_copies(block, lanes, instruction: Instruction, addresses, noinc: bool) -> None:
    """Arrive on each lane's mbarrier once the copies of its warp so far are done."""
    addresses = np.broadcast_to(addresses, (lanes.count,)).tolist()
    warps = [warp for warp in lanes.warps.tolist() if warp in block.copies]
    before = {warp: block.copies[warp].all() for warp in warps}
    barriers = [block.mbarrier(int(a)) for a in addresses]
    agents = block.first_agent + lanes.warp_of_lane
    if not noinc:
        for barrier in barriers:
            barrier.pending += 1

    def effect() -> None:
        for warp, copies in before.items():
            _finish(block, copies, warp)
        for k, barrier in enumerate(barriers):
            if barrier.clocks is not None:
                barrier.clocks.release(agents[k : k + 1], barrier.sync)
            if block.trace:
                block.trace.arrive(agents[k : k + 1].tolist(), barrier)
            barrier.arrive()

    block.events.issue(effect, instruction.where())
