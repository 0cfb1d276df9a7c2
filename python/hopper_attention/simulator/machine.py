"""A launch: blocks, the scheduler, and what instructions ask of the machine.

Blocks run one after another, so a grid whose blocks wait for later blocks makes no progress.
Within a block, the scheduler lets one unit of warps run for some steps; blocked units are asked
again when anything has changed.  When nothing can run, asynchronous operations take effect; without
any, that is a deadlock.
"""

import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .asynchronous import BulkGroups, Events, Mbarrier, NamedBarrier, Schedule, SharedAccesses
from .errors import (
    BarrierError,
    DeadlockError,
    HazardError,
    HazardWarning,
    LaunchError,
    SimulatorError,
)
from .instructions.wgmma import Queue
from .memory import (
    PARAM_WINDOW,
    SHARED_BASE,
    SHARED_LIMIT,
    SHARED_WINDOW,
    GlobalMemory,
    SharedMemory,
)
from .options import Options, current_options
from .program import EXIT, Region, program_of
from .ptx import Instruction, Kernel, Module
from .warps import Lanes, Unit, Warpgroup

_REGISTERS_PER_BLOCK = 65536
_MAX_THREADS = 1024
MAX_IDLE_STEPS = 20_000_000  # steps without a barrier, an asynchronous operation or an exit


@dataclass(frozen=True)
class Statistics:
    """What a launch did.  warp_instructions counts each PTX instruction once a warp."""

    blocks: int
    warp_instructions: int
    seconds: float


