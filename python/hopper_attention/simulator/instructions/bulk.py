"""Bulk asynchronous copies: TMA tensor loads, stores and reductions, and plain bulk copies."""

import functools

import numpy as np

from hopper_attention.simulator.errors import MisalignedAccess, SimulatorError
from hopper_attention.simulator.hardware.asynchronous import Event
from hopper_attention.simulator.hardware.formats import bf16_bits, widen_bf16
from hopper_attention.simulator.hardware.memory import CLUSTER_BITS, POISON, REDUCTIONS
from hopper_attention.simulator.hardware.tensor_map import TensorMap, decode, swizzle_address
from hopper_attention.simulator.hazards.checks import SharedAccess
from hopper_attention.simulator.instructions.registry import TYPES, control, refuse_unknown
from hopper_attention.simulator.instructions.synchronisation import (
    find_mbarrier,
    operand_values,
    shared_addresses,
)
from hopper_attention.simulator.ptx.parser import Instruction, Vector

_DTYPES = {
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "f16": np.float16,
    "f32": np.float32, "f64": np.float64, "s32": np.int32, "s64": np.int64,
}  # fmt: skip


@functools.lru_cache(maxsize=8192)
def chunk_index(start: int, nbytes: int, swizzle: int) -> np.ndarray:
    """Return the numbers of the 16-byte units of shared memory that hold a tile, in its order."""
    addresses = np.arange(start, start + nbytes, 16)
    return swizzle_address(addresses, swizzle) >> 4


