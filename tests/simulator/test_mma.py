"""mma.sync, movmatrix: fragments against loops over the PTX documentation's index formulas."""

import numpy as np
import pytest
from simulator.snippets import run

from hopper_attention import simulator

RNG = np.random.default_rng(0)
CODES = {"e4m3": [0, 0x38, 0x40, 0x44], "e5m2": [0, 0x3C, 0x40, 0x42]}
WIDTH = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1}


def values(kind: str, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Small integers that the format holds exactly: (bits, int64)."""
    low = 0 if kind == "u8" else -3
    number = RNG.integers(low, 4, shape)
    if kind == "f16":
        return number.astype(np.float16).view(np.uint16), number
    if kind == "bf16":
        return (number.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16), number
    if kind == "tf32":
        return number.astype(np.float32).view(np.uint32), number
    if kind in ("s8", "u8"):
        return number.astype(np.int8).view(np.uint8), number
    bits = np.array(CODES[kind])[np.abs(number)] | np.where(number < 0, 0x80, 0)
    return bits.astype(np.uint8), number


def fragments(bits: np.ndarray, where) -> np.ndarray:
    """(32 lanes, registers): where(lane, element) gives row and column, or None at the end."""
    count = bits.size // 32
    elements = [[bits[where(lane, i)] for i in range(count)] for lane in range(32)]
    return np.array(elements, bits.dtype).view(np.uint32)


def place_a(kind: str, k: int):
    """Rows and columns of a_i, from the figures of each shape."""
    if WIDTH[kind] == 2:
        return lambda lane, i: (
            lane // 4 + (8 if i % 4 >= 2 else 0), lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)
        )  # fmt: skip
    if WIDTH[kind] == 4:
        return lambda lane, i: (lane // 4 + (8 if i % 2 else 0), lane % 4 + (4 if i >= 2 else 0))
    return lambda lane, i: (
        lane // 4 + (8 if i % 8 >= 4 else 0), lane % 4 * 4 + (i & 3) + (16 if i >= 8 else 0)
    )  # fmt: skip


def place_b(kind: str, k: int):
    if WIDTH[kind] == 2:
        return lambda lane, i: (lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane // 4)
    if WIDTH[kind] == 4:
        return lambda lane, i: (lane % 4 + (4 if i >= 1 else 0), lane // 4)
    return lambda lane, i: (lane % 4 * 4 + (i & 3) + (16 if i >= 4 else 0), lane // 4)


def place_c(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


CASES = [
    (8, "f32", "f16", "f16"), (16, "f32", "f16", "f16"), (16, "f16", "f16", "f16"),
    (8, "f16", "f16", "f16"), (8, "f32", "bf16", "bf16"), (16, "f32", "bf16", "bf16"),
    (4, "f32", "tf32", "tf32"), (8, "f32", "tf32", "tf32"), (32, "f32", "e4m3", "e4m3"),
    (32, "f32", "e5m2", "e4m3"), (16, "f32", "e4m3", "e5m2"), (32, "f16", "e4m3", "e4m3"),
    (16, "s32", "s8", "s8"), (32, "s32", "s8", "u8"), (32, "s32", "u8", "s8"),
]  # fmt: skip


@pytest.mark.parametrize(("k", "d_kind", "a_kind", "b_kind"), CASES)
def test_every_shape_and_type(k, d_kind, a_kind, b_kind):
    a_bits, a = values(a_kind, (16, k))
    b_bits, b = values(b_kind, (k, 8))
    c = RNG.integers(-9, 10, (16, 8))
    c_dtype = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[d_kind]
    groups = [
        fragments(a_bits, place_a(a_kind, k)), fragments(b_bits, place_b(b_kind, k)),
        fragments(c.astype(c_dtype), place_c),
    ]  # fmt: skip
    inputs = np.concatenate(groups, axis=1)
    sizes = [g.shape[1] for g in groups]
    names = iter(f"%a{i}" for i in range(inputs.shape[1]))
    operands = ["{" + ", ".join(next(names) for _ in range(n)) + "}" for n in sizes]
    outputs = "{" + ", ".join(f"%d{i}" for i in range(sizes[2])) + "}"
    types = f"{d_kind}.{a_kind}.{b_kind}.{d_kind}"
    text = f"mma.sync.aligned.m16n8k{k}.row.col.{types} {outputs}, {', '.join(operands)};"
    got = run(text, inputs, outputs=sizes[2])
    expected = fragments((a @ b + c).astype(c_dtype), place_c)
    np.testing.assert_array_equal(got, expected)


def test_integer_saturation():
    """127 * 127 * 16 + (2^31 - 1) overflows: satfinite clamps."""
    ones = np.full((32, 1), 0x7F7F7F7F, np.uint32)
    inputs = np.concatenate([ones, ones, ones, np.full((32, 4), 0x7FFFFFFF, np.uint32)], axis=1)
    text = (
        "mma.sync.aligned.m16n8k16.row.col{}.s32.s8.s8.s32 {{%d0, %d1, %d2, %d3}}, {{%a0, %a1}}, "
        "{{%a2}}, {{%a3, %a4, %a5, %a6}};"
    )
    assert (run(text.format(".satfinite"), inputs, 4) == 0x7FFFFFFF).all()
    wrapped = (0x7FFFFFFF + 16 * 127 * 127) & 0xFFFFFFFF
    assert (run(text.format(""), inputs, 4) == wrapped).all()


@pytest.mark.parametrize(
    "text",
    [
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 %d0, %a0, %a0, %a0;",
        "mma.sync.aligned.m16n8k32.row.col.kind::f8f6f4.f32.e4m3.e4m3.f32 %d0, %a0, %a0, %a0;",
        "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 %d0, %a0, %a0, %a0;",
    ],
)
def test_other_forms_are_refused(text):
    with pytest.raises(simulator.UnknownInstruction, match="not implemented"):
        run(text, np.zeros((32, 1), np.uint32))


def test_movmatrix_transposes():
    matrix = RNG.integers(0, 1 << 16, (8, 8)).astype(np.uint16)
    held = np.ascontiguousarray(matrix).view(np.uint32).reshape(32, 1)
    got = run("movmatrix.sync.aligned.m8n8.trans.b16 %d0, %a0;", held)
    np.testing.assert_array_equal(got.view(np.uint16).reshape(8, 8), matrix.T)
