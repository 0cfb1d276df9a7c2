"""One block: its shared memory and barriers, and the services that instructions ask of it."""

from typing import TYPE_CHECKING

import numpy as np

from hopper_attention.simulator.errors import (
    BarrierError,
    MisalignedAccess,
    OutOfBounds,
    SimulatorError,
)
from hopper_attention.simulator.execution.program import EXIT, Region
from hopper_attention.simulator.execution.warps import Lanes, Unit, Warpgroup
from hopper_attention.simulator.hardware.asynchronous import (
    BulkGroups,
    Mbarrier,
    NamedBarrier,
    SharedAccesses,
)
from hopper_attention.simulator.hardware.formats import bf16_bits
from hopper_attention.simulator.hardware.memory import (
    CLUSTER_BITS,
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_BASE,
    SHARED_WINDOW,
    LocalMemory,
    SharedMemory,
)
from hopper_attention.simulator.hardware.tensor_core import Queue
from hopper_attention.simulator.hazards.races import Conflict, Shadow, agents_of, shadow_bytes
from hopper_attention.simulator.instructions.async_copy import Copy, CopyGroups
from hopper_attention.simulator.observation.recording import Trace
from hopper_attention.simulator.ptx.parser import Instruction

if TYPE_CHECKING:
    from hopper_attention.simulator.execution.machine import Cluster, Machine

_REGISTERS_PER_BLOCK = 65536
_OFFSET = (1 << CLUSTER_BITS) - 1


