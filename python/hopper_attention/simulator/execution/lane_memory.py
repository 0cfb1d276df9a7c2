"""Memory as the lanes of one block see it: loads, stores, atomics, matrices in every state space.

A shared memory address has a block's rank in the cluster above the offset, so that lanes reach the
memory of the cluster's other blocks, too.  Every access is checked: bounds, alignment, hazards.
"""

import numpy as np

from hopper_attention.simulator.errors import OutOfBounds, SimulatorError
from hopper_attention.simulator.execution.lanes import Lanes
from hopper_attention.simulator.hardware.formats import bf16_bits
from hopper_attention.simulator.hardware.memory import (
    CLUSTER_BITS,
    LOCAL_WINDOW,
    PARAM_WINDOW,
    REDUCTIONS,
    SHARED_WINDOW,
    GlobalMemory,
    LocalMemory,
    SharedMemory,
)
from hopper_attention.simulator.hazards.checks import Hazards

_OFFSET = (1 << CLUSTER_BITS) - 1


class LaneMemory:
    """The memory of one block, which checks and locates each access.

    peers: the memories of all blocks of the cluster, by rank.
    """

    def __init__(
        self,
        rank: int,
        params: np.ndarray,
        global_memory: GlobalMemory,
        shared: SharedMemory,
        local: LocalMemory,
        hazards: Hazards,
    ):
        self.rank, self.params, self.global_memory = rank, params, global_memory
        self.shared, self.local, self.hazards = shared, local, hazards
        self.window = rank << CLUSTER_BITS  # added to the addresses of shared variables
        self.peers = [self]
        self.closed = False

    def start(self, peers: list["LaneMemory"]) -> None:
        """Begin another block, beside these: memory is NaN."""
        self.peers, self.closed = peers, False
        self.shared.reset()
        self.local.reset()

    def owner_of(self, address: int) -> tuple["LaneMemory", int]:
        """Return the memory that a shared::cluster address lies in, and the offset there."""
        rank = int(address) >> CLUSTER_BITS
        if rank >= len(self.peers):
            raise OutOfBounds(
                f"shared::cluster address {address:#x}: no block {rank} in the cluster"
            )
        owner = self.peers[rank]
        if owner is not self and owner.closed:
            raise OutOfBounds(
                f"shared memory of block {owner.hazards.ctaid}, whose threads have all exited"
            )
        return owner, int(address) & _OFFSET

    # --- parameters

    def param(self, offset: int, dtype: type) -> np.generic:
        """Return the parameter at an offset that all lanes agree on."""
        size = np.dtype(dtype).itemsize
        return self.params[offset : offset + size].view(dtype)[0]

    def param_lanes(self, addresses: np.ndarray, width: int, count: int) -> list[np.ndarray]:
        """Load parameters at addresses that differ among lanes; returns one array an element."""
        offsets = np.asarray(addresses).astype(np.int64) % PARAM_WINDOW
        if offsets.min() < 0 or offsets.max() + width * count > len(self.params):
            raise OutOfBounds(f"parameter access at {int(offsets.max()):#x}")
        table = self.params[offsets[:, None] + np.arange(width * count)]
        return list(np.ascontiguousarray(table).view(f"u{width}").T)

    def generic_bytes(self, address: int, nbytes: int) -> bytes:
        """Return the bytes at a generic address, of parameters, shared or global memory."""
        offset = address - PARAM_WINDOW if address >= PARAM_WINDOW else address
        if 0 <= offset <= len(self.params) - nbytes:
            return self.params[offset : offset + nbytes].tobytes()
        if address >= SHARED_WINDOW:
            owner, start = self.owner_of(address - SHARED_WINDOW)
            owner.shared.check(start, start + nbytes)
            return owner.shared.bytes[start : start + nbytes].tobytes()
        return self.global_memory.box(address, (nbytes,), (1,), 1, False).tobytes()

    # --- loads and stores

    def _parts(self, lanes: Lanes, space: str, addresses: np.ndarray):
        """Yield where lanes' accesses go: (owner, lane selection, offsets).

        The owner is None for global memory, a LocalMemory, or the LaneMemory of a block.
        """
        everyone = slice(None)
        if space == "global":
            yield None, everyone, addresses.astype(np.uint64)
            return
        if space == "generic":
            addresses = addresses.astype(np.uint64)
            if (addresses >= np.uint64(LOCAL_WINDOW)).all() and self.local.nbytes:
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
            owner, _ = self.owner_of(rank << CLUSTER_BITS)
            part = np.flatnonzero(ranks == rank)
            which = part if isinstance(chosen, slice) else chosen[part]
            yield owner, which, addresses[part] & _OFFSET

    def _check(
        self, owner: "LaneMemory", lanes, instruction, chosen, offsets, nbytes, writes, strong
    ) -> None:
        warps = lanes.warp_of_lane[chosen]
        self.hazards.check_lanes(owner.hazards, instruction, warps, offsets, nbytes, writes, strong)

    def load(self, lanes, instruction, space: str, addresses, width: int, count: int, strong=False):
        """Load ``count`` elements of ``width`` bytes a lane; returns one array an element."""
        try:
            addresses = np.broadcast_to(addresses, (lanes.count,))
            parts = list(self._parts(lanes, space, addresses))
            results = []
            for owner, chosen, offsets in parts:
                if owner is None:
                    values = self.global_memory.load(offsets, width, count)
                elif isinstance(owner, LocalMemory):
                    values = owner.load(lanes.threads[chosen], offsets, width, count)
                else:
                    nbytes = width * count
                    index = owner.shared.index(offsets, width, nbytes)
                    self._check(owner, lanes, instruction, chosen, offsets, nbytes, False, strong)
                    view = owner.shared.views[width]
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
            raise instruction.located(error) from error

    def store(self, lanes, instruction, space: str, addresses, width: int, values, strong=False):
        """Store elements of ``width`` bytes a lane; values: one array an element."""
        try:
            addresses = np.broadcast_to(addresses, (lanes.count,))
            values = [np.broadcast_to(value, (lanes.count,)) for value in values]
            for owner, chosen, offsets in self._parts(lanes, space, addresses):
                part = [value[chosen] for value in values]
                if owner is None:
                    self.global_memory.store(offsets, width, part)
                    continue
                if isinstance(owner, LocalMemory):
                    owner.store(lanes.threads[chosen], offsets, width, part)
                    continue
                nbytes = width * len(values)
                index = owner.shared.index(offsets, width, nbytes)
                self._check(owner, lanes, instruction, chosen, offsets, nbytes, True, strong)
                for k, value in enumerate(part):
                    owner.shared.views[width][index + k] = value
        except SimulatorError as error:
            raise instruction.located(error) from error

    # --- atomics

    def atomic(self, lanes: Lanes, instruction, space, operation, dtype, addresses, values, old):
        """Update memory lane by lane and element by element; ``old``: return what was there."""
        try:
            addresses = np.broadcast_to(addresses, (lanes.count,))
            size = np.dtype(dtype).itemsize
            values = [np.broadcast_to(np.asarray(v, dtype), (lanes.count,)) for v in values]
            count = 1 if operation == "cas" else len(values)
            before = [np.empty(lanes.count, dtype) for _ in range(count)]
            for owner, chosen, offsets in self._parts(lanes, space, addresses):
                part = [value[chosen] for value in values]
                if owner is not None:
                    nbytes = size * count
                    self._check(owner, lanes, instruction, chosen, offsets, nbytes, True, True)
                for k in range(count):
                    at = offsets + offsets.dtype.type(k * size)
                    operands = part if operation == "cas" else part[k : k + 1]
                    if old or operation not in REDUCTIONS:
                        found = self._exchange(owner, operation, dtype, at, operands)
                        before[k][chosen] = found
                        continue
                    for view, index, mine in self._elements(owner, at, size):
                        REDUCTIONS[operation].at(view.view(dtype), index, operands[0][mine])
            return before
        except SimulatorError as error:
            raise instruction.located(error) from error

    def _exchange(self, owner, operation: str, dtype, addresses, values) -> np.ndarray:
        before = np.empty(len(addresses), dtype)
        for lane in range(len(addresses)):
            places = self._elements(owner, addresses[lane : lane + 1], before.itemsize)
            view, index, _ = next(iter(places))
            element, at = view.view(dtype), int(index[0])
            before[lane] = element[at]
            other = values[1][lane] if operation == "cas" else None
            element[at] = _combine(operation, element[at], values[0][lane], other)
        return before

    def _elements(self, owner, addresses: np.ndarray, size: int):
        """Return arrays over memory, element numbers in them, and the lanes they belong to."""
        if owner is None:
            return self.global_memory.elements(addresses, size)
        return [(owner.shared.views[size], owner.shared.index(addresses, size, size), slice(None))]

    def atomic_packed(self, lanes, instruction, space, operation, kind, addresses, values):
        """Update 16-bit floats, each rounded once; values: their bits, an array an element."""
        try:
            before = [np.empty(lanes.count, np.uint16) for _ in values]
            addresses = np.broadcast_to(addresses, (lanes.count,))
            values = [np.broadcast_to(value, (lanes.count,)) for value in values]
            for owner, chosen, offsets in self._parts(lanes, space, addresses):
                if owner is not None:
                    nbytes = 2 * len(values)
                    self._check(owner, lanes, instruction, chosen, offsets, nbytes, True, True)
                numbers = np.arange(lanes.count)[chosen]
                for k, value in enumerate(values):
                    for position, lane in enumerate(numbers):
                        at = offsets[position : position + 1] + offsets.dtype.type(2 * k)
                        view, index, _ = next(iter(self._elements(owner, at, 2)))
                        before[k][lane] = view[index[0]]
                        view[index[0]] = _combine_halves(
                            operation, kind, view[index[0]], value[lane]
                        )
            return before
        except SimulatorError as error:
            raise instruction.located(error) from error

    # --- matrices

    def store_matrix(self, lanes, instruction, addresses, values, transpose: bool) -> None:
        """Store matrices of 8 x 8 halves; lane 8 i + r holds the address of row r of matrix i."""
        rows = self._rows(lanes, instruction, addresses, len(values), True)
        for k, value in enumerate(values):
            words, halves = _matrix_places(rows[:, k : k + 1], transpose)
            if words is not None:
                self.shared.views[4][words.reshape(-1)] = value
            else:
                for half, place in enumerate(halves):
                    part = value >> np.uint32(16 * half) & np.uint32(0xFFFF)
                    self.shared.views[2][place.reshape(-1)] = part

    def load_matrix(self, lanes, instruction, addresses, count: int, transpose: bool):
        """Load matrices; returns one array of 32-bit registers a matrix."""
        rows = self._rows(lanes, instruction, addresses, count, False)
        words, halves = _matrix_places(rows, transpose)
        if words is not None:
            result = self.shared.views[4][words]
        else:
            low, high = (self.shared.views[2][place].astype(np.uint32) for place in halves)
            result = low | high << np.uint32(16)
        return result.transpose(1, 0, 2).reshape(count, -1)

    def _rows(self, lanes: Lanes, instruction, addresses, count: int, writes: bool) -> np.ndarray:
        """Check the rows that lanes name; returns their offsets, (warps, matrices, 8)."""
        if not lanes.whole_warps:
            raise SimulatorError(f"executed by a part of a warp\n  at {instruction.where()}")
        table = np.broadcast_to(addresses, (lanes.count,)).astype(np.int64).reshape(-1, 4, 8)
        rows = (table - self.window)[:, :count]
        try:
            self.shared.index(rows, 1, 16)
        except SimulatorError as error:
            raise instruction.located(error) from error
        warps = np.broadcast_to(lanes.warp_of_lane[::32, None, None], rows.shape)
        self.hazards.check_lanes(self.hazards, instruction, warps, rows, 16, writes)
        return rows