class Tile:
    """A tensor map's box at given coordinates, cut to what lies inside of the tensor."""

    def __init__(self, tensor_map: TensorMap, coordinates: list[int]):
        row = tensor_map.box[0] * tensor_map.element_bytes
        if row % 16 or (tensor_map.swizzle and row != tensor_map.swizzle):
            raise SimulatorError(
                f"TMA box of {row} bytes a row with swizzle {tensor_map.swizzle} is not implemented"
            )
        if len(coordinates) != tensor_map.rank:
            raise SimulatorError(
                f"{len(coordinates)} coordinates for a tensor map of rank {tensor_map.rank}"
            )
        self.map = tensor_map
        self.shape = tensor_map.shared_box[::-1]
        self.steps = tensor_map.steps[::-1]
        self.start = coordinates[::-1]
        self.inner, self.outer = [], []
        sizes = tensor_map.sizes[::-1]
        for at, extent, size, step in zip(self.start, self.shape, sizes, self.steps, strict=True):
            low, high = max(0, -(at // step)), min(extent, -((at - size) // step))
            self.inner.append(slice(low, max(low, high)))
            self.outer.append((at + low * step, max(0, high - low)))
        self.empty = any(s.start >= s.stop for s in self.inner)
        self.whole = all(
            s.start == 0 and s.stop == n for s, n in zip(self.inner, self.shape, strict=True)
        )

    def tensor(self, memory, write: bool) -> np.ndarray:
        """Return the part of the tensor inside of the box, as an array over global memory."""
        m = self.map
        strides = m.strides[::-1]
        offset = sum(first * n for (first, _), n in zip(self.outer, strides, strict=True))
        sizes = tuple(count for _, count in self.outer)
        steps = tuple(n * step for n, step in zip(strides, self.steps, strict=True))
        return memory.box(m.base + offset, sizes, steps, m.element_bytes, write)

    def read(self, memory) -> np.ndarray:
        """Return the box's bytes as 16-byte units, zeros outside of the tensor."""
        if self.whole:
            data = np.ascontiguousarray(self.tensor(memory, False))
        else:
            dtype = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[self.map.element_bytes]
            data = np.zeros(self.shape, dtype)
            if not self.empty:
                data[tuple(self.inner)] = self.tensor(memory, False)
        return data.reshape(-1).view(np.complex128)

    def write(self, memory, chunks: np.ndarray, reduction: str, kind: str) -> None:
        if self.empty:
            return
        target = self.tensor(memory, True)
        data = chunks.view(target.dtype).reshape(self.shape)[tuple(self.inner)]
        reduce_into(target, data, reduction, kind)


def reduce_into(target: np.ndarray, data: np.ndarray, reduction: str, kind: str) -> None:
    """Write data, or target (operation) data in the element type, to target."""
    if not reduction:
        target[...] = data
        return
    ufunc = REDUCTIONS[reduction]
    if kind == "bf16":
        old, new = (widen_bf16(np.ascontiguousarray(x.view(np.uint16))) for x in (target, data))
        target.view(np.uint16)[...] = bf16_bits(ufunc(old, new))
        return
    dtype = _DTYPES["f32" if kind == "tf32" else kind]
    ufunc(target.view(dtype), data.view(dtype), out=target.view(dtype))


# ------------------------------------------------------------------------- loads, multicast, stores


def _read_map(block, unit, operand, lane: int) -> TensorMap:
    address = int(operand_values(unit, operand.base, "W")[lane]) + operand.offset
    return decode(block.lane_memory.generic_bytes(address, 128))


def _coordinates(unit, operand, lane: int) -> list[int]:
    values = (int(operand_values(unit, c)[lane]) & 0xFFFFFFFF for c in operand.coordinates)
    return [value - (value >> 31 << 32) for value in values]


def _targets(block, unit, lane: int, start: int, where: int, mask) -> list[tuple[int, int]]:
    """Return the addresses of destination and mbarrier: one pair, or one a block of the mask."""
    if mask is None:
        return [(start, where)]
    bits = int(operand_values(unit, mask, "H")[lane]) & 0xFFFF
    offsets = [x & ((1 << CLUSTER_BITS) - 1) for x in (start, where)]
    ranks = [rank for rank in range(16) if bits >> rank & 1]
    return [
        (rank << CLUSTER_BITS | offsets[0], rank << CLUSTER_BITS | offsets[1]) for rank in ranks
    ]


def _require_aligned(address: int, nbytes: int, what: str) -> None:
    if address % nbytes:
        raise MisalignedAccess(f"{what} {address:#x} is not a multiple of {nbytes}")


def _into_shared(block, unit, lane: int, instruction, start: int, nbytes: int, where: int, effect):
    """Issue a load: checks, poison, completion on the mbarrier at ``where``.

    effect(block, offset) puts the data there.
    """
    target, low = block.owner_of(start)
    target.shared.check(low, low + nbytes)
    agent = block.first_agent + unit.lanes.threads[lane : lane + 1] // 32
    barrier = find_mbarrier(block, unit, instruction, where, agent)
    if barrier.unfenced_warp >= 0:
        block.hazards.report(
            instruction,
            f"no fence.mbarrier_init since mbarrier.init of {where:#x}",
            int(agent[0]) - block.first_agent,
        )
    target.hazards.check_overlap(instruction, low, low + nbytes, True, unit.lanes.warps)
    if target.hazards.shadow is not None:
        conflict = target.hazards.shadow.bulk_write(
            int(agent[0]), low, low + nbytes, barrier.agent, barrier.phase + 1, instruction.line
        )
        if conflict:
            block.hazards.report_conflict(instruction, conflict, True)
    access = SharedAccess(low, low + nbytes, True, barrier, instruction.where())
    target.hazards.accesses.add(access)
    target.shared.bytes[low : low + nbytes] = POISON

    def complete() -> None:
        effect(target, low)
        target.hazards.accesses.remove(access)
        barrier.complete(nbytes)

    if block.trace:
        block.trace.bulk_load(agent.tolist(), instruction, nbytes, barrier)
    block.events.issue(complete, instruction.where())


def _out_of_shared(block, unit, lane: int, instruction, start: int, nbytes: int, read, write):
    """Issue a store, which reads before wait_group.read and writes before wait_group.

    read(block, offset) gives the data, write(data) puts it into global memory.
    """
    low = start - block.window
    block.shared.check(low, low + nbytes)
    thread = int(unit.lanes.threads[lane])
    warps = np.array([thread // 32])
    pieces = slice(low >> 4, -(-(low + nbytes) // 16))
    block.hazards.check_bulk_read(instruction, warps, pieces)
    block.hazards.check_overlap(instruction, low, low + nbytes, False, warps)
    groups = block.bulk_groups(thread)
    access = SharedAccess(low, low + nbytes, False, groups, instruction.where())
    block.hazards.accesses.add(access)

    def take() -> None:
        data = read(block, low)
        event.written = block.events.issue(lambda: write(data), instruction.where())

    event = Event(0, take, instruction.where())
    block.events.schedule_event(event)
    event.access = access
    groups.open.append(event)
    if block.trace:
        block.trace.bulk_store([block.first_agent + thread // 32], instruction, nbytes)


_TENSOR = {
    "async", "bulk", "tensor", "1d", "2d", "3d", "4d", "5d", "shared::cta", "shared::cluster",
    "global", "tile", "mbarrier::complete_tx::bytes", "bulk_group", "L2::cache_hint",
    "multicast::cluster",
}  # fmt: skip


@control("cp.async.bulk.tensor")
def _tensor(instruction: Instruction):
    refuse_unknown(instruction, _TENSOR)
    if "bulk_group" in instruction.parts:
        return _tensor_store(instruction, "")
    target, source, barrier = instruction.operands[:3]
    mask = instruction.operands[3] if "multicast::cluster" in instruction.parts else None

    def run(block, unit) -> bool:
        for lane in range(unit.lanes.count):
            tile = Tile(_read_map(block, unit, source, lane), _coordinates(unit, source, lane))
            start = int(shared_addresses(unit, target)[lane])
            where = int(shared_addresses(unit, barrier)[lane])
            _require_aligned(start, 128, "TMA destination")

            def effect(other, low, tile=tile) -> None:
                index = chunk_index(low, tile.map.box_bytes, tile.map.swizzle)
                other.shared.chunks[index] = tile.read(block.launch.memory)

            for place, signal in _targets(block, unit, lane, start, where, mask):
                nbytes = tile.map.box_bytes
                _into_shared(block, unit, lane, instruction, place, nbytes, signal, effect)
        return True

    return run


def _tensor_store(instruction: Instruction, reduction: str):
    target, source = instruction.operands[:2]

    def run(block, unit) -> bool:
        for lane in range(unit.lanes.count):
            tile = Tile(_read_map(block, unit, target, lane), _coordinates(unit, target, lane))
            start = int(shared_addresses(unit, source)[lane])
            _require_aligned(start, 128, "TMA source")

            def read(own, low, tile=tile) -> np.ndarray:
                return own.shared.chunks[chunk_index(low, tile.map.box_bytes, tile.map.swizzle)]

            def write(data, tile=tile) -> None:
                tile.write(block.launch.memory, data, reduction, tile.map.element)

            nbytes = tile.map.box_bytes
            _out_of_shared(block, unit, lane, instruction, start, nbytes, read, write)
        return True

    return run


@control("cp.reduce.async.bulk.tensor")
def _tensor_reduce(instruction: Instruction):
    refuse_unknown(instruction, (_TENSOR | REDUCTIONS.keys() | {"reduce"}) - {"shared::cluster"})
    return _tensor_store(instruction, _reduction(instruction))


def _reduction(instruction: Instruction) -> str:
    found = [part for part in instruction.parts if part in REDUCTIONS]
    if len(found) != 1:
        raise instruction.unknown(instruction.opcode)
    return found[0]


@control("cp.async.bulk", "cp.reduce.async.bulk")
def _plain(instruction: Instruction):
    parts, operands = instruction.parts, instruction.operands
    reduces = parts[1] == "reduce"
    known = _TENSOR | (REDUCTIONS.keys() | _DTYPES.keys() | {"reduce", "noftz", "bf16"})
    refuse_unknown(instruction, known if reduces else _TENSOR)
    reduction = _reduction(instruction) if reduces else ""
    kind = parts[-1] if reduction else ""
    loads = "mbarrier::complete_tx::bytes" in parts
    local_source = loads and "shared::cta" in parts and "global" not in parts
    mask = operands[4] if "multicast::cluster" in parts else None
    dtype = np.uint16 if kind == "bf16" else _DTYPES.get(kind, np.uint8)

    def run(block, unit) -> bool:
        sizes = operand_values(unit, operands[2])
        for lane in range(unit.lanes.count):
            nbytes = int(sizes[lane])
            remote, local = operands[1 if loads else 0], operands[0 if loads else 1]
            start = int(shared_addresses(unit, local)[lane])
            if local_source:
                address = int(shared_addresses(unit, remote)[lane]) - block.window
            else:
                address = int(operand_values(unit, remote.base, "W")[lane]) + remote.offset
            if nbytes % 16 or address % 16 or start % 16:
                raise MisalignedAccess("bulk copy: addresses and size must be multiples of 16")

            def load(other, low, address=address, nbytes=nbytes) -> None:
                if local_source:
                    data = block.shared.bytes[address : address + nbytes]
                else:
                    data = block.launch.memory.box(address, (nbytes,), (1,), 1, False)
                place = other.shared.bytes[low : low + nbytes].view(dtype)
                reduce_into(place, np.ascontiguousarray(data).view(dtype), reduction, kind)

            def read(own, low, nbytes=nbytes) -> np.ndarray:
                return own.shared.bytes[low : low + nbytes].copy()

            def write(data, address=address, nbytes=nbytes) -> None:
                place = block.launch.memory.box(address, (nbytes,), (1,), 1, True)
                reduce_into(place.view(dtype), data.view(dtype), reduction, kind)

            if loads:
                if local_source:
                    block.shared.check(address, address + nbytes)
                    pieces = slice(address >> 4, (address + nbytes) >> 4)
                    block.hazards.check_bulk_read(instruction, unit.lanes.warps, pieces)
                where = int(shared_addresses(unit, operands[3])[lane])
                for place, signal in _targets(block, unit, lane, start, where, mask):
                    _into_shared(block, unit, lane, instruction, place, nbytes, signal, load)
            else:
                _out_of_shared(block, unit, lane, instruction, start, nbytes, read, write)
        return True

    return run


@control("st.async", "red.async")
def _store_async(instruction: Instruction):
    """Translate stores to another block of the cluster, whose mbarrier counts their bytes."""
    known = {"st", "red", "async", "weak", "relaxed", "cluster", "shared::cluster", "v2", "v4",
             "mbarrier::complete_tx::bytes", "add", "min", "max", "and", "or", "xor"}  # fmt: skip
    refuse_unknown(instruction, known | TYPES)
    kind = instruction.parts[-1].replace("b", "u", 1)
    dtype = np.dtype(_DTYPES[kind])
    reduction = _reduction(instruction) if instruction.parts[0] == "red" else ""
    target, source, barrier = instruction.operands
    items = source.items if isinstance(source, Vector) else (source,)
    view = "W" if dtype.itemsize == 8 else "U"

    def run(block, unit) -> bool:
        lanes = unit.lanes
        places, signals = shared_addresses(unit, target), shared_addresses(unit, barrier)
        values = [operand_values(unit, x, view).copy() for x in items]
        nbytes = dtype.itemsize * len(items)
        for lane in range(lanes.count):
            other, low = block.owner_of(int(places[lane]))
            other.shared.index(np.array([low]), dtype.itemsize, nbytes)
            agent = block.first_agent + lanes.threads[lane : lane + 1] // 32
            signal = find_mbarrier(block, unit, instruction, int(signals[lane]), agent)
            shadow = other.hazards.shadow
            if shadow is not None:
                units = shadow.units(np.array([low]), nbytes)
                phase = signal.phase + 1
                conflict = shadow.remote_write(agent, units, instruction.line, signal.agent, phase)
                if conflict:
                    block.hazards.report_conflict(instruction, conflict, True)
            data = np.array([value[lane] for value in values]).view(dtype)

            def effect(other=other, low=low, data=data, signal=signal) -> None:
                place = other.shared.bytes[low : low + nbytes].view(dtype)
                reduce_into(place, data, reduction, kind)
                signal.complete(nbytes)

            if block.trace:
                block.trace.bulk_load(agent.tolist(), instruction, nbytes, signal)
            block.events.issue(effect, instruction.where())
        return True

    return run


@control("cp.async.bulk.prefetch")
def _prefetch(instruction: Instruction):
    return lambda block, unit: True


# ------------------------------------------------------------------------------------- bulk groups


@control("cp.async.bulk.commit_group")
def _commit(instruction: Instruction):
    refuse_unknown(instruction, {"async", "bulk", "commit_group"})

    def run(block, unit) -> bool:
        for thread in unit.lanes.threads:
            if int(thread) in block.bulk:
                block.bulk[int(thread)].commit()
        return True

    return run


@control("cp.async.bulk.wait_group")
def _wait(instruction: Instruction):
    """Translate the wait: for reads of shared memory with .read, else for writes, too."""
    refuse_unknown(instruction, {"async", "bulk", "wait_group", "read"})
    keep, only_read = instruction.operands[0].value, "read" in instruction.parts

    def run(block, unit) -> bool:
        for thread in unit.lanes.threads.tolist():
            groups = block.bulk.get(thread)
            if groups is None:
                continue
            for access in groups.wait(keep, only_read):
                block.hazards.accesses.remove(access)
                shadow = block.hazards.shadow
                if shadow is not None:
                    agents = np.array([block.first_agent + thread // 32])
                    now = shadow.clocks.now(agents)
                    shadow.past_reads.add(access.low, access.high, agents, now, access.text)
            if block.trace:
                block.trace.bulk_wait([block.first_agent + thread // 32], keep)
        return True

    return run