class Machine:
    """One launch: its memories, and the block that is running."""

    def __init__(self, kernel: Kernel, grid, block, params: bytes, memory, dynamic: int, options):
        self.program = program_of(kernel)
        self.kernel, self.grid, self.block, self.memory = kernel, grid, block, memory
        self.options: Options = options
        self.params = np.frombuffer(params, np.uint8)
        self.dynamic_shared = dynamic
        self.threads = block[0] * block[1] * block[2]
        self.shared = SharedMemory(self.program.static_end + dynamic - SHARED_BASE)
        if self.shared.end > SHARED_LIMIT:
            raise LaunchError(
                f"{self.shared.end - SHARED_BASE} bytes of shared memory; a block has at most "
                f"{SHARED_LIMIT - SHARED_BASE}"
            )
        self.warp_instructions = 0
        self.version = 0
        self.reported: set[tuple[int, str]] = set()
        self.warpgroups = [
            Warpgroup(self, number, min(128, self.threads - 128 * number))
            for number in range(-(-self.threads // 128))
        ]

    # --- a block's life

    def run_block(self, ctaid: tuple[int, int, int], number: int) -> None:
        self.ctaid = ctaid
        self.shared.reset()
        self.fence_marks = np.zeros(len(self.shared.bytes) // 16, np.uint8)
        self.unfenced: set[int] = set()
        self.mbarriers: dict[int, Mbarrier] = {}
        self.named_barriers: dict[int, NamedBarrier] = {}
        self.bulk: dict[int, BulkGroups] = {}
        self.accesses = SharedAccesses()
        self.live_lanes = np.bincount(np.arange(self.threads) // 32)
        self.schedule = Schedule(self.options.seed, number)
        self.events = Events(self.schedule)
        self.idle_steps, self.idle_version = 0, self.version
        self._allot_registers()
        self.units = []
        for warpgroup in self.warpgroups:
            warpgroup.reset()
            self.units.append(Unit(self, warpgroup, [[0, EXIT, warpgroup.everyone]]))
        while self.units:
            self._slice()
        self._check_end()

    def _allot_registers(self) -> None:
        warps = -(-self.threads // 32)
        share = _REGISTERS_PER_BLOCK // (32 * warps * self.kernel.min_blocks) // 8 * 8
        count = min(self.kernel.max_registers or 256, share, 256)
        self.warp_registers = [count] * warps
        self.free_registers = 0

    def _slice(self) -> None:
        """Run one unit for a while, or let an asynchronous operation take effect."""
        if self.events.run_due():
            self.version += 1
        ready = [u for u in self.units if not u.paused and u.blocked_at != self.version]
        if not ready:
            ready = [u for u in self.units if u.paused]
            if ready and self.events.run_one():
                self.version += 1
                return
        if not ready:
            if not self.events.run_one():
                raise DeadlockError(self.deadlock_report())
            self.version += 1
            return
        unit, steps = self.schedule.choose(ready)
        self._notice_spinning(steps)
        if unit.paused:
            unit.joins.discard(unit.pc)
        try:
            unit.run(steps)
        except SimulatorError as error:
            raise self.annotate(error, unit) from error
        if not unit.stack:
            self.units.remove(unit)
            self.version += 1
            return
        for other in self.units:
            if other is not unit and unit.can_merge(other):
                unit.merge(other)
                self.units.remove(other)
                self.version += 1
                break

    def _notice_spinning(self, steps: int) -> None:
        """Warps that poll memory for something that no other warp of the block will write."""
        if self.version != self.idle_version:
            self.idle_steps, self.idle_version = 0, self.version
        self.idle_steps += steps
        if self.idle_steps > MAX_IDLE_STEPS:
            raise DeadlockError(f"{self.deadlock_report()}\n  no progress: warps poll memory")

    def annotate(self, error: SimulatorError, unit: Unit) -> SimulatorError:
        if "PTX line" in str(error) and "block (" in str(error):
            return error
        step = self.program.steps[unit.pc] if unit.pc < len(self.program.steps) else None
        place = f"\n  at {step.first.where()}" if step and "PTX line" not in str(error) else ""
        return type(error)(f"{error}{place}\n  block {self.ctaid}, warps {unit.warps}")

    def deadlock_report(self) -> str:
        lines = [f"deadlock in block {self.ctaid} of {self.kernel.name}"]
        for unit in self.units:
            where = self.program.steps[unit.pc].first.where()
            lines.append(f"  warps {unit.warps}, {unit.lanes.count} lanes, wait for {unit.waiting}")
            lines.append(f"    at {where}")
        lines.append(f"  {np.count_nonzero(self.live_lanes == 0)} warps have exited")
        lines += [f"  {self.mbarriers[a]}" for a in sorted(self.mbarriers)]
        lines += [f"  {self.named_barriers[n]}" for n in sorted(self.named_barriers)]
        lines.append(f"  registers: {self.free_registers} free for setmaxnreg.inc")
        return "\n".join(lines)

    def _check_end(self) -> None:
        last = self.kernel.instructions[-1]
        for warpgroup in self.warpgroups:
            if warpgroup.queue.groups or warpgroup.queue.open.items:
                self.hazard(last, f"warpgroup {warpgroup.number} exits with wgmma not waited for")
        for access in self.accesses.reads:
            if isinstance(access.owner, BulkGroups):
                self.hazard(
                    last, f"exit while a bulk store may still read shared memory: {access.text}"
                )
        for access in self.accesses.writes:
            self.hazard(last, f"exit while a bulk load is under way: {access.text}")
        while self.events.run_one():
            pass

    # --- services to instructions

    def hazard(self, instruction: Instruction, message: str) -> None:
        """Report once a place and kind."""
        if self.options.hazards == "off":
            return
        text = f"{message}\n  {instruction.where()}\n  block {self.ctaid} of {self.kernel.name}"
        if self.options.hazards == "raise":
            raise HazardError(text)
        if (instruction.line, message) not in self.reported:
            self.reported.add((instruction.line, message))
            warnings.warn(text, HazardWarning, stacklevel=3)

    def report_early_use(self, region: Region, queue: Queue) -> None:
        """Find the instruction that uses registers of a wgmma not waited for."""
        for operation in region.operations:
            registers = {r for r in operation.registers_read() if r.bits == 32}
            written = {r for _, r in operation.outputs if r.bits == 32}
            for register in registers | written:
                bit = 1 << register.index
                if bit & queue.accumulators or (register in written and bit & queue.operands):
                    self.hazard(
                        operation.instruction,
                        f"{register} is used before wgmma.wait_group of the wgmma that uses it",
                    )
                    return

    def mbarrier(self, address: int) -> Mbarrier:
        found = self.mbarriers.get(address)
        if found is None:
            raise BarrierError(f"no mbarrier was initialised at {address:#x}")
        return found

    def bulk_groups(self, thread: int) -> BulkGroups:
        return self.bulk.setdefault(thread, BulkGroups())

    def live_threads(self) -> int:
        """What barriers count: whole warps, as long as one lane is left."""
        return 32 * int(np.count_nonzero(self.live_lanes))

    def exit_threads(self, lanes: Lanes) -> None:
        np.subtract.at(self.live_lanes, lanes.threads // 32, 1)
        for barrier in self.named_barriers.values():
            if barrier.whole_block and barrier.arrived:
                barrier.resize(self.live_threads())

    def clock(self) -> int:
        return self.warp_instructions & 0xFFFFFFFF

    def param(self, offset: int, dtype: type) -> np.generic:
        size = np.dtype(dtype).itemsize
        return self.params[offset : offset + size].view(dtype)[0]

    def generic_bytes(self, address: int, nbytes: int) -> bytes:
        """Bytes at a generic address: parameters, shared or global memory."""
        offset = address - PARAM_WINDOW if address >= PARAM_WINDOW else address
        if 0 <= offset <= len(self.params) - nbytes:
            return self.params[offset : offset + nbytes].tobytes()
        return self.memory.box(address, (nbytes,), (1,), 1, False).tobytes()

    # --- memory accesses of lanes

    def _place(self, lanes: Lanes, space: str, addresses) -> tuple[str, np.ndarray]:
        addresses = np.broadcast_to(addresses, (lanes.count,))
        if space == "shared":
            return space, addresses.astype(np.int64)
        addresses = addresses.astype(np.uint64)
        if space == "global":
            return space, addresses
        if space == "generic":
            inside = addresses >= np.uint64(SHARED_WINDOW)
            if inside.all():
                return "shared", (addresses - np.uint64(SHARED_WINDOW)).astype(np.int64)
            if not inside.any():
                return "global", addresses
        raise SimulatorError(f"memory access to state space {space} is not implemented")

    def load(self, lanes: Lanes, instruction, space: str, addresses, width: int, count: int):
        try:
            space, addresses = self._place(lanes, space, addresses)
            if space == "global":
                return self.memory.load(addresses, width, count)
            index = self.shared.index(addresses, width, width * count)
            if self.accesses.writes:
                low, high = int(addresses.min()), int(addresses.max()) + width * count
                self.check_shared(instruction, low, high, False)
            view = self.shared.views[width]
            return [view[index + k] for k in range(count)]
        except SimulatorError as error:
            raise self._located(error, instruction) from error

    def store(self, lanes: Lanes, instruction, space: str, addresses, width: int, values) -> None:
        try:
            space, addresses = self._place(lanes, space, addresses)
            values = [np.broadcast_to(value, (lanes.count,)) for value in values]
            if space == "global":
                self.memory.store(addresses, width, values)
                return
            index = self.shared.index(addresses, width, width * len(values))
            self.mark_store(lanes, instruction, addresses, width * len(values))
            view = self.shared.views[width]
            for k, value in enumerate(values):
                view[index + k] = value
        except SimulatorError as error:
            raise self._located(error, instruction) from error

    @staticmethod
    def _located(error: SimulatorError, instruction: Instruction) -> SimulatorError:
        if "PTX line" in str(error):
            return error
        return type(error)(f"{error}\n  at {instruction.where()}")

    def atomic(self, lanes: Lanes, instruction, space, operation, dtype, addresses, values, old):
        """Lanes one after another, vectors element by element; ``old``: return what was there."""
        try:
            space, addresses = self._place(lanes, space, addresses)
            values = [np.broadcast_to(np.asarray(v, dtype), (lanes.count,)) for v in values]
            size = np.dtype(dtype).itemsize
            if space == "shared":
                self.mark_store(lanes, instruction, addresses, size)
            if old or operation not in _UFUNCS:
                return self._exchange(space, operation, dtype, addresses, values)
            for k, value in enumerate(values):
                for view, index, chosen in self._elements(space, addresses + k * size, size):
                    _UFUNCS[operation].at(view.view(dtype), index, value[chosen])
            return None
        except SimulatorError as error:
            raise self._located(error, instruction) from error

    def _exchange(self, space: str, operation: str, dtype, addresses, values) -> np.ndarray:
        before = np.empty(len(addresses), dtype)
        for lane in range(len(addresses)):
            places = self._elements(space, addresses[lane : lane + 1], before.itemsize)
            view, index, _ = next(iter(places))
            element, at = view.view(dtype), int(index[0])
            before[lane] = element[at]
            other = values[1][lane] if operation == "cas" else None
            element[at] = _combine(operation, element[at], values[0][lane], other)
        return before

    def _elements(self, space: str, addresses: np.ndarray, size: int):
        """Arrays, element numbers in them, and the lanes they belong to."""
        if space == "global":
            return self.memory.elements(addresses, size)
        return [(self.shared.views[size], self.shared.index(addresses, size, size), slice(None))]

    def store_matrix(self, lanes, instruction, addresses, values, transpose: bool) -> None:
        """stmatrix: lane 8 i + r holds the address of row r of matrix i."""
        for where, value in zip(
            self._rows(lanes, instruction, addresses, len(values)), values, strict=True
        ):
            self.mark_store(lanes, instruction, where, 16)
            words, halves = _matrix_places(lanes, where, transpose)
            if words is not None:
                self.shared.views[4][words] = value
            else:
                for half, place in enumerate(halves):
                    self.shared.views[2][place] = value >> np.uint32(16 * half) & np.uint32(0xFFFF)

    def load_matrix(self, lanes, instruction, addresses, count: int, transpose: bool):
        result = []
        for where in self._rows(lanes, instruction, addresses, count):
            if self.accesses.writes:
                self.check_shared(instruction, int(where.min()), int(where.max()) + 16, False)
            words, halves = _matrix_places(lanes, where, transpose)
            if words is not None:
                result.append(self.shared.views[4][words])
            else:
                low, high = (self.shared.views[2][place].astype(np.uint32) for place in halves)
                result.append(low | high << np.uint32(16))
        return result

    def _rows(self, lanes: Lanes, instruction: Instruction, addresses, count: int):
        """Row addresses, (warps, 8), of each matrix."""
        if not lanes.whole_warps:
            raise SimulatorError(f"executed by a part of a warp\n  at {instruction.where()}")
        table = np.broadcast_to(addresses, (lanes.count,)).astype(np.int64).reshape(-1, 32)
        try:
            for k in range(count):
                rows = table[:, 8 * k : 8 * k + 8]
                self.shared.index(rows, 1, 16)
                yield rows
        except SimulatorError as error:
            raise self._located(error, instruction) from error

    # --- hazards in shared memory

    def mark_store(self, lanes: Lanes, instruction: Instruction, addresses, nbytes: int) -> None:
        """An ordinary store: the async proxy sees it only after the writer's fence.proxy.async."""
        if self.accesses.writes or self.accesses.reads:
            low, high = int(addresses.min()), int(addresses.max()) + nbytes
            self.check_shared(instruction, low, high, True)
        marks = lanes.warp_marks
        if np.shape(addresses) != marks.shape:  # rows of a matrix store: (warps, 8)
            marks = marks[::32, None]
        units = addresses >> 4
        self.fence_marks[units] = marks
        if nbytes > 16:
            self.fence_marks[units + 1] = marks
        self.unfenced.update(np.unique(lanes.warp_marks).tolist())

    def fence_mbarriers(self, lanes: Lanes) -> None:
        """The async proxy may use mbarriers only after their initialiser's fence."""
        warps = {int(mark) - 1 for mark in lanes.warp_marks}
        for barrier in self.mbarriers.values():
            if barrier.unfenced_warp in warps:
                barrier.unfenced_warp = -1

    def fence_proxy(self, lanes: Lanes) -> None:
        self.fence_mbarriers(lanes)
        for mark in {int(m) for m in lanes.warp_marks[:: 32 if lanes.whole_warps else 1]}:
            if mark in self.unfenced:
                self.fence_marks[self.fence_marks == mark] = 0
                self.unfenced.discard(mark)

    def check_fenced(self, instruction: Instruction, index) -> None:
        """The async proxy is about to read these 16-byte units."""
        if self.unfenced and self.fence_marks[index].any():
            marks = self.fence_marks[index]
            warp = int(marks[marks != 0].flat[0]) - 1
            self.hazard(
                instruction, f"reads what warp {warp} stored without a fence.proxy.async after it"
            )

    def check_shared(self, instruction: Instruction, low: int, high: int, writes: bool) -> None:
        """Does an access to [low, high) collide with an asynchronous one that is not waited for?"""
        access = self.accesses.collision(low, high, writes)
        if access is not None:
            kind = "writes" if writes else "reads"
            use = "being written" if access.writes else "still being read"
            self.hazard(instruction, f"{kind} shared memory {use} by {access.text}")


def _matrix_places(lanes: Lanes, rows: np.ndarray, transpose: bool):
    """Element numbers that each lane holds: 32-bit words, or two 16-bit halves if transposed."""
    lane = np.arange(32)
    if not transpose:
        return ((rows[:, lane // 4] >> 2) + lane % 4).reshape(-1), None
    halves = [((rows[:, 2 * (lane % 4) + half] >> 1) + lane // 4).reshape(-1) for half in (0, 1)]
    return None, halves


_UFUNCS = {
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
    return _UFUNCS[operation](old, value)


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
) -> Statistics:
    """Run a kernel.

    params: one bytes object a kernel parameter, as the host passes them.  memory: all global memory
    that the kernel may touch; it is as before after an error.  Raises SimulatorError and its
    subclasses.
    """
    if name not in module.kernels:
        raise LaunchError(f"no kernel {name}; {module.path} has {sorted(module.kernels)}")
    kernel = module.kernels[name]
    grid, block = (tuple(int(n) for n in (*d, 1, 1)[:3]) for d in (grid, block))
    if tuple(cluster) != (1, 1, 1):
        raise LaunchError(f"clusters are not implemented, got {tuple(cluster)}")
    if kernel.required_block and block != kernel.required_block:
        raise LaunchError(f"block {block}, the kernel requires {kernel.required_block}")
    if min(grid) < 1 or min(block) < 1 or np.prod(block) > _MAX_THREADS:
        raise LaunchError(f"grid {grid}, block {block}: 1 to {_MAX_THREADS} threads a block")
    if len(params) != len(kernel.params):
        raise LaunchError(f"{len(params)} parameters, the kernel has {len(kernel.params)}")
    image = bytearray()
    for number, (given, param) in enumerate(zip(params, kernel.params, strict=True)):
        if len(given) != param.size:
            raise LaunchError(f"parameter {number} has {len(given)} bytes, not {param.size}")
        image += bytes(param.offset - len(image)) + bytes(given)
    start = time.perf_counter()
    arguments = kernel, grid, block, bytes(image), memory, shared_memory_bytes
    machine = Machine(*arguments, options or current_options())
    blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    if machine.options.seed:
        random.Random(machine.options.seed).shuffle(blocks)
    with np.errstate(all="ignore"), memory.transaction():
        for number, ctaid in enumerate(blocks):
            machine.run_block(ctaid, number)
    return Statistics(len(blocks), machine.warp_instructions, time.perf_counter() - start)