def _matrix_places(rows: np.ndarray, transpose: bool):
    """Return the element numbers of what lanes hold, (warps, matrices, 32).

    They are (words, None), or if transposed (None, the low and the high 16-bit halves).
    """
    lane = np.arange(32)
    if not transpose:
        return (rows[..., lane // 4] >> 2) + lane % 4, None
    return None, [(rows[..., 2 * (lane % 4) + half] >> 1) + lane // 4 for half in (0, 1)]


def _combine(operation: str, old, value, other):
    if operation == "cas":
        return other if old == value else old
    if operation == "exch":
        return value
    if operation == "inc":
        return 0 if old >= value else old + 1
    if operation == "dec":
        return value if old == 0 or old > value else old - 1
    return REDUCTIONS[operation](old, value)


def _combine_halves(operation: str, kind: str, old: np.uint16, value: np.uint16) -> np.uint16:
    """Return the new bits of one f16 or bf16 element."""
    if kind == "f16":
        a, b = (np.float32(np.uint16(x).view(np.float16)) for x in (old, value))
        return np.float16(REDUCTIONS[operation](a, b)).view(np.uint16)
    a, b = ((np.uint32(x) << np.uint32(16)).view(np.float32) for x in (old, value))
    return np.uint16(bf16_bits(np.array([REDUCTIONS[operation](a, b)], np.float32))[0])
