"""Barriers (mbarriers, named, of a cluster), fences, griddepcontrol."""

import numpy as np

from hopper_attention.simulator.errors import BarrierError, OutOfBounds
from hopper_attention.simulator.hardware.asynchronous import Mbarrier, NamedBarrier
from hopper_attention.simulator.hardware.memory import CLUSTER_BITS
from hopper_attention.simulator.instructions.registry import control, helper, pure, refuse_unknown
from hopper_attention.simulator.ptx.parser import SINK, Address, Immediate, Instruction, Symbol
from hopper_attention.simulator.ptx.vectorize import Operation


def operand_values(unit, operand, view: str = "U") -> np.ndarray:
    """Return the value of an operand in every active lane."""
    lanes = unit.lanes
    if isinstance(operand, Immediate):
        return np.full(lanes.count, operand.value)
    if isinstance(operand, Symbol):
        return np.full(lanes.count, unit.block.symbol(operand.name))
    return getattr(lanes, view)[operand.index]


def shared_addresses(unit, operand: Address) -> np.ndarray:
    """Return 32-bit shared memory addresses: a block's rank in the cluster above the offset."""
    return operand_values(unit, operand.base).astype(np.int64) + operand.offset


def local_offsets(unit, operand: Address) -> np.ndarray:
    """Return offsets in this block's shared memory.  Raises OutOfBounds for another block's."""
    offsets = shared_addresses(unit, operand) - unit.block.window
    if offsets.min() < 0 or offsets.max() >> CLUSTER_BITS:
        raise OutOfBounds("shared::cta address of another block's shared memory")
    return offsets


# --------------------------------------------------------------------------------------- mbarriers

_ORDER = {"release", "acquire", "relaxed", "cta", "cluster"}
_SHARED = {"shared", "shared::cta", "shared::cluster", "b64"}


@control("mbarrier.init")
def _init(instruction: Instruction):
    refuse_unknown(instruction, {"init", "shared", "shared::cta", "b64"})

    def run(block, unit) -> bool:
        counts = operand_values(unit, instruction.operands[1])
        offsets = local_offsets(unit, instruction.operands[0])
        for lane, (where, count) in enumerate(zip(offsets.tolist(), counts.tolist(), strict=True)):
            block.shared.index(np.array([where]), 8, 8)
            if not 0 < count < 1 << 20:
                raise BarrierError(f"mbarrier.init with count {count}")
            barrier = Mbarrier(where, count, count)
            warp = int(unit.lanes.threads[lane]) // 32
            barrier.unfenced_warp = warp
            if block.hazards.shadow is not None:
                clocks = barrier.clocks = block.cluster.clocks
                name = f"a bulk load (completing on mbarrier {where:#x})"
                barrier.sync, barrier.agent = clocks.sync(), clocks.new_agent(name)
                agent = block.first_agent + warp
                barrier.creator = agent, int(clocks.now(np.array([agent]))[0])
            block.mbarriers[where] = barrier
        return True

    return run


@control("mbarrier.inval")
def _invalidate(instruction: Instruction):
    refuse_unknown(instruction, {"inval", "shared", "shared::cta", "b64"})

    def run(block, unit) -> bool:
        for where in local_offsets(unit, instruction.operands[0]):
            if block.mbarriers.pop(int(where), None) is None:
                raise BarrierError(f"mbarrier.inval: no mbarrier was initialised at {where:#x}")
        return True

    return run


def find_mbarrier(block, unit, instruction: Instruction, address: int, agents: np.ndarray):
    """Return the mbarrier at an address, whose initialisation these warps must know of."""
    barrier = block.mbarrier(address)
    if barrier.clocks is not None:
        agent, clock = barrier.creator
        known = barrier.clocks.known[agents, 0, agent]
        if (known < clock).any():
            who = barrier.clocks.names[agent]
            block.hazards.report(
                instruction,
                f"uses an mbarrier that {who} initialised: no barrier between",
                unit.lanes.warps,
            )
            barrier.creator = agent, 0
    return barrier


@control("mbarrier.arrive", "mbarrier.arrive_drop", "mbarrier.arrive.expect_tx",
         "mbarrier.expect_tx", "mbarrier.complete_tx")  # fmt: skip
