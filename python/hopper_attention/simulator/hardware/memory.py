"""Global memory over real host addresses, and the shared memory of a block.

Global memory is what the host registered: an access elsewhere is an error that names the lane's
address.  Shared memory starts as NaN bytes; its offset 0 is not usable, as on sm_90 where the
first KiB is reserved.
"""

import bisect
import contextlib
import ctypes
from collections.abc import Iterator

import numpy as np

from hopper_attention.simulator.errors import MisalignedAccess, OutOfBounds

SHARED_WINDOW = 1 << 62  # generic address of shared memory's byte 0
CLUSTER_BITS = 24  # shared::cluster addresses: the block's rank above the offset in its memory
LOCAL_WINDOW = 3 << 60  # generic address of every thread's first byte of local memory
PARAM_WINDOW = 1 << 61  # generic address of the first parameter
SHARED_BASE = 1024
SHARED_LIMIT = 232448 + SHARED_BASE
POISON = 0xFF
_PAGE_BITS = 14

REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
"""The operations that atomics, bulk reductions and redux have in common."""
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Allocation:
    """One registered range of host memory."""

    def __init__(self, address: int, nbytes: int, name: str, writable: bool):
        self.address, self.nbytes, self.name, self.writable = address, nbytes, name, writable
        self.end = address + nbytes
        buffer = (ctypes.c_uint8 * nbytes).from_address(address)
        self.bytes = np.frombuffer(memoryview(buffer), np.uint8)
        self.views = {
            size: self.bytes[: nbytes // size * size].view(dtype)
            for size, dtype in _UNSIGNED.items()
            if address % size == 0
        }
        self.kept: np.ndarray | None = None  # pages whose former content is in ``pages``
        self.pages: dict[int, np.ndarray] = {}

    def start_keeping(self) -> None:
        """Keep what stores overwrite from here on."""
        self.kept, self.pages = np.zeros((self.nbytes >> _PAGE_BITS) + 1, np.bool_), {}

    def stop_keeping(self, restore: bool) -> None:
        if restore:
            for page, content in self.pages.items():
                start = page << _PAGE_BITS
                self.bytes[start : start + len(content)] = content
        self.kept, self.pages = None, {}

    def keep(self, first: np.ndarray, nbytes: int) -> None:
        """Keep the pages of ``nbytes`` bytes from each of these offsets."""
        if self.kept is None:
            return
        for offset in (first, first + (nbytes - 1)):
            pages = offset >> _PAGE_BITS
            if not self.kept[pages].all():
                for page in np.unique(pages).tolist():
                    self._keep_page(page)

    def keep_range(self, low: int, high: int) -> None:
        if self.kept is not None:
            for page in range(low >> _PAGE_BITS, (high - 1 >> _PAGE_BITS) + 1):
                self._keep_page(page)

    def _keep_page(self, page: int) -> None:
        assert self.kept is not None
        if not self.kept[page]:
            self.kept[page] = True
            start = page << _PAGE_BITS
            self.pages[page] = self.bytes[start : start + (1 << _PAGE_BITS)].copy()

    def __repr__(self) -> str:
        return f"{self.name} [{self.address:#x}, {self.end:#x})"


class GlobalMemory:
    """The host memory that kernels of a launch may touch."""

    def __init__(self) -> None:
        self._allocations: list[Allocation] = []
        self._starts: list[int] = []
        self._in_transaction = False

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Restore all registered memory if the ``with`` block raises.

        Only pages that are written are copied.  Inside of another transaction it does nothing.
        """
        if self._in_transaction:
            yield
            return
        for allocation in self._allocations:
            allocation.start_keeping()
        self._in_transaction = failed = True
        try:
            yield
            failed = False
        finally:
            self._in_transaction = False
            for allocation in self._allocations:
                allocation.stop_keeping(restore=failed)

    def register(self, address: int, nbytes: int, name: str, writable: bool = True) -> None:
        """Make ``nbytes`` bytes at a host address accessible.

        Ranges that overlap (views of one storage) become one, writable if either is.
        """
        if nbytes <= 0:
            return
        end = address + nbytes
        shared = [a for a in self._allocations if a.address < end and address < a.end]
        for other in shared:
            address, end = min(address, other.address), max(end, other.end)
            name, writable = f"{other.name}, {name}", writable or other.writable
            self._allocations.remove(other)
            self._starts.remove(other.address)
        at = bisect.bisect_left(self._starts, address)
        self._allocations.insert(at, Allocation(address, end - address, name, writable))
        self._starts.insert(at, address)

    def find(self, address: int, nbytes: int) -> Allocation:
        at = bisect.bisect_right(self._starts, address) - 1
        if at >= 0 and address + nbytes <= self._allocations[at].end:
            return self._allocations[at]
        near = f"; nearest below is {self._allocations[at]}" if at >= 0 else ""
        raise OutOfBounds(f"global access of {nbytes} bytes at {address:#x}{near}")

    def _parts(self, addresses: np.ndarray, nbytes: int):
        """Yield allocations and lane selections that cover the addresses."""
        low, high = int(addresses.min()), int(addresses.max())
        if nbytes > 1 and (addresses & np.uint64(nbytes - 1)).any():
            bad = int(addresses[(addresses & np.uint64(nbytes - 1)) != 0][0])
            raise MisalignedAccess(f"global access of {nbytes} bytes at {bad:#x}")
        at = bisect.bisect_right(self._starts, low) - 1
        if at >= 0 and high + nbytes <= self._allocations[at].end:
            yield self._allocations[at], slice(None)
            return
        lanes = np.arange(len(addresses))
        while len(lanes):
            allocation = self.find(int(addresses[lanes[0]]), nbytes)
            at_lanes = addresses[lanes]
            inside = (at_lanes >= allocation.address) & (at_lanes + nbytes <= allocation.end)
            yield allocation, lanes[inside]
            lanes = lanes[~inside]

    def load(self, addresses: np.ndarray, width: int, count: int) -> list[np.ndarray]:
        """Load ``count`` elements of ``width`` bytes a lane."""
        result = [np.empty(len(addresses), _UNSIGNED[width]) for _ in range(count)]
        for allocation, lanes in self._parts(addresses, width * count):
            view, index = self._view(allocation, addresses[lanes], width)
            for k in range(count):
                result[k][lanes] = view[index + k]
        return result

    def store(self, addresses: np.ndarray, width: int, values: list[np.ndarray]) -> None:
        for allocation, lanes in self._parts(addresses, width * len(values)):
            self.require_writable(allocation)
            view, index = self._view(allocation, addresses[lanes], width)
            allocation.keep(index * width, width * len(values))
            for k, value in enumerate(values):
                view[index + k] = value[lanes]

    def elements(self, addresses: np.ndarray, width: int):
        """Yield arrays to be updated, element numbers in them, and the lanes they belong to."""
        for allocation, lanes in self._parts(addresses, width):
            self.require_writable(allocation)
            view, index = self._view(allocation, addresses[lanes], width)
            allocation.keep(index * width, width)
            yield view, index, lanes

    @staticmethod
    def require_writable(allocation: Allocation) -> None:
        if not allocation.writable:
            raise OutOfBounds(f"write to read-only {allocation}")

    @staticmethod
    def _view(allocation: Allocation, addresses: np.ndarray, width: int):
        if width not in allocation.views:
            raise MisalignedAccess(f"{allocation} is not aligned to {width} bytes")
        index = (addresses - np.uint64(allocation.address)) >> np.uint64(width.bit_length() - 1)
        return allocation.views[width], index.astype(np.int64)

    def box(
        self, base: int, sizes: tuple[int, ...], strides: tuple[int, ...], width: int, write: bool
    ) -> np.ndarray:
        """Return a strided array (last dimension contiguous) over registered memory."""
        extent = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + width
        allocation = self.find(base, extent)
        if write:
            self.require_writable(allocation)
            self._keep_box(allocation, base - allocation.address, sizes, strides, width)
        return np.ndarray(
            sizes, _UNSIGNED[width], allocation.bytes, base - allocation.address, strides
        )

    @staticmethod
    def _keep_box(allocation: Allocation, offset: int, sizes, strides, width: int) -> None:
        if allocation.kept is None:
            return
        rows = np.full(1, offset)
        for size, stride in zip(sizes[:-1], strides[:-1], strict=True):
            rows = (rows[:, None] + np.arange(size) * stride).reshape(-1)
        row_bytes = (sizes[-1] - 1) * strides[-1] + width
        if row_bytes <= 1 << _PAGE_BITS:
            allocation.keep(rows, row_bytes)
        else:
            for row in rows.tolist():
                allocation.keep_range(row, row + row_bytes)


class SharedMemory:
    """The bytes of one block's shared memory, from SHARED_BASE to ``end``."""

    def __init__(self, nbytes: int):
        self.end = SHARED_BASE + nbytes
        self.bytes = np.full(-(-self.end // 1024) * 1024, POISON, np.uint8)
        self.views = {size: self.bytes.view(dtype) for size, dtype in _UNSIGNED.items()}
        self.chunks = self.bytes.view(np.complex128)  # 16-byte units; only ever copied

    def reset(self) -> None:
        self.bytes[:] = POISON

    def check(self, low: int, high: int) -> None:
        """Raise unless the bytes [low, high) lie within the block's shared memory."""
        if low < SHARED_BASE or high > self.end:
            raise OutOfBounds(
                f"shared memory access [{low:#x}, {high:#x}) outside "
                f"[{SHARED_BASE:#x}, {self.end:#x})"
            )

    def index(self, addresses: np.ndarray, width: int, nbytes: int) -> np.ndarray:
        """Check addresses; returns the numbers of their elements."""
        self.check(int(addresses.min()), int(addresses.max()) + nbytes)
        if nbytes > 1 and (addresses & (nbytes - 1)).any():
            bad = int(addresses[(addresses & (nbytes - 1)) != 0][0])
            raise MisalignedAccess(f"shared memory access of {nbytes} bytes at {bad:#x}")
        return addresses >> (width.bit_length() - 1)


class LocalMemory:
    """Each thread's own bytes: spills and arrays that are indexed at run time."""

    def __init__(self, nbytes: int, threads: int):
        self.nbytes = -(-nbytes // 16) * 16
        self.bytes = np.full((threads, self.nbytes), POISON, np.uint8)

    def reset(self) -> None:
        self.bytes[:] = POISON

    def _index(self, offsets: np.ndarray, width: int, count: int) -> np.ndarray:
        if offsets.min() < 0 or offsets.max() + width * count > self.nbytes:
            raise OutOfBounds(f"local memory access outside of {self.nbytes} bytes")
        if (offsets % (width * count)).any():
            raise MisalignedAccess(f"local memory access of {width * count} bytes")
        return offsets // width

    def load(self, threads: np.ndarray, offsets: np.ndarray, width: int, count: int):
        index = self._index(offsets, width, count)
        view = self.bytes.view(_UNSIGNED[width])
        return [view[threads, index + k] for k in range(count)]

    def store(self, threads: np.ndarray, offsets: np.ndarray, width: int, values) -> None:
        index = self._index(offsets, width, len(values))
        view = self.bytes.view(_UNSIGNED[width])
        for k, value in enumerate(values):
            view[threads, index + k] = value
