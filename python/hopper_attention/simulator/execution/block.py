"""Blocks and the clusters that they form: their memory, barriers, and operations under way.

A block owns what does its work: `LaneMemory` loads and stores, `Hazards` checks, a `Queue` of each
warpgroup multiplies, `Events` of the cluster let asynchronous operations take effect.
"""

import numpy as np

from hopper_attention.simulator.errors import BarrierError
from hopper_attention.simulator.execution.lane_memory import LaneMemory
from hopper_attention.simulator.execution.lanes import Lanes, Warpgroup
from hopper_attention.simulator.execution.launch import Launch
from hopper_attention.simulator.hardware.asynchronous import (
    BulkGroups,
    ClusterBarrier,
    CopyGroups,
    Events,
    Mbarrier,
    NamedBarrier,
    Schedule,
)
from hopper_attention.simulator.hardware.memory import CLUSTER_BITS, LocalMemory, SharedMemory
from hopper_attention.simulator.hardware.tensor_core import Queue
from hopper_attention.simulator.hazards.checks import Hazards
from hopper_attention.simulator.hazards.races import Clocks
from hopper_attention.simulator.observation.recording import Trace

_REGISTERS_PER_BLOCK = 65536


class Block:
    """A place for one block of the launch; ``start`` makes it run another one."""

    def __init__(self, launch: Launch, rank: int):
        self.launch, self.rank = launch, rank
        self.first_agent = rank * launch.warps
        self.window = rank << CLUSTER_BITS  # added to the addresses of shared variables
        self.shared = SharedMemory(launch.shared_bytes)
        self.hazards = Hazards(
            launch.reports,
            launch.kernel.name,
            self.first_agent,
            self.shared.bytes.size,
            launch.program.smallest_access,
        )
        local = LocalMemory(launch.program.local_bytes, launch.threads)
        self.lane_memory = LaneMemory(
            rank, launch.params, launch.memory, self.shared, local, self.hazards
        )
        self.warpgroups = [
            Warpgroup(n, min(128, launch.threads - 128 * n), launch.block, launch.program.rows)
            for n in range(-(-launch.threads // 128))
        ]
        self.trace: Trace | None = None

    def start(self, cluster: "Cluster", ctaid: tuple[int, int, int]) -> None:
        """Begin block ``ctaid`` as one of this cluster: nothing is left of the block before."""
        self.cluster, self.events, self.ctaid = cluster, cluster.events, ctaid
        self.hazards.start(ctaid, cluster.clocks)
        self.lane_memory.start([block.lane_memory for block in cluster.blocks])
        self.mbarriers: dict[int, Mbarrier] = {}
        self.named_barriers: dict[int, NamedBarrier] = {}
        self.bulk: dict[int, BulkGroups] = {}  # by thread
        self.copies: dict[int, CopyGroups] = {}  # cp.async, by warp
        self.live_lanes = np.bincount(np.arange(self.launch.threads) // 32)
        self.warp_instructions = 0
        self._allot_registers()
        for warpgroup in self.warpgroups:
            first_agent = self.first_agent + warpgroup.first_thread // 32
            bits = self.launch.options.fp8_accumulator_bits
            registers = warpgroup.registers[32]
            warpgroup.start(
                Queue(registers, self.shared, self.events, self.hazards, first_agent, bits)
            )

    def _allot_registers(self) -> None:
        kernel, warps = self.launch.kernel, self.launch.warps
        share = _REGISTERS_PER_BLOCK // (32 * warps * kernel.min_blocks) // 8 * 8
        count = min(kernel.max_registers or 256, share, 256)
        self.warp_registers = [count] * warps
        self.free_registers = 0

    def check_end(self) -> None:
        """Check that nothing is under way any more when all threads have exited."""
        last = self.launch.kernel.instructions[-1]
        for warpgroup in self.warpgroups:
            if warpgroup.queue.groups or warpgroup.queue.open.items:
                self.hazards.report(last, "exit with wgmma not waited for", warpgroup.warps)
        for access in self.hazards.accesses.reads:
            if isinstance(access.owner, BulkGroups):
                self.hazards.report(
                    last,
                    f"exit while a bulk store may still read shared memory: {access.text}",
                    access.owner.thread // 32,
                )
        unfinished = [warp for warp, copies in self.copies.items() if any(copies.groups)]
        if unfinished:
            self.hazards.report(last, "exit with cp.async not waited for", unfinished)
        for access in self.hazards.accesses.writes:
            message = f"exit while a bulk load is under way: {access.text}"
            self.hazards.report(last, message, "any")

    def progress(self) -> None:
        """Let blocked units try again: something changed that they may have waited for."""
        self.cluster.version += 1

    def owner_of(self, address: int) -> tuple["Block", int]:
        """Return the block that a shared::cluster address lies in, and the offset there."""
        memory, offset = self.lane_memory.owner_of(address)
        return self.cluster.blocks[memory.rank], offset

    def mbarrier(self, address: int) -> Mbarrier:
        """Return the mbarrier at a shared::cluster address."""
        block, offset = self.owner_of(address)
        found = block.mbarriers.get(offset)
        if found is None:
            raise BarrierError(f"no mbarrier was initialised at {offset:#x}")
        return found

    def bulk_groups(self, thread: int) -> BulkGroups:
        return self.bulk.setdefault(thread, BulkGroups(thread))

    def live_threads(self) -> int:
        """Return the threads that barriers count: whole warps, as long as one lane is left."""
        return 32 * int(np.count_nonzero(self.live_lanes))

    def exit_threads(self, lanes: Lanes) -> None:
        """End the threads of these lanes; barriers of the whole block wait for the others only."""
        np.subtract.at(self.live_lanes, lanes.warp_of_lane, 1)
        self.lane_memory.closed = not self.live_lanes.any()
        for barrier in self.named_barriers.values():
            if barrier.whole_block and barrier.arrived:
                barrier.resize(self.live_threads())
        self.cluster.resize_barrier()

    def clock(self) -> int:
        return self.warp_instructions & 0xFFFFFFFF

    def symbol(self, name: str) -> int:
        """Return the address of a shared variable or a parameter."""
        program = self.launch.program
        return program.symbols[name] + (self.window if name in program.shared_names else 0)


class Cluster:
    """The blocks that run together, and what they share.

    version counts changes that a blocked unit of warps may have waited for.
    """

    def __init__(self, blocks: list[Block], position: tuple[int, int, int], number: int):
        launch = blocks[0].launch
        self.blocks, self.version = blocks, 0
        self.schedule = Schedule(launch.options.seed, number)
        self.events = Events(self.schedule)
        self.barrier = ClusterBarrier()
        x, y, z = launch.cluster
        places = [(rank % x, rank // x % y, rank // (x * y)) for rank in range(len(blocks))]
        ctaids = [
            (position[0] * x + i, position[1] * y + j, position[2] * z + k) for i, j, k in places
        ]
        self.clocks = Clocks(
            [
                f"warp {warp} of block {ctaid}" if len(blocks) > 1 else f"warp {warp}"
                for ctaid in ctaids
                for warp in range(launch.warps)
            ]
        )
        for block, ctaid in zip(blocks, ctaids, strict=True):
            block.start(self, ctaid)
        self.resize_barrier()

    def resize_barrier(self) -> None:
        """Make the cluster's barrier count the threads that have not exited."""
        if len(self.blocks) > 1 or self.barrier.arrived:
            self.barrier.resize(sum(int(block.live_lanes.sum()) for block in self.blocks))
