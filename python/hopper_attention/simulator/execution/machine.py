"""A launch: clusters of blocks, and the scheduler that interleaves their warps.

Blocks of a cluster run together; clusters run one after another, as far as they do not wait for
each other: one whose warps poll memory in vain is set aside while others run.  The scheduler lets
one unit of warps run for some steps; blocked units are asked again when anything has changed.  When
nothing can run, asynchronous operations take effect; without any, that is a deadlock.
"""

import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hopper_attention.simulator.errors import (
    DeadlockError,
    HazardError,
    HazardWarning,
    LaunchError,
    SimulatorError,
)
from hopper_attention.simulator.execution.block import Block
from hopper_attention.simulator.execution.program import program_of
from hopper_attention.simulator.execution.warps import Unit
from hopper_attention.simulator.hardware.asynchronous import ClusterBarrier, Events, Schedule
from hopper_attention.simulator.hardware.memory import SHARED_BASE, SHARED_LIMIT, GlobalMemory
from hopper_attention.simulator.hazards.races import Clocks
from hopper_attention.simulator.observation.recording import Recording, Trace, current_recording
from hopper_attention.simulator.options import Options, current_options
from hopper_attention.simulator.ptx.parser import Instruction, Kernel, Module

_MAX_THREADS = 1024
_MAX_CLUSTER = 16
STALL_STEPS = 50_000  # steps without an event after which another cluster has its turn
MAX_IDLE_STEPS = 20_000_000  # the same, with no cluster left that could help


@dataclass(frozen=True)
class Statistics:
    """Counts of a launch.  warp_instructions counts each PTX instruction once a warp."""

    blocks: int
    warp_instructions: int
    seconds: float


