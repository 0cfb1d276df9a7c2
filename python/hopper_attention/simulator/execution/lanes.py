"""The registers of a warpgroup, and windows on them.

Rows are registers, columns are lanes.  Lanes is what instructions compute on: views of a range of
columns, or copies of scattered ones.
"""

from typing import Any

import numpy as np

from hopper_attention.simulator.hardware.tensor_core import Queue
from hopper_attention.simulator.ptx.vectorize import BITS, DTYPES

_VIEWS: dict[int, dict[str, Any]] = {
    bits: {letter: dtype for letter, dtype in DTYPES.items() if BITS[letter] == bits}
    for bits in set(BITS.values())
}
_FILES: dict[int, Any] = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class Lanes:
    """A window on a warpgroup's registers: the active lanes, in ascending order."""

    def __init__(
        self,
        registers: dict[int, np.ndarray],
        first_thread: int,
        block: tuple[int, int, int],
        lanes: np.ndarray,
    ):
        self.lanes, self.count = lanes, len(lanes)
        self.threads = first_thread + lanes
        self.warp_of_lane = self.threads // 32
        self.shuffles: dict = {}
        step = int(lanes[1] - lanes[0]) if len(lanes) > 1 else 1
        regular = bool((np.diff(lanes) == step).all())
        self.gathered = not regular
        self._files = registers
        self._copies: dict[int, np.ndarray] = {}
        columns = slice(int(lanes[0]), int(lanes[-1]) + 1, step)
        for bits, file in registers.items():
            if regular:
                part = file[:, columns]
            else:
                part = self._copies[bits] = np.empty((len(file), len(lanes)), file.dtype)
            for letter, dtype in _VIEWS[bits].items():
                setattr(self, letter, part.view(dtype))
        warps = lanes // 32
        self.warps = np.unique(self.warp_of_lane)
        self.warp_columns = [np.flatnonzero(warps == warp) for warp in np.unique(warps)]
        self.warp_count = len(self.warp_columns)
        self.whole_warps = self.count == 32 * self.warp_count
        self.zero = np.zeros(self.count, np.uint32)
        self.elected = np.zeros(self.count, np.bool_)
        self.leader = np.zeros(self.count, np.uint32)
        for column in self.warp_columns:
            self.elected[column[0]] = True
            self.leader[column] = lanes[column[0]] & 31
        self.special = self._special(block)

    def _special(self, block: tuple[int, int, int]) -> dict[str, np.ndarray]:
        threads = self.threads
        lane = (self.lanes & 31).astype(np.uint32)
        bit = np.uint32(1) << lane
        return {
            "%tid.x": (threads % block[0]).astype(np.uint32),
            "%tid.y": (threads // block[0] % block[1]).astype(np.uint32),
            "%tid.z": (threads // (block[0] * block[1])).astype(np.uint32),
            "%laneid": lane,
            "%warpid": (threads // 32).astype(np.uint32),
            "%lanemask_eq": bit,
            "%lanemask_lt": bit - np.uint32(1),
            "%lanemask_le": bit - np.uint32(1) | bit,
            "%lanemask_gt": ~(bit - np.uint32(1) | bit),
            "%lanemask_ge": ~(bit - np.uint32(1)),
        }

    def pull(self) -> None:
        """Copy the registers of scattered lanes in, before a step."""
        for bits, copy in self._copies.items():
            copy[...] = self._files[bits][:, self.lanes]

    def push(self) -> None:
        """Copy the registers of scattered lanes out, after a step."""
        for bits, copy in self._copies.items():
            self._files[bits][:, self.lanes] = copy


class Warpgroup:
    """Registers of up to four warps, and their asynchronous products."""

    queue: Queue

    def __init__(self, number: int, count: int, block: tuple[int, int, int], rows: dict[int, int]):
        self.number, self.count, self.block = number, count, block
        self.first_thread = 128 * number
        self.registers: dict[int, np.ndarray] = {
            bits: np.empty((max(1, n), count), _FILES[bits]) for bits, n in rows.items()
        }
        self._windows: dict[bytes, Lanes] = {}
        self.everyone = np.arange(count)

    def start(self, queue: Queue) -> None:
        """Begin another block: registers are NaN, predicates false."""
        for file in self.registers.values():
            file.view(np.uint8)[...] = 0xFF if file.dtype != np.bool_ else 0
        self.queue = queue
        self.touched = -1  # every register counts as used before the first wgmma.fence

    @property
    def warps(self) -> str:
        """The warps' numbers, for reports."""
        first = self.first_thread // 32
        return f"{first} to {first + 3}"

    def window(self, lanes: np.ndarray) -> Lanes:
        """Return the window on these lanes, which is made once."""
        key = lanes.tobytes()
        found = self._windows.get(key)
        if found is None:
            found = Lanes(self.registers, self.first_thread, self.block, lanes)
            self._windows[key] = found
        return found
