"""A launch: clusters of blocks, and the scheduler that interleaves their warps.

Blocks of a cluster run together; clusters run one after another, as far as they do not wait for
each other: one whose warps poll memory in vain is set aside while others run.  The scheduler lets
one unit of warps run for some steps; blocked units are asked again when anything has changed.  When
nothing can run, asynchronous operations take effect; without any, that is a deadlock.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hopper_attention.simulator.errors import DeadlockError, LaunchError, SimulatorError
from hopper_attention.simulator.execution.block import Block, Cluster
from hopper_attention.simulator.execution.launch import Launch
from hopper_attention.simulator.execution.program import EXIT
from hopper_attention.simulator.execution.warps import Unit
from hopper_attention.simulator.hardware.memory import GlobalMemory
from hopper_attention.simulator.observation.recording import Recording, Trace, current_recording
from hopper_attention.simulator.options import Options, current_options
from hopper_attention.simulator.ptx.parser import Module

STALL_STEPS = 50_000  # steps without an event after which another cluster has its turn
MAX_IDLE_STEPS = 20_000_000  # the same, with no cluster left that could help


class Scheduler:
    """The warps of one cluster, which take turns."""

    def __init__(self, launch: Launch, cluster: Cluster):
        self.launch, self.cluster = launch, cluster
        self.units: list[Unit] = []
        for block in cluster.blocks:
            for warpgroup in block.warpgroups:
                stack = [[0, EXIT, warpgroup.everyone]]
                self.units.append(Unit(block, warpgroup, stack, self.units))

    def run(self) -> bool:
        """Run the warps.  True when all have exited, False when they only poll memory."""
        idle_steps, idle_version = 0, self.cluster.version
        while self.units:
            idle_steps += self._slice()
            if self.cluster.version != idle_version:
                idle_steps, idle_version = 0, self.cluster.version
            elif idle_steps > STALL_STEPS:
                return False
        for block in self.cluster.blocks:
            block.check_end()
        while self.cluster.events.run_one():
            pass
        return True

    def _slice(self) -> int:
        """Run one unit for a while, or let an asynchronous operation take effect."""
        if self.cluster.events.run_due():
            self.cluster.version += 1
        ready = [u for u in self.units if not u.paused and u.blocked_at != self.cluster.version]
        if not ready:
            ready = [u for u in self.units if u.paused]
            if ready and self.cluster.events.run_one():
                self.cluster.version += 1
                return 0
        if not ready:
            if not self.cluster.events.run_one():
                raise DeadlockError(self.deadlock_report())
            self.cluster.version += 1
            return 0
        unit, steps = self.cluster.schedule.choose(ready)
        if unit.paused:
            unit.joins.discard(unit.pc)
        try:
            unit.run(steps)
        except SimulatorError as error:
            raise self._annotated(error, unit) from error
        if not unit.stack:
            self.units.remove(unit)
            self.cluster.version += 1
            return 0
        for other in self.units:
            if other is not unit and unit.can_merge(other):
                unit.merge(other)
                self.units.remove(other)
                self.cluster.version += 1
                break
        return steps

    def _annotated(self, error: SimulatorError, unit: Unit) -> SimulatorError:
        if "PTX line" in str(error) and "block (" in str(error):
            return error
        steps = self.launch.program.steps
        step = steps[unit.pc] if unit.pc < len(steps) else None
        place = f"\n  at {step.first.where()}" if step and "PTX line" not in str(error) else ""
        where = f"block {unit.block.ctaid}, warps {unit.warps} of {self.launch.kernel.name}"
        return type(error)(f"{error}{place}\n  {where}")

    def deadlock_report(self) -> str:
        steps = self.launch.program.steps
        lines = []
        for block in self.cluster.blocks:
            lines.append(f"deadlock in block {block.ctaid} of {self.launch.kernel.name}")
            for unit in (u for u in self.units if u.block is block):
                who = f"warps {unit.warps}, {unit.lanes.count} lanes"
                lines.append(f"  {who}, wait for {unit.waiting}")
                lines.append(f"    at {steps[unit.pc].first.where()}")
            lines.append(f"  {np.count_nonzero(block.live_lanes == 0)} warps have exited")
            lines += [f"  {block.mbarriers[a]}" for a in sorted(block.mbarriers)]
            lines += [f"  {block.named_barriers[n]}" for n in sorted(block.named_barriers)]
            lines.append(f"  registers: {block.free_registers} free for setmaxnreg.inc")
        if len(self.cluster.blocks) > 1:
            lines.append(f"  {self.cluster.barrier}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Statistics:
    """The counts of a launch.  warp_instructions counts each PTX instruction once a warp."""

    blocks: int
    warp_instructions: int
    seconds: float


class Machine:
    """The clusters of one launch, one after another."""

    def __init__(self, launch: Launch):
        self.launch = launch
        self.blocks = self.warp_instructions = 0  # of clusters that have ended
        self._places: list[list[Block]] = []  # blocks of such clusters, to be used again

    def run(self, clusters: int | None) -> None:
        """Run all clusters, or the first ones, in the order that the seed gives."""
        waiting = self._positions()[:clusters]
        if self.launch.options.seed:
            random.Random(self.launch.options.seed).shuffle(waiting)
        waiting.reverse()
        number, idle = 0, 0
        stalled: list[Scheduler] = []
        recording = current_recording()
        while waiting or stalled:
            if waiting:
                cluster = Cluster(self._place(), waiting.pop(), number)
                if recording is not None:
                    _record(cluster, recording if number < recording.blocks else None)
                number += 1
                scheduler = Scheduler(self.launch, cluster)
            else:
                scheduler = stalled.pop(0)
            before = scheduler.cluster.version
            if scheduler.run():
                self._end(scheduler.cluster)
                idle = 0
                continue
            stalled.append(scheduler)
            idle = 0 if scheduler.cluster.version != before else idle + STALL_STEPS
            if idle > MAX_IDLE_STEPS:
                reports = [other.deadlock_report() for other in stalled]
                raise DeadlockError("\n".join(reports) + "\n  no progress: warps poll memory")

    def _positions(self) -> list[tuple[int, int, int]]:
        """Return the clusters' places in the grid, in the order of their numbers."""
        launch = self.launch
        nx, ny, nz = (g // c for g, c in zip(launch.grid, launch.cluster, strict=True))
        return [(x, y, z) for z in range(nz) for y in range(ny) for x in range(nx)]

    def _place(self) -> list[Block]:
        if self._places:
            return self._places.pop()
        return [Block(self.launch, rank) for rank in range(int(np.prod(self.launch.cluster)))]

    def _end(self, cluster: Cluster) -> None:
        self.blocks += len(cluster.blocks)
        self.warp_instructions += sum(block.warp_instructions for block in cluster.blocks)
        self._places.append(cluster.blocks)


def _record(cluster: Cluster, recording: Recording | None) -> None:
    """Trace the cluster's blocks, or do not trace them any more."""
    for block in cluster.blocks:
        block.trace = None
        if recording is not None:
            launch = block.launch
            warps: list = [[] for _ in range(launch.warps)]
            block.trace = Trace(launch.kernel.name, block.ctaid, block.first_agent, warps)
            recording.traces.append(block.trace)


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
    start = time.perf_counter()
    if clusters is not None and clusters < 1:
        raise LaunchError(f"clusters must be from 1, or None for all; got {clusters}")
    options = options or current_options()
    sizes = grid, block, cluster
    checked = Launch.of(module, name, *sizes, params, memory, shared_memory_bytes, options)
    machine = Machine(checked)
    with np.errstate(all="ignore"), memory.transaction():
        machine.run(clusters)
    seconds = time.perf_counter() - start
    return Statistics(machine.blocks, machine.warp_instructions, seconds)
