"""WGMMA: operand and fragment layouts against loops written from the PTX documentation."""

import re

import numpy as np
import pytest
from simulator.snippets import run

from hopper_attention import simulator
from hopper_attention.simulator.hardware.tensor_core import fragment_a, fragment_d

RNG = np.random.default_rng(0)
BYTES = {"bf16": 2, "f16": 2, "e4m3": 1, "e5m2": 1, "tf32": 4, "s8": 1, "u8": 1}
SWIZZLES = {0: 0, 128: 1, 64: 2, 32: 3}
N = 24


def values(kind: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Random small numbers that the format holds exactly: (bits, float64)."""
    number = RNG.integers(-3, 4, shape).astype(np.float64)
    if kind == "bf16":
        return (number.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16), number
    if kind == "f16":
        return number.astype(np.float16).view(np.uint16), number
    if kind == "tf32":
        return number.astype(np.float32).view(np.uint32), number
    if kind in ("s8", "u8"):
        number = np.abs(number) if kind == "u8" else number
        return number.astype(np.int8).view(np.uint8), number
    codes = {"e4m3": {0: 0, 1: 0x38, 2: 0x40, 3: 0x44}, "e5m2": {0: 0, 1: 0x3C, 2: 0x40, 3: 0x42}}
    bits = np.vectorize(lambda x: codes[kind][abs(int(x))] | (0x80 if x < 0 else 0))(number)
    return bits.astype(np.uint8), number


def place(matrix: np.ndarray, span: int, mn_major: bool) -> tuple[np.ndarray, int, int]:
    """Shared memory image of (rows, K) in a canonical layout, with its LBO and SBO.

    Core matrices are 8 rows of 16 bytes.  Without swizzle they lie contiguously, along K first.
    With a swizzle of s bytes, a row of s bytes holds s / 16 of them and 8 rows repeat.
    """
    if mn_major:
        matrix = matrix.T  # rows are K, contiguous along M or N
    rows, row_bytes = matrix.shape[0], matrix.shape[1] * matrix.itemsize
    raw = np.ascontiguousarray(matrix).view(np.uint8).reshape(rows, -1)
    image = np.full(16384, 0xFF, np.uint8)
    if span == 0:
        column_step, row_step = 128, row_bytes // 16 * 128
        for r, b in np.ndindex(rows, row_bytes):
            image[r // 8 * row_step + r % 8 * 16 + b // 16 * column_step + b % 16] = raw[r, b]
        return (image, row_step, column_step) if mn_major else (image, column_step, row_step)
    group = 8 * span
    columns = -(-row_bytes // span)
    for r, b in np.ndindex(rows, row_bytes):
        address = (r // 8 * columns + b // span) * group + r % 8 * span + b % span
        line = address // 128
        mask = {32: line % 2, 64: line % 4, 128: line % 8}[span]
        image[address ^ mask << 4] = raw[r, b]
    return image, group, columns * group


def descriptor(offset: int, leading: int, stride: int, span: int) -> int:
    return (
        (1024 + offset) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SWIZZLES[span] << 62
    )  # dynamic shared memory starts at 1024


BODY = """
    mov.b32 %r1, memory;
    mov.b32 %r2, %r500;
    COPY:
    mad.wide.u32 %rd1, %r2, 4, %rd60;
    ld.global.b32 %r3, [%rd1];
    mad.lo.s32 %r4, %r2, 4, %r1;
    st.shared.b32 [%r4], %r3;
    add.s32 %r2, %r2, 128;
    setp.lt.u32 %p1, %r2, 8192;
    @%p1 bra COPY;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    {prepare}
    mov.b64 %rd2, {a};
    mov.b64 %rd3, {b};
    setp.ne.b32 %p2, {accumulate}, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.{shape}.{types} {{{accumulators}}}, {source}, %rd3, %p2{flags};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
"""


def multiply(
    kinds: tuple[str, str],
    span: int = 128,
    a_mn: bool = False,
    b_mn: bool = False,
    accumulate: bool = False,
    registers: bool = False,
    sign: int = 1,
    half: bool = False,
    body: str = BODY,
    seed: int = 0,
    hazards: str = "raise",
    bits: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(accumulator registers, exact product); accumulators start as 2."""
    width = BYTES[kinds[0]]
    k = 32 // width
    a_bits, a = values(kinds[0], (64, k))
    b_bits, b = values(kinds[1], (N if not b_mn else 64, k))
    n = len(b)
    a_image, *a_steps = place(a_bits, span, a_mn)
    b_image, *b_steps = place(b_bits, span, b_mn)
    inputs = np.concatenate([a_image, b_image]).view(np.uint32)[:, None]
    count = n // (4 if half else 2)
    two = 0x40004000 if half else 0x40000000
    prepare = "\n".join(f"mov.b32 %d{i}, {two};" for i in range(count))
    extra = (np.zeros(1, np.uint32),)
    if registers:
        fragment = registers_of_a(a_bits)
        extra = (fragment,)
        prepare += f"mov.b64 %rd4, {fragment.ctypes.data}; mad.wide.u32 %rd5, %r500, 16, %rd4;"
        prepare += "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd5];"
    flags = f", {sign}, 1"
    if width == 2:
        flags += f", {int(b_mn)}" if registers else f", {int(a_mn)}, {int(b_mn)}"
    text = body.format(
        prepare=prepare,
        a=descriptor(0, *a_steps, span),
        b=descriptor(16384, *b_steps, span),
        accumulate=int(accumulate),
        shape=f"m64n{n}k{k}",
        types=f"{'f16' if half else 'f32'}.{kinds[0]}.{kinds[1]}",
        accumulators=", ".join(f"%d{i}" for i in range(count)),
        source="{%r10, %r11, %r12, %r13}" if registers else "%rd2",
        flags=flags,
    )
    got = run(
        text, inputs, count, threads=128, shared=32768, extra=extra, per_thread=False, seed=seed,
        hazards=hazards, fp8_accumulator_bits=bits,
    )  # fmt: skip
    return got, sign * (a @ b.T) + (2 if accumulate else 0)


def registers_of_a(bits: np.ndarray) -> np.ndarray:
    """(128, 4) registers: each thread's elements, from the figures of A's register fragment."""
    each = 4 // bits.itemsize
    result = np.zeros((128, 4 * each), bits.dtype)
    for thread, register, element in np.ndindex(128, 4, each):
        warp, lane = thread // 32, thread % 32
        row = 16 * warp + lane // 4 + 8 * (register % 2)
        column = lane % 4 * each + element + (register // 2) * 4 * each
        result[thread, register * each + element] = bits[row, column]
    return result.view(np.uint32)


def matrix_of(registers: np.ndarray) -> np.ndarray:
    """(128, N / 2) float registers to (64, N), from the figure of D's fragment."""
    result = np.full((64, 2 * registers.shape[1]), np.nan)
    for thread, i in np.ndindex(*registers.shape):
        warp, lane = thread // 32, thread % 32
        row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
        result[row, 8 * (i // 4) + 2 * (lane % 4) + i % 2] = registers[thread, i]
    return result


def check(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(matrix_of(got.view(np.float32)), expected)


@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize("kinds", [("bf16", "bf16"), ("f16", "f16"), ("e4m3", "e5m2")], ids=str)
def test_both_operands_k_major(kinds, span):
    check(*multiply(kinds, span))


@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize(("a_mn", "b_mn"), [(True, False), (False, True), (True, True)])
def test_mn_major(span, a_mn, b_mn):
    check(*multiply(("bf16", "bf16"), span, a_mn, b_mn))


@pytest.mark.parametrize("kinds", [("bf16", "bf16"), ("e5m2", "e4m3")], ids=str)
def test_a_from_registers(kinds):
    check(*multiply(kinds, registers=True))
    if kinds[0] == "bf16":
        check(*multiply(kinds, registers=True, b_mn=True))


INTEGER = (
    """wgmma.mma_async.sync.aligned.m64n{n}k32.s32.{types} {{{accumulators}}}, %rd2, %rd3, %p2;"""
)


@pytest.mark.parametrize("kinds", [("s8", "s8"), ("u8", "u8"), ("u8", "s8")], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_integers(kinds, accumulate):
    body = re.sub(r"wgmma.mma_async[^;]*;", INTEGER, BODY.replace("{types}", "")).replace(
        "{n}", "24"
    )
    body = body.replace("{types}", ".".join(kinds))
    got, expected = multiply(kinds, accumulate=accumulate, body=body)
    start = 0x40000000 - 2 if accumulate else 0  # accumulators hold the bits of 2.0
    np.testing.assert_array_equal(matrix_of(got.view(np.int32)), expected + start)


def test_tf32():
    check(*multiply(("tf32", "tf32")))


def test_fp8_accumulators_of_fewer_bits():
    """Sums of up to 32 products of 9 need 9 bits; fewer are cut towards zero."""
    got, exact = multiply(("e4m3", "e4m3"), bits=3)
    rough = matrix_of(got.view(np.float32))
    assert (rough != exact).any()
    assert (np.abs(rough) <= np.abs(exact)).all()
    assert (np.abs(rough - exact) <= np.abs(exact) / 4).all()
    check(*multiply(("e4m3", "e4m3"), bits=14))


@pytest.mark.parametrize("seed", range(4))
def test_accumulation_and_sign(seed):
    check(*multiply(("bf16", "bf16"), accumulate=True, sign=-1, seed=seed))


@pytest.mark.parametrize("accumulate", [False, True])
def test_half_precision_accumulators(accumulate):
    got, expected = multiply(("f16", "f16"), half=True, accumulate=accumulate)
    pairs = np.ascontiguousarray(got).view(np.float16).astype(np.float32)  # low half first
    check(pairs, expected)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("wgmma.wait_group.sync.aligned 0;", "", "before wgmma.wait_group"),
        (
            "wgmma.wait_group.sync.aligned 0;",
            "wgmma.wait_group.sync.aligned 1;",
            "before wgmma.wait",
        ),
        ("wgmma.commit_group.sync.aligned;", "", "before wgmma.wait_group"),
        ("wgmma.fence.sync.aligned;", "", "since the last wgmma.fence"),
        ("fence.proxy.async.shared::cta;", "", "without a fence.proxy.async"),
        (
            "wgmma.commit_group",
            "st.shared.b32 [%r1], %r3; wgmma.commit_group",
            "still being read",
        ),
    ],
)
def test_missing_synchronisation_is_noticed(old, new, message):
    with pytest.raises(simulator.HazardError, match=message):
        multiply(("bf16", "bf16"), body=BODY.replace(old, new))


def test_reading_too_early_gives_nan_when_hazards_are_off():
    body = BODY.replace("wgmma.wait_group.sync.aligned 0;", "")
    late = 1
    got, _ = multiply(("bf16", "bf16"), body=body, seed=late, hazards="off")
    assert np.isnan(got.view(np.float32)).all()


def test_fragments_are_inverse_to_the_figures():
    matrix = RNG.standard_normal((64, 48)).astype(np.float32)
    np.testing.assert_array_equal(matrix_of(fragment_d(matrix).T), matrix)
    bits = RNG.integers(0, 2**15, (64, 32)).astype(np.uint16)
    registers = np.concatenate([registers_of_a(bits[:, :16]), registers_of_a(bits[:, 16:])], axis=1)
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(fragment_a(np.ascontiguousarray(registers.T), "bf16"), wide)
