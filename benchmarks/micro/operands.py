"""Operands of WGMMA, bf16 and e4m3: shared-memory images, descriptors, register fragments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

ROW_BYTES = 128
"""Rows of 64 elements of 16 bits, swizzled over their 128 bytes; 8 rows repeat."""


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest even, as uint16."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def bf16(values: np.ndarray) -> np.ndarray:
    """Rounded to bf16, as float32."""
    return (bf16_bits(values).astype(np.uint32) << 16).view(np.float32)


def e4m3_bits(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest even, as uint8; of at most 448."""
    return _fp8_bits(values, torch.float8_e4m3fn)


def e5m2_bits(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest even, as uint8; of at most 57344."""
    return _fp8_bits(values, torch.float8_e5m2)


def _fp8_bits(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.tensor(values.astype(np.float32)).to(dtype).view(torch.uint8).numpy()


@dataclass(frozen=True)
class Format:
    """Elements of A and B."""

    ptx: str
    bytes: int
    bits: Callable[[np.ndarray], np.ndarray]
    opcode: str
    """Of WGMMA in machine code, with the place of N."""

    @property
    def k(self) -> int:
        """Columns of A in one WGMMA."""
        return 32 // self.bytes


BF16 = Format("bf16", 2, bf16_bits, "HGMMA.64x{n}x16.F32.BF16")
E4M3 = Format("e4m3", 1, e4m3_bits, "QGMMA.64x{n}x32.F32.E4M3.E4M3")


def swizzled(bits: np.ndarray) -> bytes:
    """(rows, multiple of 128 bytes) as slabs of 128 bytes a row: K-major or MN-major alike."""
    raw = np.ascontiguousarray(bits).view(np.uint8)
    slabs = raw.reshape(len(raw), -1, 8, 16).transpose(1, 0, 2, 3)
    image = np.empty_like(slabs)
    for row in range(len(raw)):
        for unit in range(8):
            image[:, row, unit ^ row % 8] = slabs[:, row, unit]
    return image.tobytes()


def k_major(offset: int, rows: int, step: int) -> int:
    """Descriptor of 32 bytes of K of a (rows, K) operand, to be added to %base_descriptor."""
    place = offset + step // 4 * rows * ROW_BYTES + step % 4 * 32
    return _descriptor(place, 16)


def mn_major(offset: int, rows: int, step: int) -> int:
    """The offset in a (K = rows, N) operand, N contiguous."""
    return _descriptor(offset + step * 16 * ROW_BYTES, rows * ROW_BYTES)


def _descriptor(place: int, leading: int) -> int:
    swizzle_128 = 1 << 62
    return place >> 4 | (leading >> 4) << 16 | (8 * ROW_BYTES >> 4) << 32 | swizzle_128


def a_fragments(bits: np.ndarray) -> bytes:
    """(64, K) as each thread's four registers for each 32 bytes of K: (steps, 128, 4) words."""
    words = np.ascontiguousarray(bits).view(np.uint32)
    thread, register = np.arange(128)[:, None], np.arange(4)
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register % 2)
    word = 4 * (register // 2) + thread % 4
    return np.stack([words[row, 8 * step + word] for step in range(words.shape[1] // 8)]).tobytes()


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
    form: Format = BF16,
    b_mn_major: bool = False,
    accumulate: bool = True,
) -> str:
    """One m64nN of 32 bytes of K; `a` a descriptor or four registers."""
    registers = ", ".join(f"{accumulator}{i}" for i in range(n // 2))
    source = a if isinstance(a, str) else "{" + ", ".join(a) + "}"
    flags = ["%always" if accumulate else "%never", "1", "1"]
    if form is BF16:  # transposed: A, where it is a descriptor, and B
        flags += ["0"] * (source == a) + [str(int(b_mn_major))]
    kind = f"m64n{n}k{form.k}.f32.{form.ptx}.{form.ptx}"
    operands = f"{{{registers}}}, {source}, {b}, {', '.join(flags)}"
    return f"wgmma.mma_async.sync.aligned.{kind} {operands};"