class Block:
    """A place for one block of the launch; ``start`` makes it run another one."""

    def __init__(self, machine: "Machine", rank: int):
        self.machine, self.rank = machine, rank
        self.program, self.kernel, self.memory = machine.program, machine.kernel, machine.memory
        self.grid, self.block, self.threads = machine.grid, machine.block, machine.threads
        self.shape, self.params = machine.cluster_shape, machine.params
        self.dynamic_shared = machine.dynamic_shared
        self.window = rank << CLUSTER_BITS  # added to the addresses of shared variables
        self.shared = SharedMemory(self.program.static_end + machine.dynamic_shared - SHARED_BASE)
        self.warps = -(-self.threads // 32)
        self.first_agent = rank * self.warps
        self.warp_instructions = 0
        self.local = LocalMemory(self.program.local_bytes, self.threads)
        self.shadow: Shadow | None = None
        self.trace: Trace | None = None
        self.warpgroups = [
            Warpgroup(self, number, min(128, self.threads - 128 * number))
            for number in range(-(-self.threads // 128))
        ]

    def start(self, cluster: "Cluster", ctaid: tuple[int, int, int]) -> list[Unit]:
        self.cluster, self.ctaid = cluster, ctaid
        self.events, self.schedule = cluster.events, cluster.schedule
        self.shared.reset()
        self.local.reset()
        self.mbarriers: dict[int, Mbarrier] = {}
        self.named_barriers: dict[int, NamedBarrier] = {}
        self.bulk: dict[int, BulkGroups] = {}
        self.copies: dict[int, CopyGroups] = {}  # cp.async, by warp
        self.accesses = SharedAccesses()
        self.live_lanes = np.bincount(np.arange(self.threads) // 32)
        self._allot_registers()
        if self.machine.options.hazards == "off":
            self.shadow = None
        elif self.shadow is None:
            nbytes = shadow_bytes(self.shared.end)
            self.shadow = Shadow(nbytes, self.program.smallest_access, cluster.clocks)
        else:
            self.shadow.reset(cluster.clocks)
        units = []
        for warpgroup in self.warpgroups:
            warpgroup.reset()
            units.append(Unit(self, warpgroup, [[0, EXIT, warpgroup.everyone]]))
        return units

    def _allot_registers(self) -> None:
        share = _REGISTERS_PER_BLOCK // (32 * self.warps * self.kernel.min_blocks) // 8 * 8
        count = min(self.kernel.max_registers or 256, share, 256)
        self.warp_registers = [count] * self.warps
        self.free_registers = 0

    def check_end(self) -> None:
        """Check that nothing is under way any more when all threads have exited."""
        last = self.kernel.instructions[-1]
        for warpgroup in self.warpgroups:
            if warpgroup.queue.groups or warpgroup.queue.open.items:
                first = warpgroup.first_thread // 32
                self.hazard(last, "exit with wgmma not waited for", f"{first} to {first + 3}")
        for access in self.accesses.reads:
            if isinstance(access.owner, BulkGroups):
                self.hazard(
                    last,
                    f"exit while a bulk store may still read shared memory: {access.text}",
                    access.owner.thread // 32,
                )
        if any(group for copies in self.copies.values() for group in copies.groups):
            warps = [warp for warp, copies in self.copies.items() if any(copies.groups)]
            self.hazard(last, "exit with cp.async not waited for", warps)
        for access in self.accesses.writes:
            self.hazard(last, f"exit while a bulk load is under way: {access.text}", "any")

    # --- services to instructions

    def hazard(self, instruction: Instruction, message: str, warps: object = None) -> None:
        """Report once a place and kind."""
        if isinstance(warps, list):
            warps = ", ".join(map(str, warps))
        at = "" if warps is None else f", warp {warps}"
        text = f"{message}\n  {instruction.where()}\n  block {self.ctaid}{at} of {self.kernel.name}"
        self.machine.report(instruction, message, text)

    def report_early_use(self, region: Region, queue: Queue) -> None:
        """Find the instruction that uses registers of a wgmma not waited for."""
        for operation in region.operations:
            registers = {r for r in operation.registers_read() if r.bits == 32}
            written = {r for _, r in operation.outputs if r.bits == 32}
            for register in registers | written:
                bit = 1 << register.index
                if bit & queue.accumulators or (register in written and bit & queue.operands):
                    first = queue.warpgroup.first_thread // 32
                    self.hazard(
                        operation.instruction,
                        f"{register} is used before wgmma.wait_group of the wgmma that uses it",
                        f"{first} to {first + 3}",
                    )
                    return

    def progress(self) -> None:
        """Something changed that a blocked unit may have waited for."""
        self.cluster.version += 1

    def owner_of(self, address: int) -> tuple["Block", int]:
        """The block of the cluster that a shared::cluster address lies in, and the offset there."""
        rank = int(address) >> CLUSTER_BITS
        if rank >= len(self.cluster.blocks):
            raise OutOfBounds(
                f"shared::cluster address {address:#x}: no block {rank} in the cluster"
            )
        block = self.cluster.blocks[rank]
        if block is not self and not block.live_lanes.any():
            raise OutOfBounds(
                f"shared memory of block {block.ctaid}, whose threads have all exited"
            )
        return block, int(address) & _OFFSET

    def mbarrier(self, address: int) -> Mbarrier:
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
        np.subtract.at(self.live_lanes, lanes.threads // 32, 1)
        for barrier in self.named_barriers.values():
            if barrier.whole_block and barrier.arrived:
                barrier.resize(self.live_threads())
        self.cluster.resize_barrier()

    def clock(self) -> int:
        return self.warp_instructions & 0xFFFFFFFF

    def symbol(self, name: str) -> int:
        """Address of a shared variable or a parameter."""
        window = self.window if name in self.program.shared_names else 0
        return self.program.symbols[name] + window

    def param(self, offset: int, dtype: type) -> np.generic:
        size = np.dtype(dtype).itemsize
        return self.params[offset : offset + size].view(dtype)[0]

    def param_lanes(self, addresses: np.ndarray, width: int, count: int) -> list[np.ndarray]:
        """Parameters at addresses that differ among lanes."""
        offsets = np.asarray(addresses).astype(np.int64) % PARAM_WINDOW
        if offsets.min() < 0 or offsets.max() + width * count > len(self.params):
            raise OutOfBounds(f"parameter access at {int(offsets.max()):#x}")
        table = self.params[offsets[:, None] + np.arange(width * count)]
        return list(np.ascontiguousarray(table).view(f"u{width}").T)

    def generic_bytes(self, address: int, nbytes: int) -> bytes:
        """Bytes at a generic address: parameters, shared or global memory."""
        offset = address - PARAM_WINDOW if address >= PARAM_WINDOW else address
        if 0 <= offset <= len(self.params) - nbytes:
            return self.params[offset : offset + nbytes].tobytes()
        if address >= SHARED_WINDOW:
            block, start = self.owner_of(address - SHARED_WINDOW)
            block.shared.check(start, start + nbytes)
            return block.shared.bytes[start : start + nbytes].tobytes()
        return self.memory.box(address, (nbytes,), (1,), 1, False).tobytes()

    # --- memory accesses of lanes

    def _parts(self, lanes: Lanes, space: str, addresses: np.ndarray):
        """Yield places of lanes' accesses: (block or None for global, lane selection, offsets)."""
        everyone = slice(None)
        if space == "global":
            yield None, everyone, addresses.astype(np.uint64)
            return
        if space == "generic":
            addresses = addresses.astype(np.uint64)
            if (addresses >= np.uint64(LOCAL_WINDOW)).all() and self.program.local_bytes:
                yield self.local, everyone, (addresses - np.uint64(LOCAL_WINDOW)).astype(np.int64)
                return
            inside = addresses >= np.uint64(SHARED_WINDOW)
            if not inside.all():
                chosen = everyone if not inside.any() else np.flatnonzero(~inside)
                yield None, chosen, addresses[chosen]
                if not inside.any():
                    return
            chosen = everyone if inside.all() else np.flatnonzero(inside)
            addresses = (addresses[chosen] - np.uint64(SHARED_WINDOW)).astype(np.int64)
        elif space == "local":
            yield self.local, everyone, addresses.astype(np.int64)
            return
        elif space in ("shared", "shared::cluster"):
            chosen, addresses = everyone, addresses.astype(np.int64)
        else:
            raise SimulatorError(f"memory access to state space {space} is not implemented")
        ranks = addresses >> CLUSTER_BITS
        if (ranks == self.rank).all():
            yield self, chosen, addresses & _OFFSET
            return
        for rank in np.unique(ranks).tolist():
            if space == "shared" and rank != self.rank:
                raise OutOfBounds(f"shared::cta access to shared memory of block {rank}")
            block, _ = self.owner_of(rank << CLUSTER_BITS)
            part = np.flatnonzero(ranks == rank)
            which = part if isinstance(chosen, slice) else chosen[part]
            yield block, which, addresses[part] & _OFFSET

    def load(self, lanes, instruction, space: str, addresses, width: int, count: int, strong=False):
        """One array a vector element."""
        try:
            addresses = np.broadcast_to(addresses, (lanes.count,))
            parts = list(self._parts(lanes, space, addresses))
            results = []
            for block, chosen, offsets in parts:
                if block is None:
                    values = self.memory.load(offsets, width, count)
                elif isinstance(block, LocalMemory):
                    values = block.load(lanes.threads[chosen], offsets, width, count)
                else:
                    nbytes = width * count
                    index = block.shared.index(offsets, width, nbytes)
                    self.check_read(block, lanes, instruction, chosen, offsets, nbytes, strong)
                    view = block.shared.views[width]
                    values = [view[index + k] for k in range(count)]
                results.append((chosen, values))
            if len(results) == 1:
                return results[0][1]
            whole = [np.empty(lanes.count, results[0][1][0].dtype) for _ in range(count)]
            for chosen, values in results:
                for k in range(count):
                    whole[k][chosen] = values[k]
            return whole
        except SimulatorError as error:
            raise located(error, instruction) from error

    def store(self, lanes, instruction, space: str, addresses, width: int, values, strong=False):
        try:
            addresses = np.broadcast_to(addresses, (lanes.count,))
            values = [np.broadcast_to(value, (lanes.count,)) for value in values]
            for block, chosen, offsets in self._parts(lanes, space, addresses):
                part = [value[chosen] for value in values]
                if block is None:
                    self.memory.store(offsets, width, part)
                    continue
                if isinstance(block, LocalMemory):
                    block.store(lanes.threads[chosen], offsets, width, part)
                    continue
                nbytes = width * len(values)
                index = block.shared.index(offsets, width, nbytes)
                self.check_write(block, lanes, instruction, chosen, offsets, nbytes, strong)
                for k, value in enumerate(part):
                    block.shared.views[width][index + k] = value
        except SimulatorError as error:
            raise located(error, instruction) from error

    def atomic(self, lanes: Lanes, instruction, space, operation, dtype, addresses, values, old):
        """Lanes one after another, vectors element by element; ``old``: return what was there."""
        try:
            addresses = np.broadcast_to(addresses, (lanes.count,))
            size = np.dtype(dtype).itemsize
            values = [np.broadcast_to(np.asarray(v, dtype), (lanes.count,)) for v in values]
            count = 1 if operation == "cas" else len(values)
            before = [np.empty(lanes.count, dtype) for _ in range(count)]
            for block, chosen, offsets in self._parts(lanes, space, addresses):
                part = [value[chosen] for value in values]
                if block is not None:
                    self.check_write(block, lanes, instruction, chosen, offsets, size * count, True)
                for k in range(count):
                    at = offsets + offsets.dtype.type(k * size)
                    operands = part if operation == "cas" else part[k : k + 1]
                    if old or operation not in ATOMICS:
                        found = self._exchange(block, operation, dtype, at, operands)
                        before[k][chosen] = found
                        continue
                    for view, index, mine in self._elements(block, at, size):
                        ATOMICS[operation].at(view.view(dtype), index, operands[0][mine])
            return before
        except SimulatorError as error:
            raise located(error, instruction) from error

    def _exchange(self, block, operation: str, dtype, addresses, values) -> np.ndarray:
        before = np.empty(len(addresses), dtype)
        for lane in range(len(addresses)):
            places = self._elements(block, addresses[lane : lane + 1], before.itemsize)
            view, index, _ = next(iter(places))
            element, at = view.view(dtype), int(index[0])
            before[lane] = element[at]
            other = values[1][lane] if operation == "cas" else None
            element[at] = _combine(operation, element[at], values[0][lane], other)
        return before

    def _elements(self, block, addresses: np.ndarray, size: int):
        """Arrays, element numbers in them, and the lanes they belong to."""
        if block is None:
            return self.memory.elements(addresses, size)
        return [(block.shared.views[size], block.shared.index(addresses, size, size), slice(None))]

    def atomic_packed(self, lanes, instruction, space, operation, kind, addresses, values):
        """atom and red of 16-bit floats, each rounded once; values are the bits, two a register."""
        try:
            before = [np.empty(lanes.count, np.uint16) for _ in values]
            addresses = np.broadcast_to(addresses, (lanes.count,))
            values = [np.broadcast_to(value, (lanes.count,)) for value in values]
            for block, chosen, offsets in self._parts(lanes, space, addresses):
                if block is not None:
                    nbytes = 2 * len(values)
                    self.check_write(block, lanes, instruction, chosen, offsets, nbytes, True)
                numbers = np.arange(lanes.count)[chosen]
                for k, value in enumerate(values):
                    for position, lane in enumerate(numbers):
                        at = offsets[position : position + 1] + offsets.dtype.type(2 * k)
                        view, index, _ = next(iter(self._elements(block, at, 2)))
                        before[k][lane] = view[index[0]]
                        view[index[0]] = combine_halves(
                            operation, kind, view[index[0]], value[lane]
                        )
            return before
        except SimulatorError as error:
            raise located(error, instruction) from error

    def store_matrix(self, lanes, instruction, addresses, values, transpose: bool) -> None:
        """stmatrix: lane 8 i + r holds the address of row r of matrix i."""
        rows = self._rows(lanes, instruction, addresses, len(values))
        self._check_rows(lanes, instruction, rows, True)
        for k, value in enumerate(values):
            words, halves = _matrix_places(rows[:, k : k + 1], transpose)
            if words is not None:
                self.shared.views[4][words.reshape(-1)] = value
            else:
                for half, place in enumerate(halves):
                    part = value >> np.uint32(16 * half) & np.uint32(0xFFFF)
                    self.shared.views[2][place.reshape(-1)] = part

    def load_matrix(self, lanes, instruction, addresses, count: int, transpose: bool):
        rows = self._rows(lanes, instruction, addresses, count)
        self._check_rows(lanes, instruction, rows, False)
        words, halves = _matrix_places(rows, transpose)
        if words is not None:
            result = self.shared.views[4][words]
        else:
            low, high = (self.shared.views[2][place].astype(np.uint32) for place in halves)
            result = low | high << np.uint32(16)
        return result.transpose(1, 0, 2).reshape(count, -1)

    def _rows(self, lanes: Lanes, instruction: Instruction, addresses, count: int) -> np.ndarray:
        """Offsets of rows, (warps, matrices, 8)."""
        if not lanes.whole_warps:
            raise SimulatorError(f"executed by a part of a warp\n  at {instruction.where()}")
        table = np.broadcast_to(addresses, (lanes.count,)).astype(np.int64).reshape(-1, 4, 8)
        rows = (table - self.window)[:, :count]
        try:
            self.shared.index(rows, 1, 16)
        except SimulatorError as error:
            raise located(error, instruction) from error
        return rows

    def _check_rows(self, lanes: Lanes, instruction: Instruction, rows, writes: bool) -> None:
        if self.accesses.writes or (writes and self.accesses.reads):
            for k in range(rows.shape[1]):
                self.check_pieces(instruction, rows[:, k], 16, writes, lanes)
        if self.shadow is None:
            return
        warps = self.first_agent + lanes.threads[::32] // 32
        agents = np.broadcast_to(warps[:, None, None], rows.shape)
        units = self.shadow.units(rows, 16)
        if writes:
            conflict = self.shadow.write(agents, units, instruction.line)
        else:
            conflict = self.shadow.read(agents, units)
        if conflict:
            self.report_conflict(instruction, conflict, writes)

    # --- cp.async

    def copy_async(self, lanes: Lanes, instruction, target, source, size: int, count) -> None:
        """Global memory is read at once, shared memory written at some time before the wait."""
        try:
            offsets = np.broadcast_to(target, (lanes.count,)).astype(np.int64) - self.window
            source = np.broadcast_to(source, (lanes.count,)).astype(np.uint64)
            count = np.broadcast_to(np.asarray(count, np.int64), (lanes.count,))
            self.shared.index(offsets, 4, size)
            if (source % np.uint64(size)).any():
                raise MisalignedAccess(f"cp.async of {size} bytes from a misaligned address")
            if (count > size).any():
                raise SimulatorError(f"cp.async reads {int(count.max())} of {size} bytes")
            words = np.zeros((size // 4, lanes.count), np.uint32)
            for k in range(size // 4):
                chosen = np.flatnonzero(count > 4 * k)
                if len(chosen):
                    at = source[chosen] + np.uint64(4 * k)
                    words[k, chosen] = self.memory.load(at, 4, 1)[0]
                    short = count[chosen] - 4 * k < 4
                    keep = (
                        np.uint64(1) << (8 * (count[chosen] - 4 * k)[short]).astype(np.uint64)
                    ) - 1
                    words[k, chosen[short]] &= keep.astype(np.uint32)
            everyone = slice(None)
            self.check_write(self, lanes, instruction, everyone, offsets, size, False)
            agents = agents_of(lanes, self.first_agent)
            units = None
            if self.shadow is not None:
                units = self.shadow.units(offsets, size)
                self.shadow.hide(units)
            index = offsets >> 2
            view = self.shared.views[4]
            for k in range(size // 4):
                view[index + k] = 0xFFFFFFFF

            def effect() -> None:
                for k in range(size // 4):
                    view[index + k] = words[k]

            copy = Copy(lanes.threads // 32, agents, units)
            copy.event = self.events.issue(effect, instruction.where())
            for warp in lanes.warps.tolist():
                self.copies.setdefault(warp, CopyGroups()).open.append(copy)
        except SimulatorError as error:
            raise located(error, instruction) from error

    def commit_async(self, lanes: Lanes) -> None:
        for warp in lanes.warps.tolist():
            self.copies.setdefault(warp, CopyGroups()).commit()

    def wait_async(self, lanes: Lanes, keep: int, everything: bool) -> None:
        for warp in lanes.warps.tolist():
            if warp in self.copies:
                self._finish(self.copies[warp].take(keep, everything), warp)

    def _finish(self, copies: list[Copy], warp: int) -> None:
        """The copies are done and this warp knows it."""
        for copy in copies:
            copy.finish()
            if self.shadow is not None and copy.units is not None:
                mine = copy.lanes_of(warp)
                self.shadow.show(copy.agents[mine], copy.units[mine])

    def arrive_async(self, lanes: Lanes, instruction, addresses, noinc: bool) -> None:
        addresses = np.broadcast_to(addresses, (lanes.count,)).tolist()
        before = {
            warp: self.copies[warp].all() for warp in lanes.warps.tolist() if warp in self.copies
        }
        barriers = [self.mbarrier(int(a)) for a in addresses]
        agents = agents_of(lanes, self.first_agent)
        if not noinc:
            for barrier in barriers:
                barrier.pending += 1

        def effect() -> None:
            for warp, copies in before.items():
                self._finish(copies, warp)
            for k, barrier in enumerate(barriers):
                if barrier.clocks is not None:
                    barrier.clocks.release(agents[k : k + 1], barrier.sync)
                if self.trace:
                    self.trace.arrive(agents[k : k + 1].tolist(), barrier)
                barrier.arrive()

        self.events.issue(effect, instruction.where())

    # --- hazards in shared memory

    def check_read(self, block, lanes, instruction, chosen, offsets, nbytes, strong) -> None:
        """Lanes of this block are about to read shared memory of ``block``."""
        if block.accesses.writes:
            block.check_pieces(instruction, offsets, nbytes, False, lanes)
        if block.shadow is not None:
            agents = agents_of(lanes, self.first_agent)[chosen]
            conflict = block.shadow.read(agents, block.shadow.units(offsets, nbytes), strong)
            if conflict:
                self.report_conflict(instruction, conflict, False)

    def check_write(self, block, lanes, instruction, chosen, offsets, nbytes, strong) -> None:
        if block.accesses.writes or block.accesses.reads:
            block.check_pieces(instruction, offsets, nbytes, True, lanes)
        if block.shadow is not None:
            agents = agents_of(lanes, self.first_agent)[chosen]
            units = block.shadow.units(offsets, nbytes)
            conflict = block.shadow.write(agents, units, instruction.line, strong)
            if conflict:
                self.report_conflict(instruction, conflict, True)

    def report_conflict(self, instruction: Instruction, conflict: Conflict, writes: bool) -> None:
        verb = "writes" if writes else "reads"
        if conflict.kind == "unwritten":
            message = "reads shared memory that nothing has written"
        else:
            who = self.cluster.agent_name(conflict.agent)
            if not conflict.fenced:
                message = (
                    f"reads what {who} stored at PTX line {conflict.line} without a "
                    "fence.proxy.async after it"
                )
            elif conflict.kind == "read":
                what = f" ({conflict.text})" if conflict.text else ""
                message = (
                    f"{verb} shared memory that {who} may still read{what}: no barrier between"
                )
            else:
                message = (
                    f"{verb} shared memory that {who} wrote at PTX line {conflict.line}: "
                    "no barrier between"
                )
        self.hazard(instruction, message, conflict.by % self.warps)

    def check_bulk_read(self, instruction: Instruction, lanes: Lanes, pieces) -> None:
        """The asynchronous proxy is about to read 16-byte pieces on behalf of these warps."""
        if self.shadow is not None:
            conflict = self.shadow.bulk_read(self.first_agent + lanes.warps, pieces)
            if conflict:
                self.report_conflict(instruction, conflict, False)

    def fence_mbarriers(self, lanes: Lanes) -> None:
        """The async proxy may use mbarriers only after their initialiser's fence."""
        warps = set(lanes.warps.tolist())
        for barrier in self.mbarriers.values():
            if barrier.unfenced_warp in warps:
                barrier.unfenced_warp = -1
        self.fence_release(lanes)

    def fence_release(self, lanes: Lanes) -> None:
        if self.shadow is not None:
            self.cluster.clocks.release_fence(self.first_agent + lanes.warps)

    def fence_proxy(self, lanes: Lanes) -> None:
        self.fence_mbarriers(lanes)
        if self.shadow is not None:
            self.cluster.clocks.fence(self.first_agent + lanes.warps)

    def check_pieces(
        self, instruction: Instruction, starts: np.ndarray, nbytes: int, writes: bool, lanes: Lanes
    ) -> None:
        """`check_shared` of what lies together in no order."""
        low, high = int(starts.min()), int(starts.max()) + nbytes
        self.check_shared(instruction, low, high, writes, lanes, (starts, nbytes))

    def check_shared(
        self,
        instruction: Instruction,
        low: int,
        high: int,
        writes: bool,
        lanes: Lanes,
        pieces: tuple[np.ndarray, int] | None = None,
    ) -> None:
        """Does an access to [low, high) collide with an asynchronous one that is not waited for?"""
        access = self.accesses.collision(low, high, writes, pieces)
        if access is not None:
            kind = "writes" if writes else "reads"
            use = "being written" if access.writes else "still being read"
            self.hazard(
                instruction, f"{kind} shared memory {use} by {access.text}", lanes.warps.tolist()
            )

    def require_aligned(self, address: int, nbytes: int, what: str) -> None:
        if address % nbytes:
            raise MisalignedAccess(f"{what} {address:#x} is not a multiple of {nbytes}")


def located(error: SimulatorError, instruction: Instruction) -> SimulatorError:
    if "PTX line" in str(error):
        return error
    return type(error)(f"{error}\n  at {instruction.where()}")


def _matrix_places(rows: np.ndarray, transpose: bool):
    """Elements that lanes hold, (warps, matrices, 32): words, or 16-bit halves if transposed."""
    lane = np.arange(32)
    if not transpose:
        return (rows[..., lane // 4] >> 2) + lane % 4, None
    return None, [(rows[..., 2 * (lane % 4) + half] >> 1) + lane // 4 for half in (0, 1)]


ATOMICS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def _combine(operation: str, old, value, other):
    if operation == "cas":
        return other if old == value else old
    if operation == "exch":
        return value
    if operation == "inc":
        return 0 if old >= value else old + 1
    if operation == "dec":
        return value if old == 0 or old > value else old - 1
    return ATOMICS[operation](old, value)


def combine_halves(operation: str, kind: str, old: np.uint16, value: np.uint16) -> np.uint16:
    """One element of an f16 or bf16 atomic."""
    if kind == "f16":
        a, b = (np.float32(np.uint16(x).view(np.float16)) for x in (old, value))
        return np.float16(ATOMICS[operation](a, b)).view(np.uint16)
    a, b = ((np.uint32(x) << np.uint32(16)).view(np.float32) for x in (old, value))
    return np.uint16(bf16_bits(np.array([ATOMICS[operation](a, b)], np.float32))[0])