class Machine:
    """One launch: what all its blocks share."""

    def __init__(
        self, kernel: Kernel, grid, block, cluster, params: bytes, memory, dynamic, options, first
    ):
        self.program = program_of(kernel)
        self.kernel, self.grid, self.block, self.memory = kernel, grid, block, memory
        self.cluster_shape: tuple[int, int, int] = cluster
        self.options: Options = options
        self.first: int | None = first
        self.params = np.frombuffer(params, np.uint8)
        self.dynamic_shared = dynamic
        self.threads = block[0] * block[1] * block[2]
        nbytes = self.program.static_end + dynamic - SHARED_BASE
        if nbytes > SHARED_LIMIT - SHARED_BASE:
            raise LaunchError(
                f"{nbytes} bytes of shared memory; a block has at most {SHARED_LIMIT - SHARED_BASE}"
            )
        self.warp_instructions = 0
        self.reported: set[tuple[int, str]] = set()
        self._places: list[list[Block]] = []

    def run(self) -> int:
        """All clusters, or the first, in the order that the seed gives; returns how many."""
        counts = [g // c for g, c in zip(self.grid, self.cluster_shape, strict=True)]
        waiting = [
            (x, y, z) for z in range(counts[2]) for y in range(counts[1]) for x in range(counts[0])
        ]
        waiting = waiting[: self.first]
        if self.options.seed:
            random.Random(self.options.seed).shuffle(waiting)
        waiting.reverse()
        number, idle = 0, 0
        stalled: list[Cluster] = []
        recording = current_recording()
        while waiting or stalled:
            if waiting:
                cluster = Cluster(self, self._place(), waiting.pop(), number)
                if recording is not None:
                    cluster.record(recording if number < recording.blocks else None)
                number += 1
            else:
                cluster = stalled.pop(0)
            before = cluster.version
            if cluster.run():
                self._places.append(cluster.blocks)
                idle = 0
                continue
            stalled.append(cluster)
            idle = 0 if cluster.version != before else idle + STALL_STEPS
            if idle > MAX_IDLE_STEPS:
                reports = [other.deadlock_report() for other in stalled]
                raise DeadlockError("\n".join(reports) + "\n  no progress: warps poll memory")
        return number

    def _place(self) -> list[Block]:
        if self._places:
            return self._places.pop()
        return [Block(self, rank) for rank in range(int(np.prod(self.cluster_shape)))]

    def report(self, instruction: Instruction, message: str, text: str) -> None:
        """A hazard: once a place and kind."""
        if self.options.hazards == "off":
            return
        if self.options.hazards == "raise":
            raise HazardError(text)
        if (instruction.line, message) not in self.reported:
            self.reported.add((instruction.line, message))
            warnings.warn(text, HazardWarning, stacklevel=3)


class Cluster:
    """Blocks that run together, their scheduler and their asynchronous operations."""

    def __init__(self, machine: Machine, blocks: list[Block], position, number: int):
        self.machine, self.blocks = machine, blocks
        self.version = 0
        self.schedule = Schedule(machine.options.seed, number)
        self.events = Events(self.schedule)
        self.clocks = Clocks(len(blocks) * -(-machine.threads // 32))
        self.barrier = ClusterBarrier()
        self.units: list[Unit] = []
        shape = machine.cluster_shape
        for rank, block in enumerate(blocks):
            place = rank % shape[0], rank // shape[0] % shape[1], rank // (shape[0] * shape[1])
            x, y, z = (p * n + k for p, n, k in zip(position, shape, place, strict=True))
            self.units += block.start(self, (x, y, z))
        self.resize_barrier()

    def record(self, recording: Recording | None) -> None:
        """Trace the blocks, or do not trace them any more."""
        for block in self.blocks:
            block.trace = None
            if recording is not None:
                name = self.machine.kernel.name
                block.trace = Trace(
                    name, block.ctaid, block.first_agent, [[] for _ in range(block.warps)]
                )
                recording.traces.append(block.trace)

    def run(self) -> bool:
        """True when all threads have exited, False when only polling goes on."""
        idle_steps, idle_version = 0, self.version
        while self.units:
            idle_steps += self._slice()
            if self.version != idle_version:
                idle_steps, idle_version = 0, self.version
            elif idle_steps > STALL_STEPS:
                return False
        for block in self.blocks:
            block.check_end()
            self.machine.warp_instructions += block.warp_instructions
            block.warp_instructions = 0
        while self.events.run_one():
            pass
        return True

    def _slice(self) -> int:
        """Run one unit for a while, or let an asynchronous operation take effect."""
        if self.events.run_due():
            self.version += 1
        ready = [u for u in self.units if not u.paused and u.blocked_at != self.version]
        if not ready:
            ready = [u for u in self.units if u.paused]
            if ready and self.events.run_one():
                self.version += 1
                return 0
        if not ready:
            if not self.events.run_one():
                raise DeadlockError(self.deadlock_report())
            self.version += 1
            return 0
        unit, steps = self.schedule.choose(ready)
        if unit.paused:
            unit.joins.discard(unit.pc)
        try:
            unit.run(steps)
        except SimulatorError as error:
            raise self.annotate(error, unit) from error
        if not unit.stack:
            self.units.remove(unit)
            self.version += 1
            return 0
        for other in self.units:
            if other is not unit and unit.can_merge(other):
                unit.merge(other)
                self.units.remove(other)
                self.version += 1
                break
        return steps

    def resize_barrier(self) -> None:
        if len(self.blocks) > 1 or self.barrier.arrived:
            self.barrier.resize(sum(int(block.live_lanes.sum()) for block in self.blocks))

    def agent_name(self, agent: int) -> str:
        warps = self.blocks[0].warps
        if agent < self.clocks.warps:
            where = f" of block {self.blocks[agent // warps].ctaid}" if len(self.blocks) > 1 else ""
            return f"warp {agent % warps}{where}"
        for block in self.blocks:
            for barrier in block.mbarriers.values():
                if barrier.agent == agent:
                    return f"a bulk load (completing on mbarrier {barrier.address:#x})"
        return "a bulk load"

    def annotate(self, error: SimulatorError, unit: Unit) -> SimulatorError:
        if "PTX line" in str(error) and "block (" in str(error):
            return error
        steps = self.machine.program.steps
        step = steps[unit.pc] if unit.pc < len(steps) else None
        place = f"\n  at {step.first.where()}" if step and "PTX line" not in str(error) else ""
        where = f"block {unit.block.ctaid}, warps {unit.warps} of {self.machine.kernel.name}"
        return type(error)(f"{error}{place}\n  {where}")

    def deadlock_report(self) -> str:
        steps = self.machine.program.steps
        lines = []
        for block in self.blocks:
            lines.append(f"deadlock in block {block.ctaid} of {self.machine.kernel.name}")
            for unit in (u for u in self.units if u.block is block):
                who = f"warps {unit.warps}, {unit.lanes.count} lanes"
                lines.append(f"  {who}, wait for {unit.waiting}")
                lines.append(f"    at {steps[unit.pc].first.where()}")
            lines.append(f"  {np.count_nonzero(block.live_lanes == 0)} warps have exited")
            lines += [f"  {block.mbarriers[a]}" for a in sorted(block.mbarriers)]
            lines += [f"  {block.named_barriers[n]}" for n in sorted(block.named_barriers)]
            lines.append(f"  registers: {block.free_registers} free for setmaxnreg.inc")
        if len(self.blocks) > 1:
            lines.append(f"  {self.barrier}")
        return "\n".join(lines)


def launch(
    module: Module,
    name: str,
    *,
    grid: Sequence[int],
    block: Sequence[int],
    params: Sequence[bytes],
    memory: GlobalMemory,
    cluster: Sequence[int] = (1, 1, 1),
    shared_memory_bytes: int = 0,
    options: Options | None = None,
    clusters: int | None = None,
) -> Statistics:
    """Run a kernel.

    params: one bytes object a kernel parameter, as the host passes them.  memory: all global memory
    that the kernel may touch; it is as before after an error.  clusters: only the first so many
    run, in a grid that is as large as it is: a kernel may go by its size.  Raises SimulatorError
    and its subclasses.
    """
    if name not in module.kernels:
        raise LaunchError(f"no kernel {name}; {module.path} has {sorted(module.kernels)}")
    kernel = module.kernels[name]
    grid, block = (tuple(int(n) for n in (*d, 1, 1)[:3]) for d in (grid, block))
    cluster = kernel.required_cluster or tuple(int(n) for n in (*cluster, 1, 1)[:3])
    if (
        min(cluster) < 1
        or np.prod(cluster) > _MAX_CLUSTER
        or any(g % c for g, c in zip(grid, cluster, strict=True))
    ):
        raise LaunchError(f"grid {grid} in clusters of {cluster}: must divide, at most "
                          f"{_MAX_CLUSTER} blocks")  # fmt: skip
    if kernel.required_block and block != kernel.required_block:
        raise LaunchError(f"block {block}, the kernel requires {kernel.required_block}")
    if min(grid) < 1 or min(block) < 1 or np.prod(block) > _MAX_THREADS:
        raise LaunchError(f"grid {grid}, block {block}: 1 to {_MAX_THREADS} threads a block")
    if clusters is not None and clusters < 1:
        raise LaunchError(f"clusters must be from 1, or None for all; got {clusters}")
    if len(params) != len(kernel.params):
        raise LaunchError(f"{len(params)} parameters, the kernel has {len(kernel.params)}")
    image = bytearray()
    for number, (given, param) in enumerate(zip(params, kernel.params, strict=True)):
        if len(given) != param.size:
            raise LaunchError(f"parameter {number} has {len(given)} bytes, not {param.size}")
        image += bytes(param.offset - len(image)) + bytes(given)
    start = time.perf_counter()
    arguments = kernel, grid, block, cluster, bytes(image), memory, shared_memory_bytes
    machine = Machine(*arguments, options or current_options(), clusters)
    with np.errstate(all="ignore"), memory.transaction():
        blocks = machine.run() * int(np.prod(cluster))
    return Statistics(blocks, machine.warp_instructions, time.perf_counter() - start)
