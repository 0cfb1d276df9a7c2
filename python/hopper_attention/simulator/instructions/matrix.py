"""Products of one warp's register fragments, mma.sync.

Layouts, from the PTX documentation's figures, g = lane / 4, t = lane % 4, p elements a register:

    A (16 x K)  register r, element j: row g + 8 (r % 2), column 4 p (r / 2) + p t + j
    B (K x 8)   register r, element j: row 4 p r + p t + j, column g
    C, D        32-bit: registers 0, 1: row g, columns 2 t, 2 t + 1; 2, 3: row g + 8
                f16: register 0 holds both columns of row g, register 1 those of row g + 8
"""

import re
from typing import Any

import numpy as np

from hopper_attention.simulator.hardware.formats import ELEMENT_BYTES, FP8, widen_bf16
from hopper_attention.simulator.instructions.registry import helper, pure
from hopper_attention.simulator.ptx.parser import Instruction, Vector
from hopper_attention.simulator.ptx.vectorize import Operation

_SHAPES = {  # element bytes -> K
    2: (8, 16), 4: (4, 8), 1: (16, 32),
}  # fmt: skip


def _elements(registers: np.ndarray, kind: str) -> np.ndarray:
    """Convert (registers, warps, 32) to (registers, warps, 8, 4, p) values."""
    raw = np.ascontiguousarray(registers)[..., None].view(np.uint8)
    if kind in ("s8", "u8"):
        value = raw.view(np.int8 if kind == "s8" else np.uint8).astype(np.float64)
    elif kind == "f16":
        value = raw.view(np.float16).astype(np.float32)
    elif kind == "bf16":
        value = widen_bf16(raw.view(np.uint16))
    elif kind == "tf32":
        value = (raw.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    else:
        value = FP8[kind].take(raw)
    return value.reshape(*registers.shape[:2], 8, 4, -1)


@helper
def multiply_fragments(kinds: tuple[str, str, str], saturate: bool, a, b, c) -> list[np.ndarray]:
    """Return D = A B + C of every warp; registers are arrays of lanes."""
    d_kind, a_kind, b_kind = kinds

    def registers(items) -> np.ndarray:
        return np.concatenate(items).reshape(len(items), -1, 32)

    left, right = _elements(registers(a), a_kind), _elements(registers(b), b_kind)
    many, warps = left.shape[:2]
    halves = left.reshape(many // 2, 2, warps, 8, 4, -1)  # column part, row half, warp, g, t, j
    matrix_a = halves.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, -1)
    matrix_b = right.transpose(1, 0, 3, 4, 2).reshape(warps, -1, 8)  # warp, part, t, j, g
    product = np.matmul(matrix_a, matrix_b)
    split = product.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)  # half, column, warp, g, t
    flat = split.reshape(2, 2, -1)
    if d_kind == "s32":
        old = np.concatenate(c).view(np.int32).reshape(2, 2, -1)
        total: Any = flat.astype(np.int64) + old
        if saturate:
            total = np.clip(total, -(1 << 31), (1 << 31) - 1)
        return list(total.astype(np.int32).view(np.uint32).reshape(4, -1))
    if d_kind == "f32":
        before = np.concatenate(c).view(np.float32).reshape(2, 2, -1)
        return list((flat + before).astype(np.float32).view(np.uint32).reshape(4, -1))
    pairs = np.stack([np.ascontiguousarray(x)[:, None].view(np.float16) for x in c])
    total = (flat + pairs.transpose(0, 2, 1).astype(np.float32)).astype(np.float16)
    bits = total.view(np.uint16).astype(np.uint32)
    return list(bits[:, 0] | bits[:, 1] << np.uint32(16))


@pure("mma.sync")
def _mma(instruction: Instruction) -> list[Operation]:
    parts = list(instruction.parts)
    saturate = "satfinite" in parts
    if saturate:
        parts.remove("satfinite")
    if len(parts) != 10 or parts[2] != "aligned" or parts[4:6] != ["row", "col"]:
        raise instruction.unknown(instruction.opcode)
    shape = re.fullmatch(r"m16n8k(\d+)", parts[3])
    d_kind, a_kind, b_kind, c_kind = parts[6:]
    integer = a_kind in ("s8", "u8")
    if (
        shape is None
        or a_kind not in ELEMENT_BYTES
        or b_kind not in ELEMENT_BYTES
        or int(shape[1]) not in _SHAPES[ELEMENT_BYTES[a_kind]]
        or ELEMENT_BYTES[a_kind] != ELEMENT_BYTES[b_kind]
        or d_kind != c_kind
        or d_kind not in (("s32",) if integer else ("f32", "f16"))
        or (saturate and not integer)
    ):
        raise instruction.unknown(instruction.opcode)
    groups = [x.items if isinstance(x, Vector) else (x,) for x in instruction.operands]
    d, a, b, c = groups
    names = []
    inputs: list = []
    for group in (a, b, c):
        start = len(inputs)
        inputs += [("U", register) for register in group]
        places = ", ".join(f"{{{k}}} + L.zero" for k in range(start, len(inputs)))
        names.append(f"({places},)")
    kinds = d_kind, a_kind, b_kind
    lines = [f"t = multiply_fragments({kinds!r}, {saturate}, {', '.join(names)})"]
    lines += [f"{{d{k}}} = t[{k}]" for k in range(len(d))]
    outputs = [("U", register) for register in d]
    if instruction.guard is not None:
        raise instruction.unknown("predicated mma")
    return [Operation(instruction, "\n".join(lines), outputs, inputs, effect="load")]
