"""The tensor core's asynchronous products: operands in shared memory and registers, commit groups.

An mma_async records its operands and poisons its accumulators; the products of one commit group
into the same accumulators are one matrix product when the group takes effect.  Layouts, from the
PTX documentation's figures (T elements to 16 bytes, addresses before the swizzle):

    K-major   row r, 16-byte unit c of the instruction's 32 bytes of K:
              start + r % 8 * span + r // 8 * SBO + c * (16, or LBO without swizzle)
    MN-major  unit j of T columns, k:  start + j % (span / 16) * 16 + j // (span / 16) * LBO
              + k % 8 * span + k // 8 * SBO
              (without swizzle: start + j * SBO + k % 8 * 16 + k // 8 * LBO)
    D         register i of lane l, warp w: row 16 w + l // 4 + 8 (i // 2 % 2),
              column 8 (i // 4) + 2 (l % 4) + i % 2
    A in registers (16-bit; 8-bit with four elements a register and twice the columns): register j:
              row 16 w + l // 4 + 8 (j % 2), columns 8 (j // 2) + 2 (l % 4) + {0, 1}

Products and sums are f32; ``Options.fp8_accumulator_bits`` cuts the sums of fp8 products as Hopper
does.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hopper_attention.simulator.errors import SimulatorError
from hopper_attention.simulator.hardware.asynchronous import Event, Events
from hopper_attention.simulator.hardware.formats import ELEMENT_BYTES, FP8
from hopper_attention.simulator.hardware.memory import SharedMemory
from hopper_attention.simulator.hardware.tensor_map import swizzle_address
from hopper_attention.simulator.hazards.checks import Hazards, SharedAccess
from hopper_attention.simulator.ptx.parser import Instruction, Register, Vector

_SPANS = {0: 0, 1: 128, 2: 64, 3: 32}
CANONICAL_NAN = 0x7FFFFFFF
"""The NaN of tensor cores, which take over neither sign nor payload, as far as is known."""
_NAN = 0xFFFFFFFF
_ONE_THREAD = 1 << 18  # multiplications of a product up to which OpenBLAS uses one thread


@dataclass(frozen=True)
class Descriptor:
    """A matrix descriptor of shared memory, in bytes."""

    start: int
    leading: int
    stride: int
    span: int

    @staticmethod
    def decode(bits: int) -> "Descriptor":
        if bits >> 49 & 7:
            raise SimulatorError(f"wgmma descriptor {bits:#x}: base offset is not implemented")
        return Descriptor(
            start=(bits & 0x3FFF) << 4,
            leading=(bits >> 16 & 0x3FFF) << 4,
            stride=(bits >> 32 & 0x3FFF) << 4,
            span=_SPANS[bits >> 62],
        )


@functools.lru_cache(maxsize=8192)
def operand_index(bits: int, extent: int, width: int, mn_major: bool) -> np.ndarray:
    """Return the numbers of the 16-byte units of one instruction's operand.

    K-major: (extent, 2); MN-major: (elements of K, extent in units).
    """
    d = Descriptor.decode(bits)
    if not mn_major:
        row, unit = np.arange(extent)[:, None], np.arange(2)[None, :]
        step = 16 if d.span else d.leading
        address = d.start + row % 8 * (d.span or 16) + row // 8 * d.stride + unit * step
    else:
        k, unit = np.arange(32 // width)[:, None], np.arange(extent * width // 16)[None, :]
        if d.span:
            n = d.span // 16
            address = d.start + unit % n * 16 + unit // n * d.leading
            address = address + k % 8 * d.span + k // 8 * d.stride
        else:
            address = d.start + unit * d.stride + k % 8 * 16 + k // 8 * d.leading
    return swizzle_address(address, d.span) >> 4


@functools.lru_cache(maxsize=8192)
def chain_index(bits: tuple[int, ...], extent: int, width: int, mn_major: bool) -> np.ndarray:
    """Return ``operand_index`` of several instructions side by side along K."""
    parts = [operand_index(b, extent, width, mn_major) for b in bits]
    return np.concatenate(parts, axis=0 if mn_major else 1)


def widen(raw: np.ndarray, kind: str) -> np.ndarray:
    """Convert bytes of elements, contiguous along the last axis, to float32 (integers: float64)."""
    if kind == "bf16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float32)
    if kind == "tf32":
        return (raw.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    if kind in ("s8", "u8"):
        return raw.view(np.int8 if kind == "s8" else np.uint8).astype(np.float64)
    return FP8[kind].take(raw.view(np.uint8))


def fragment_a(registers: np.ndarray, kind: str) -> np.ndarray:
    """Arrange (4 steps, 128) registers of A as the (64, K) matrix."""
    steps = len(registers) // 4
    split = registers.reshape(steps, 2, 2, 4, 8, 4)  # step, column half, row half, warp, row, quad
    matrix = np.ascontiguousarray(split.transpose(3, 2, 4, 0, 1, 5))
    return widen(matrix.reshape(64, steps * 8).view(np.uint8), kind)


def fragment_d(matrix: np.ndarray) -> np.ndarray:
    """Arrange a (64, N) matrix as (N / 2, 128) accumulator registers."""
    n = matrix.shape[1]
    split = matrix.reshape(4, 2, 8, n // 8, 4, 2)  # warp, row half, row, column block, quad, pair
    return split.transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, 128)


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multiply (64, K) by (K, N) in pieces that OpenBLAS does not spread over threads.

    Its threads wait by spinning, which costs a factor of ten on a busy block, and their number
    changes the last bits.
    """
    k, n = b.shape
    width = max(8, (_ONE_THREAD // (64 * k)) // 8 * 8)
    result = np.empty((64, n), a.dtype)
    for start in range(0, n, width):
        part = slice(start, start + width)
        np.matmul(a, b[:, part], out=result[:, part])
    return result


@dataclass(eq=False)
class Shape:
    """The static part of one mma_async."""

    instruction: Instruction
    n: int
    kinds: tuple[str, str]
    half: bool  # f16 accumulators
    accumulator: tuple[Register, ...]
    a: Any
    b: Register
    scale_d: Any
    sign: float
    a_mn_major: bool
    b_mn_major: bool
    rows: Any = None
    a_rows: Any = None
    mask: int = 0
    a_mask: int = 0

    def number(self) -> None:
        """Look up register rows once they are given out."""
        self.rows = _rows(self.accumulator)
        self.mask = _mask(self.accumulator)
        if isinstance(self.a, Vector):
            self.a_rows = _rows(self.a.items)
            self.a_mask = _mask(self.a.items)


def _rows(registers: tuple[Register, ...]):
    rows = [register.index for register in registers]
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return np.array(rows)


def _mask(registers: tuple[Register, ...]) -> int:
    return sum(1 << index for index in {register.index for register in registers})


@dataclass(eq=False)
class Issued:
    """One mma_async under way."""

    shape: Shape
    a: Any  # descriptor bits, or the (4, 128) registers
    b: int
    accumulate: bool


@dataclass(eq=False)
class Group:
    """A commit group."""

    items: list[Issued] = field(default_factory=list)
    accesses: list[SharedAccess] = field(default_factory=list)
    event: Event | None = None


class Queue:
    """The asynchronous products of one warpgroup, whose 32-bit registers they read and write."""

    def __init__(
        self,
        registers: np.ndarray,
        shared: SharedMemory,
        events: Events,
        hazards: Hazards,
        first_agent: int,
        fp8_accumulator_bits: int | None,
    ):
        self.registers, self.shared, self.events = registers, shared, events
        self.hazards, self.fp8_accumulator_bits = hazards, fp8_accumulator_bits
        self.agents = np.arange(first_agent, first_agent + 4)
        self.open = Group()
        self.groups: list[Group] = []
        self.values: dict[tuple, np.ndarray] = {}
        self.using: dict[tuple, int] = {}
        self.accumulators = 0  # register masks of everything not waited for
        self.operands = 0

    def _update_masks(self) -> None:
        self.accumulators = self.operands = 0
        for group in (*self.groups, self.open):
            for item in group.items:
                self.accumulators |= item.shape.mask
                self.operands |= item.shape.a_mask

    def issue(self, shape: Shape, a, b: int, accumulate: bool) -> None:
        key = shape.accumulator
        if key not in self.values:
            if self.accumulators & shape.mask and self._overlaps(shape):
                self.hazards.report(
                    shape.instruction,
                    "accumulators overlap those of a different shape under way",
                    self.agents - self.hazards.first_agent,
                )
            self.values[key] = self.registers[shape.rows].copy()
            self.using[key] = 0
            self.registers[shape.rows] = _NAN
        self.using[key] += 1
        self.open.items.append(Issued(shape, a, b, accumulate))
        self.accumulators |= shape.mask
        self.operands |= shape.a_mask

    def _overlaps(self, shape: Shape) -> bool:
        return any(
            item.shape.mask & shape.mask and item.shape.accumulator != shape.accumulator
            for group in (*self.groups, self.open)
            for item in group.items
        )

    def commit(self) -> None:
        group, self.open = self.open, Group()
        self.groups.append(group)
        group.event = self.events.issue(lambda: self._complete_through(group), "wgmma commit group")

    def _complete_through(self, group: Group) -> None:
        """Compute a group after those before it: they take effect in order."""
        for earlier in self.groups:
            if earlier is group:
                break
            if earlier.event is not None:
                earlier.event.complete()
        self._compute(group)

    def wait(self, keep: int) -> None:
        count = max(0, len(self.groups) - keep)
        for group in self.groups[:count]:
            group.event.complete()
            for access in group.accesses:
                self.hazards.accesses.remove(access)
            self._remember_reads(group)
        del self.groups[:count]
        self._update_masks()

    def _remember_reads(self, group: Group) -> None:
        """Note who knows that the group has read: one warp's wait covers the whole warpgroup."""
        shadow = self.hazards.shadow
        if shadow is None:
            return
        now = self.hazards.clocks.now(self.agents)
        for low, high, warp, text in {(a.low, a.high, a.warp, a.text) for a in group.accesses}:
            chosen = slice(None) if warp is None else slice(warp, warp + 1)
            shadow.past_reads.add(low, high, self.agents[chosen], now[chosen], text)

    def _compute(self, group: Group) -> None:
        start = 0
        items = group.items
        while start < len(items):
            stop = start + 1
            first = items[start].shape
            while stop < len(items) and items[stop].accumulate and _like(first, items[stop].shape):
                stop += 1
            self._product(items[start:stop])
            start = stop

    def _product(self, chain: list[Issued]) -> None:
        shape, shared = chain[0].shape, self.shared
        a_kind, b_kind = shape.kinds
        if shape.a_rows is not None:
            a = fragment_a(np.concatenate([item.a for item in chain]), a_kind)
        else:
            a = _gather(shared, tuple(i.a for i in chain), 64, a_kind, shape.a_mn_major)
            a = a.T if shape.a_mn_major else a
        b = _gather(shared, tuple(item.b for item in chain), shape.n, b_kind, shape.b_mn_major)
        right = b if shape.b_mn_major else b.T
        key = shape.accumulator
        bits = self.fp8_accumulator_bits
        pieces = [slice(None)]
        if bits is not None and a_kind in FP8:
            step = a.shape[1] // len(chain)
            pieces = [slice(k, k + step) for k in range(0, a.shape[1], step)]
        add = chain[0].accumulate
        for piece in pieces:
            product = fragment_d(multiply(a[:, piece], right[piece]))
            if shape.sign < 0:
                product = -product
            self.values[key] = accumulate(self.values[key], product, add, shape)
            if bits is not None and a_kind in FP8 and not shape.half:
                self.values[key] &= np.uint32(0xFFFFFFFF << (24 - bits) & 0xFFFFFFFF)
            add = True
        self.using[key] -= len(chain)
        if self.using[key] == 0:
            self.registers[shape.rows] = self.values.pop(key)
            del self.using[key]


def _like(a: Shape, b: Shape) -> bool:
    return a.accumulator == b.accumulator and (a.kinds, a.sign, a.a_mn_major, a.b_mn_major) == (
        b.kinds, b.sign, b.a_mn_major, b.b_mn_major,
    ) and (a.a_rows is None) == (b.a_rows is None)  # fmt: skip


def _gather(shared, bits: tuple[int, ...], extent: int, kind: str, mn_major: bool) -> np.ndarray:
    """Return an operand from shared memory: (extent, K), or (K, extent) if MN-major."""
    index = chain_index(bits, extent, ELEMENT_BYTES[kind], mn_major)
    raw = shared.chunks.take(index)
    return widen(raw.view(np.uint8), kind)


def accumulate(bits: np.ndarray, product: np.ndarray, add: bool, shape: Shape) -> np.ndarray:
    """Return the new accumulator registers, as uint32."""
    if shape.kinds[0] in ("s8", "u8"):
        total = product.astype(np.int64) + (bits.view(np.int32) if add else 0)
        return total.astype(np.int32).view(np.uint32)
    if not shape.half:
        total = bits.view(np.float32) + product if add else product
        return np.where(np.isnan(total), np.uint32(CANONICAL_NAN), total.view(np.uint32))
    if add:
        product = product.copy()
        product[0::2] += (bits & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16)
        product[1::2] += (bits >> np.uint32(16)).astype(np.uint16).view(np.float16)
    packed = product.astype(np.float16).view(np.uint16).astype(np.uint32)
    return packed[0::2] | packed[1::2] << np.uint32(16)
