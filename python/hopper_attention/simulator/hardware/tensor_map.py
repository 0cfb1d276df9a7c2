"""Decode of the 128-byte tensor maps that host code writes into kernel parameters.

    words 0-1    base address
    word 2       bits 0-3: 2; 4-6: rank - 1; 7-10: element type; 13-14: swizzle; 16: tf32
    words 3-6    strides of dimensions 1-4 in 16-byte units, low 32 bits; word 7: their bits 32-35
    words 8-12   sizes - 1
    word 13      bits 0-14: element strides - 1, three bits a dimension; 24-31: box[0] - 1
    word 14      box[1..4] - 1, eight bits each

This layout is not documented by NVIDIA; it was established by compiling kernels of many shapes.
"""

import functools
from dataclasses import dataclass

import numpy as np

from hopper_attention.simulator.errors import SimulatorError

# code -> bytes an element
_ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 4: 8, 6: 2, 7: 4, 9: 8, 10: 2}
_NAMES = {0: "u8", 1: "u16", 2: "u32", 4: "u64", 6: "f16", 7: "f32", 9: "f64", 10: "bf16"}


@dataclass(frozen=True)
class TensorMap:
    """sizes, strides (bytes) and box with the contiguous dimension first.

    swizzle: bytes of the swizzle span, 0, 32, 64 or 128.
    """

    base: int
    element: str
    element_bytes: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    swizzle: int

    @property
    def rank(self) -> int:
        return len(self.sizes)

    @property
    def steps(self) -> tuple[int, ...]:
        """The element strides; hardware ignores that of the contiguous dimension."""
        return (1, *self.element_strides[1:])

    @property
    def shared_box(self) -> tuple[int, ...]:
        """The extents of the tile in shared memory."""
        return tuple(-(-n // step) for n, step in zip(self.box, self.steps, strict=True))

    @property
    def box_bytes(self) -> int:
        return int(np.prod(self.shared_box)) * self.element_bytes


@functools.lru_cache(maxsize=4096)
def decode(blob: bytes) -> TensorMap:
    """Decode 128 bytes.  Raises SimulatorError where they are not a tensor map."""
    words = [int(word) for word in np.frombuffer(blob, np.uint32, 32)]
    if words[2] & 0xF != 2:
        raise SimulatorError(f"not a tensor map: word 2 is {words[2]:#x}")
    rank = (words[2] >> 4 & 7) + 1
    code = words[2] >> 7 & 0xF
    if code not in _ELEMENT_BYTES or rank > 5:
        raise SimulatorError(f"tensor map of rank {rank} with unknown element type {code}")
    size = _ELEMENT_BYTES[code]
    high = [words[7] >> 4 * k & 0xF for k in range(4)]
    strides = [size] + [(words[3 + k] | high[k] << 32) * 16 for k in range(rank - 1)]
    box = [(words[13] >> 24) + 1] + [(words[14] >> 8 * k & 0xFF) + 1 for k in range(4)]
    return TensorMap(
        base=words[0] | words[1] << 32,
        element="tf32" if code == 7 and words[2] >> 16 & 1 else _NAMES[code],
        element_bytes=size,
        sizes=tuple(words[8 + k] + 1 for k in range(rank)),
        strides=tuple(strides),
        box=tuple(box[:rank]),
        element_strides=tuple((words[13] >> 3 * k & 7) + 1 for k in range(rank)),
        swizzle=(0, 32, 64, 128)[words[2] >> 13 & 3],
    )


def swizzle_address(address: np.ndarray, span: int) -> np.ndarray:
    """Return the byte address in shared memory after the swizzle of 0, 32, 64 or 128 bytes.

    The 16-byte chunk number within the span is xored with address bits from 7 upwards: one bit for
    32 bytes, two for 64, three for 128.  The pattern is tied to the address, not to the tile.
    """
    bits = {0: 0, 32: 1, 64: 2, 128: 3}[span]
    return address ^ ((address >> 7 & ((1 << bits) - 1)) << 4)
