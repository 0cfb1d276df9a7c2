"""Operands of WGMMA: shared-memory images, descriptors, register fragments; bf16."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROW_BYTES = 128
"""Rows of 64 elements, swizzled over their 128 bytes; 8 rows repeat."""


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest even, as uint16."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def bf16(values: np.ndarray) -> np.ndarray:
    """Rounded to bf16, as float32."""
    return (bf16_bits(values).astype(np.uint32) << 16).view(np.float32)


def swizzled(matrix: np.ndarray) -> bytes:
    """(rows, multiple of 64) as slabs of 64 columns, 128 bytes a row: K-major or MN-major alike."""
    rows, columns = matrix.shape
    slabs = bf16_bits(matrix).reshape(rows, columns // 64, 8, 8).transpose(1, 0, 2, 3)
    image = np.empty_like(slabs)
    for row in range(rows):
        for unit in range(8):
            image[:, row, unit ^ row % 8] = slabs[:, row, unit]
    return image.tobytes()


def k_major(offset: int, rows: int, step: int) -> int:
    """Descriptor of the k16 step of a (rows, K) operand, to be added to %base_descriptor."""
    place = offset + step // 4 * rows * ROW_BYTES + step % 4 * 32
    return _descriptor(place, 16)


def mn_major(offset: int, rows: int, step: int) -> int:
    """The offset in a (K = rows, N) operand, N contiguous."""
    return _descriptor(offset + step * 16 * ROW_BYTES, rows * ROW_BYTES)


def _descriptor(place: int, leading: int) -> int:
    swizzle_128 = 1 << 62
    return place >> 4 | (leading >> 4) << 16 | (8 * ROW_BYTES >> 4) << 32 | swizzle_128


def a_fragments(matrix: np.ndarray) -> bytes:
    """(64, K) as each thread's four registers for each k16 step: (steps, 128, 4) words."""
    bits = bf16_bits(matrix)
    steps = matrix.shape[1] // 16
    words = np.zeros((steps, 128, 4), np.uint32)
    thread = np.arange(128)
    for step in range(steps):
        for register in range(4):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register % 2)
            column = 16 * step + 8 * (register // 2) + 2 * (thread % 4)
            low, high = (bits[row, column + i].astype(np.uint32) for i in (0, 1))
            words[step, :, register] = low | high << 16
    return words.tobytes()


def accumulators(matrix: np.ndarray) -> np.ndarray:
    """(64, N) as each thread's N / 2 registers: (128, N / 2)."""
    thread, register = np.arange(128)[:, None], np.arange(matrix.shape[1] // 2)[None, :]
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register // 2 % 2)
    column = 8 * (register // 4) + 2 * (thread % 4) + register % 2
    return matrix[row, column].astype(np.float32)


def wgmma(
    n: int,
    accumulator: str,
    a: str | Sequence[str],
    b: str,
    *,
    b_mn_major: bool = False,
    accumulate: bool = True,
) -> str:
    """One m64nNk16; `a` a descriptor or four registers."""
    registers = ", ".join(f"{accumulator}{i}" for i in range(n // 2))
    source = a if isinstance(a, str) else "{" + ", ".join(a) + "}"
    transposed = f"{int(b_mn_major)}" if source != a else f"0, {int(b_mn_major)}"
    keep = "%always" if accumulate else "%never"
    return (
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{registers}}}, {source}, {b}, "
        f"{keep}, 1, 1, {transposed};"
    )