def _arrive(instruction: Instruction):
    """Translate [state,] [barrier] [, count] or, with expect_tx, [barrier], bytes."""
    verbs = {"arrive", "arrive_drop", "expect_tx", "complete_tx"}
    refuse_unknown(instruction, verbs | _ORDER | _SHARED | {"noComplete"})
    parts, operands = set(instruction.parts), list(instruction.operands)
    state = None if isinstance(operands[0], Address) else operands.pop(0)
    arrives = bool(parts & {"arrive", "arrive_drop"})
    orders = "relaxed" not in parts

    def run(block, unit) -> bool:
        lanes = unit.lanes
        where = shared_addresses(unit, operands[0])
        amount = operand_values(unit, operands[1]) if len(operands) > 1 else np.ones_like(where)
        agents = block.first_agent + lanes.warp_of_lane
        for k in range(lanes.count):
            agent = agents[k : k + 1]
            barrier = find_mbarrier(block, unit, instruction, int(where[k]), agent)
            if state is not None and state != SINK:
                lanes.W[state.index][k] = barrier.phase
            if "expect_tx" in parts:
                barrier.expect(int(amount[k]))
            elif "complete_tx" in parts:
                barrier.complete(int(amount[k]))
            if arrives and barrier.clocks is not None:
                clocks = barrier.clocks
                (clocks.release if orders else clocks.release_relaxed)(agent, barrier.sync)
            if "arrive_drop" in parts:
                barrier.expected -= 1 if "expect_tx" in parts else int(amount[k])
            if arrives:
                if block.trace:
                    block.trace.arrive(agent.tolist(), barrier)
                barrier.arrive(1 if "expect_tx" in parts else int(amount[k]))
        return True

    return run


@control("mbarrier.try_wait", "mbarrier.test_wait")
def _try_wait(instruction: Instruction):
    """Translate a wait, which fails once, then sleeps: a peek alone must not deadlock."""
    refuse_unknown(instruction, {"try_wait", "test_wait", "parity"} | _ORDER | _SHARED)
    target, place, phase = instruction.operands[:3]
    by_parity = "parity" in instruction.parts
    may_sleep = "try_wait" in instruction.parts
    orders = "relaxed" not in instruction.parts

    def run(block, unit) -> bool:
        lanes = unit.lanes
        where = shared_addresses(unit, place)
        wanted = operand_values(unit, phase, "U" if by_parity else "W")
        keys = {(int(where[0]), int(wanted[0]))}
        if (where != where[0]).any() or (wanted != wanted[0]).any():
            keys = set(zip(where.tolist(), wanted.tolist(), strict=True))
        agents = block.first_agent + lanes.warps
        passed = {}
        for a, p in keys:
            barrier = find_mbarrier(block, unit, instruction, a, agents)
            passed[a, p] = barrier.passed(p) if by_parity else barrier.phase > p
            if passed[a, p] and orders and barrier.clocks is not None:
                barrier.clocks.acquire(agents, barrier.sync)
        if all(passed.values()):
            if block.trace:
                for a, _ in keys:
                    block.trace.waited(agents.tolist(), block.mbarrier(a))
            lanes.P[target.index] = True
            unit.failed_wait = None
            return True
        token = frozenset(keys)
        if may_sleep and unit.failed_wait == token and not any(passed.values()):
            unit.waiting = "; ".join(str(block.mbarrier(a)) for a, _ in sorted(keys))
            return False
        unit.failed_wait = token
        results = [passed[a, p] for a, p in zip(where.tolist(), wanted.tolist(), strict=True)]
        lanes.P[target.index] = results
        return True

    return run


@control("mbarrier.pending_count")
def _pending_count(instruction: Instruction):
    raise instruction.unknown("mbarrier.pending_count: states are opaque here")


# ---------------------------------------------------------------------------- barriers of a block


@control("bar", "barrier")
def _bar(instruction: Instruction):
    if "cluster" in instruction.parts:
        return _cluster_barrier(instruction)
    refuse_unknown(instruction, {"sync", "arrive", "red", "aligned", "cta", "popc", "and", "or",
                                 "pred", "u32"})  # fmt: skip
    parts, operands = instruction.parts, list(instruction.operands)
    mode = next((p for p in parts[1:] if p in ("sync", "arrive")), None)
    if mode is None:
        raise instruction.unknown("barrier with a reduction")

    def run(block, unit) -> bool:
        agents = block.first_agent + unit.lanes.warps
        if unit.waiting_barrier is not None:
            barrier, generation = unit.waiting_barrier
            if barrier.generation == generation:
                return False
            unit.waiting_barrier = None
            _acquire(block, agents, barrier, generation)
            return True
        unit.require_whole_warps(instruction)
        number = int(operand_values(unit, operands[0])[0])
        if not 0 <= number < 16:
            raise BarrierError(f"named barrier {number}; 0 to 15 exist")
        if len(operands) > 1:
            count = int(operand_values(unit, operands[1])[0])
        else:
            count = block.live_threads()
        barrier = block.named_barriers.get(number)
        if barrier is None:
            barrier = block.named_barriers[number] = NamedBarrier(number)
            if block.hazards.shadow is not None:
                barrier.sync = block.cluster.clocks.sync()
        generation = barrier.generation
        if barrier.sync is not None:
            block.cluster.clocks.release(agents, barrier.sync)
        if block.trace:
            block.trace.arrive(agents.tolist(), barrier)
        barrier.arrive(32 * unit.lanes.warp_count, count, len(operands) == 1)
        if mode == "arrive":
            return True
        if barrier.generation != generation:
            _acquire(block, agents, barrier, generation)
            return True
        unit.waiting_barrier = barrier, generation
        unit.waiting = f"barrier {number}"
        return False

    return run


