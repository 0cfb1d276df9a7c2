"""Bulk asynchronous copies: TMA tensor loads, stores and reductions, and plain bulk copies."""

import functools

import numpy as np

from ..asynchronous import SharedAccess
from ..errors import MisalignedAccess, SimulatorError
from ..memory import POISON
from ..ptx import Instruction
from ..tensor_map import TensorMap, decode, swizzle_address
from . import control
from .conversion import bf16_bits, widen_bf16
from .synchronisation import operand_values, shared_addresses

_DTYPES = {
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "f16": np.float16,
    "f32": np.float32, "f64": np.float64, "s32": np.int32, "s64": np.int64,
}  # fmt: skip


@functools.lru_cache(maxsize=8192)
def chunk_index(start: int, nbytes: int, swizzle: int) -> np.ndarray:
    """Numbers of the 16-byte units of shared memory that hold a tile, in the tile's order."""
    addresses = np.arange(start, start + nbytes, 16)
    return swizzle_address(addresses, swizzle) >> 4


class Tile:
    """A tensor map's box at given coordinates: what lies inside of the tensor, and where."""

    def __init__(self, tensor_map: TensorMap, coordinates: list[int]):
        if any(stride != 1 for stride in tensor_map.element_strides):
            raise SimulatorError("TMA with element strides other than 1")
        row = tensor_map.box[0] * tensor_map.element_bytes
        if row % 16 or (tensor_map.swizzle and row != tensor_map.swizzle):
            raise SimulatorError(
                f"TMA box of {row} bytes a row with swizzle {tensor_map.swizzle} is not implemented"
            )
        self.map = tensor_map
        self.shape = tensor_map.box[::-1]
        self.start = coordinates[::-1]
        self.inner, self.outer = [], []
        sizes = tensor_map.sizes[::-1]
        for at, extent, size in zip(self.start, self.shape, sizes, strict=True):
            low, high = max(0, -at), min(extent, size - at)
            self.inner.append(slice(low, max(low, high)))
            self.outer.append(slice(max(0, at), max(0, at + high)))
        self.empty = any(s.start >= s.stop for s in self.inner)
        self.whole = all(
            s.start == 0 and s.stop == n for s, n in zip(self.inner, self.shape, strict=True)
        )

    def tensor(self, memory, write: bool) -> np.ndarray:
        """The part of the tensor inside of the box, as an array over global memory."""
        m = self.map
        offset = sum(s.start * n for s, n in zip(self.outer, m.strides[::-1], strict=True))
        sizes = tuple(s.stop - s.start for s in self.outer)
        return memory.box(m.base + offset, sizes, m.strides[::-1], m.element_bytes, write)

    def read(self, memory) -> np.ndarray:
        """The box's bytes as 16-byte units, zeros outside of the tensor."""
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
    """target = data, or target = target (+, min, max) data in the element type."""
    if not reduction:
        target[...] = data
        return
    if kind == "bf16":
        total = widen_bf16(np.ascontiguousarray(target)) + widen_bf16(np.ascontiguousarray(data))
        target[...] = bf16_bits(total)
        return
    ufunc = {"add": np.add, "min": np.minimum, "max": np.maximum}[reduction]
    dtype = _DTYPES["f32" if kind == "tf32" else kind]
    ufunc(target.view(dtype), data.view(dtype), out=target.view(dtype))


def _modifiers(instruction: Instruction, known: set[str]) -> None:
    for part in instruction.parts[3:]:
        if part not in known:
            raise instruction.unknown(f"modifier .{part}")


def _read_map(machine, unit, operand, lane: int) -> TensorMap:
    address = int(operand_values(unit, operand.base, "W")[lane]) + operand.offset
    return decode(machine.generic_bytes(address, 128))


@control("cp.async.bulk.tensor")
def _tensor(instruction: Instruction):
    parts = instruction.parts
    _modifiers(
        instruction,
        {
            "tensor", "1d", "2d", "3d", "4d", "5d", "shared::cta", "shared::cluster", "global",
            "tile", "mbarrier::complete_tx::bytes", "bulk_group", "L2::cache_hint",
        },
    )  # fmt: skip
    if "bulk_group" in parts:
        return _tensor_store(instruction, "")
    target, source, barrier = instruction.operands[:3]

    def run(machine, unit) -> bool:
        for lane in range(unit.lanes.count):
            coordinates = [
                int(np.int32(np.uint32(int(operand_values(unit, c)[lane]) & 0xFFFFFFFF)))
                for c in source.coordinates
            ]
            tensor_map = _read_map(machine, unit, source, lane)
            tile = Tile(tensor_map, coordinates)
            start = int(shared_addresses(unit, target)[lane])
            where = int(shared_addresses(unit, barrier)[lane])
            load_tile(machine, instruction, tile, start, where)
        return True

    return run


def load_tile(machine, instruction: Instruction, tile: Tile, start: int, where: int) -> None:
    nbytes = tile.map.box_bytes
    if start % 128:
        raise MisalignedAccess(f"TMA destination {start:#x} is not a multiple of 128")
    index = chunk_index(start, nbytes, tile.map.swizzle)

    def effect() -> None:
        machine.shared.chunks[index] = tile.read(machine.memory)

    _into_shared(machine, instruction, start, nbytes, where, effect)