def _acquire(block, agents: np.ndarray, barrier, generation: int) -> None:
    if barrier.sync is not None:
        block.cluster.clocks.acquire(agents, barrier.sync)
    if block.trace:
        block.trace.waited(agents.tolist(), barrier, generation)


@control("bar.warp.sync", modifiers="")
def _warp_barrier(instruction: Instruction):
    """Translate to nothing: the lanes of a warp run in lockstep and meet where branches join."""
    return lambda block, unit: True


def _cluster_barrier(instruction: Instruction):
    refuse_unknown(instruction, {"cluster", "arrive", "wait", "aligned", "release", "acquire",
                                 "relaxed"})  # fmt: skip
    parts = instruction.parts
    orders = "relaxed" not in parts

    def run(block, unit) -> bool:
        if "aligned" in parts:
            unit.require_whole_warps(instruction)
        cluster, agents = block.cluster, block.first_agent + unit.lanes.warps
        barrier = cluster.barrier
        threads = (unit.lanes.threads + block.rank * block.launch.threads).tolist()
        if barrier.sync is None and block.hazards.shadow is not None:
            barrier.sync = cluster.clocks.sync()
        if "arrive" in parts:
            if barrier.sync is not None:
                clocks = cluster.clocks
                (clocks.release if orders else clocks.release_relaxed)(agents, barrier.sync)
            if block.trace:
                block.trace.arrive(agents.tolist(), barrier)
            barrier.arrive(threads)
            return True
        if not barrier.passed(threads):
            unit.waiting = str(barrier)
            return False
        _acquire(block, agents, barrier, barrier.arrivals[threads[0]])
        return True

    return run


@control("griddepcontrol")
def _grid_dependency(instruction: Instruction):
    """Translate to nothing: launches run one after another, dependencies have been met."""
    refuse_unknown(instruction, {"launch_dependents", "wait"})
    return lambda block, unit: True


# ------------------------------------------------------------------------------------------ fences


@pure("fence", "membar")
def _fence(instruction: Instruction) -> list[Operation]:
    refuse_unknown(instruction, {
        "proxy", "async", "async::generic", "async.global", "async.shared::cta", "global",
        "shared::cta", "shared::cluster", "alias", "tensormap::generic", "acquire", "release",
        "sync_restrict::shared::cta", "sync_restrict::shared::cluster", "mbarrier_init", "acq_rel",
        "sc", "cta", "cluster", "gpu", "sys", "gl",
    })  # fmt: skip
    parts = instruction.parts
    if "proxy" in parts and any(part.startswith("async") for part in parts):
        if "global" in parts:
            return []
        return [Operation(instruction, "fence_proxy(C, L)", [], [], "store")]
    if "mbarrier_init" in parts:
        return [Operation(instruction, "fence_mbarriers(C, L)", [], [], "store")]
    if "proxy" not in parts:
        return [Operation(instruction, "C.hazards.fence_release(L.warps)", [], [], "store")]
    return []


@helper
def fence_mbarriers(block, lanes) -> None:
    """Let the asynchronous proxy use the mbarriers that these warps initialised."""
    warps = set(lanes.warps.tolist())
    for barrier in block.mbarriers.values():
        if barrier.unfenced_warp in warps:
            barrier.unfenced_warp = -1
    block.hazards.fence_release(lanes.warps)


@helper
def fence_proxy(block, lanes) -> None:
    fence_mbarriers(block, lanes)
    block.hazards.fence_proxy(lanes.warps)


@pure("nanosleep", "pmevent")
def _nothing(instruction: Instruction) -> list[Operation]:
    return []