def _into_shared(machine, instruction, start: int, nbytes: int, where: int, effect) -> None:
    """Common part of loads: checks, poison, completion on the mbarrier at ``where``."""
    machine.shared.check(start, start + nbytes)
    barrier = machine.mbarrier(where)
    if barrier.unfenced_warp >= 0:
        machine.hazard(instruction, f"no fence.mbarrier_init since mbarrier.init of {where:#x}")
    machine.check_shared(instruction, start, start + nbytes, True)
    access = SharedAccess(start, start + nbytes, True, barrier, instruction.where())
    machine.accesses.add(access)
    machine.shared.bytes[start : start + nbytes] = POISON

    def complete() -> None:
        effect()
        machine.accesses.remove(access)
        barrier.complete(nbytes)

    machine.events.issue(complete, instruction.where())


def _out_of_shared(machine, unit, lane: int, instruction, start: int, nbytes: int, effect) -> None:
    """Common part of stores: the proxy fence, then reading at some time before the wait."""
    machine.shared.check(start, start + nbytes)
    machine.check_fenced(instruction, slice(start >> 4, -(-(start + nbytes) // 16)))
    machine.check_shared(instruction, start, start + nbytes, False)
    groups = machine.bulk_groups(int(unit.lanes.threads[lane]))
    access = SharedAccess(start, start + nbytes, False, groups, instruction.where())
    machine.accesses.add(access)
    event = machine.events.issue(effect, instruction.where())
    event.access = access
    groups.open.append(event)


def _tensor_store(instruction: Instruction, reduction: str):
    target, source = instruction.operands[:2]

    def run(machine, unit) -> bool:
        for lane in range(unit.lanes.count):
            coordinates = [
                int(np.int32(np.uint32(int(operand_values(unit, c)[lane]) & 0xFFFFFFFF)))
                for c in target.coordinates
            ]
            tile = Tile(_read_map(machine, unit, target, lane), coordinates)
            start = int(shared_addresses(unit, source)[lane])
            if start % 128:
                raise MisalignedAccess(f"TMA source {start:#x} is not a multiple of 128")
            index = chunk_index(start, tile.map.box_bytes, tile.map.swizzle)

            def effect(tile=tile, index=index) -> None:
                chunks = machine.shared.chunks[index]
                tile.write(machine.memory, chunks, reduction, tile.map.element)

            _out_of_shared(machine, unit, lane, instruction, start, tile.map.box_bytes, effect)
        return True

    return run


@control("cp.reduce.async.bulk.tensor")
def _tensor_reduce(instruction: Instruction):
    reduction = next((p for p in instruction.parts if p in ("add", "min", "max")), None)
    if reduction is None:
        raise instruction.unknown(instruction.opcode)
    return _tensor_store(instruction, reduction)


@control("cp.async.bulk", "cp.reduce.async.bulk")
def _plain(instruction: Instruction):
    parts, operands = instruction.parts, instruction.operands
    reduction = next((p for p in parts if p in ("add", "min", "max")), "")
    kind = parts[-1] if reduction else ""
    if reduction and kind not in (*_DTYPES, "bf16"):
        raise instruction.unknown(instruction.opcode)
    loads = any(p.startswith("mbarrier::complete_tx") for p in parts)
    if loads and "multicast::cluster" in parts:
        raise instruction.unknown("multicast")

    def run(machine, unit) -> bool:
        sizes = operand_values(unit, operands[2])
        for lane in range(unit.lanes.count):
            nbytes = int(sizes[lane])
            remote, local = operands[1 if loads else 0], operands[0 if loads else 1]
            address = int(operand_values(unit, remote.base, "W")[lane]) + remote.offset
            start = int(shared_addresses(unit, local)[lane])
            if nbytes % 16 or address % 16 or start % 16:
                raise MisalignedAccess("bulk copy: addresses and size must be multiples of 16")
            view = slice(start, start + nbytes)
            dtype = np.uint16 if kind == "bf16" else _DTYPES.get(kind, np.uint8)

            def load(address=address, nbytes=nbytes, view=view) -> None:
                machine.shared.bytes[view] = machine.memory.box(address, (nbytes,), (1,), 1, False)

            def store(address=address, nbytes=nbytes, view=view, dtype=dtype) -> None:
                target = machine.memory.box(address, (nbytes,), (1,), 1, True)
                data = machine.shared.bytes[view].view(dtype)
                reduce_into(target.view(dtype), data, reduction, kind)

            if loads:
                where = int(shared_addresses(unit, operands[3])[lane])
                _into_shared(machine, instruction, start, nbytes, where, load)
            else:
                _out_of_shared(machine, unit, lane, instruction, start, nbytes, store)
        return True

    return run


@control("cp.async.bulk.commit_group")
def _commit(instruction: Instruction):
    def run(machine, unit) -> bool:
        for thread in unit.lanes.threads:
            if int(thread) in machine.bulk:
                machine.bulk[int(thread)].commit()
        return True

    return run


@control("cp.async.bulk.wait_group")
def _wait(instruction: Instruction):
    """With or without .read: reading and writing take effect together here."""
    keep = instruction.operands[0].value

    def run(machine, unit) -> bool:
        for thread in unit.lanes.threads:
            groups = machine.bulk.get(int(thread))
            if groups is not None:
                for event in groups.wait(keep):
                    machine.accesses.remove(event.access)
        return True

    return run
