"""Loops of one arithmetic instruction each: 32 chains x <- step(x, y, z), side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .kernel import Role, Work, lines
from .operands import bf16_bits, e4m3_bits, e5m2_bits, wgmma

VALUES = 32
"""Registers of a loop, a dependent chain each, which start as (thread + i + 1) / 256."""
ROUNDS = 4
"""Instructions of a chain that have inputs of their own."""
INPUT_BYTES = 2 * ROUNDS * 128

Words = np.ndarray
"""uint32."""


@dataclass(frozen=True)
class Instruction:
    """The step that a chain repeats, in PTX and in numpy.

    y and z come from shared memory, so that ptxas cannot know them, others in each of ROUNDS.
    """

    opcode: str
    """What ptxas makes of it, with wildcards."""
    clocks: float
    """Of a sub-core, for each: the distance at which ptxas issues them (MUFU: 16 lanes an SM)."""
    ptx: str
    """With {x}, {y} and {z}; t0, t1 and the 16-bit h0, h1 are free."""
    step: Callable[[Words, Words, Words], Words]
    y: tuple[int, ...] = (0,) * ROUNDS
    z: tuple[int, ...] = (0,) * ROUNDS
    each: int = 1
    """Of `opcode`, in one step."""
    rounds: int = ROUNDS
    """In a pass of the loop."""
    tolerance: float = 0.0

    @property
    def inputs(self) -> bytes:
        """Return y and z for each lane: a value of one address would be in uniform registers."""
        return np.repeat(np.array([self.y, self.z], np.uint32), 32).tobytes()


def _floats(step: Callable[..., np.ndarray]) -> Callable[[Words, Words, Words], Words]:
    """A step of float32 as one of words."""
    return lambda *words: step(*(w.view(np.float32) for w in words)).view(np.uint32)


def _halves(step: Callable[..., np.ndarray]) -> Callable[[Words, Words, Words], Words]:
    """A step of pairs of halves, rounded once, as one of words."""

    def rounded(*words: Words) -> Words:
        wide = step(*(w[..., None].view(np.float16).astype(np.float32) for w in words))
        return wide.astype(np.float16).view(np.uint32)[..., 0]

    return rounded


def _bits(*floats: float) -> tuple[int, ...]:
    return tuple(int(w) for w in np.array(floats, np.float32).view(np.uint32))


def _twice(*halves: float) -> tuple[int, ...]:
    """Words of two equal halves."""
    return tuple(int(h) * 0x10001 for h in np.array(halves, np.float16).view(np.uint16))


def _bytes(*parts: np.ndarray) -> Words:
    """Words of four bytes, the highest first."""
    a, b, c, d = np.broadcast_arrays(*(part.astype(np.uint32) for part in parts))
    return a << 24 | b << 16 | c << 8 | d


def _bf16_twice(x: Words, _y: Words, _z: Words) -> Words:
    half = bf16_bits(x.view(np.float32)).astype(np.uint32)
    return half | half << 16


def _codes_of_floats(x: Words, y: Words, z: Words) -> Words:
    x, y, z = (e4m3_bits(w.view(np.float32)) for w in (x, y, z))
    return _bytes(y, x, x, z)


def _codes_of_halves(x: Words, _y: Words, _z: Words) -> Words:
    low, high = (h.view(np.float16) for h in (x.astype(np.uint16), (x >> 16).astype(np.uint16)))
    return _bytes(e5m2_bits(high), e5m2_bits(low), e4m3_bits(high), e4m3_bits(low))


def _integer_codes(x: Words, y: Words, z: Words) -> Words:
    x, y = (np.clip(np.rint(w.view(np.float32)), 0, 255) for w in (x, y))
    return z << 16 | _bytes(0 * x, 0 * x, x, y)


HALF, ONE = "0f3F000000", "0f3F800000"
ENDS = _bits(0.125, 0.25, 0.1875, 0.0625)
CENTS = tuple(word * 0x10001 for word in (0x42C8, 0x42A0, 0x4300, 0x42F0))
"""float32 of 80 to 128, of which either half is the upper one of such a number."""

INSTRUCTIONS = {
    "FFMA": Instruction(
        "FFMA", 1, f"fma.rn.f32 {{x}}, {{x}}, {HALF}, {ONE};", _floats(lambda x, y, z: x / 2 + 1)
    ),
    "FFMA of registers": Instruction(
        "FFMA", 1, "fma.rn.f32 {x}, {x}, {y}, {z};", _floats(lambda x, y, z: x * y + z),
        _bits(0.5, 0.5, 0.5, 0.5), _bits(1, 2, 3, 4),
    ),
    "FADD": Instruction(
        "FADD", 1, "add.f32 {x}, {x}, {y};", _floats(lambda x, y, z: x + y), _bits(1, -1, 2, -2)
    ),
    "FMNMX": Instruction(
        "FMNMX", 2, "max.f32 {x}, {x}, {y};", _floats(lambda x, y, z: np.maximum(x, y)), ENDS
    ),
    # ptxas makes one of two dependent max.s32, but leaves max.f32 as they are.
    "VIMNMX3": Instruction(
        "VIMNMX3", 2, "max.s32 {x}, {x}, {y};\nmax.s32 {x}, {x}, {z};",
        _floats(lambda x, y, z: np.maximum(x, np.maximum(y, z))), ENDS, ENDS[::-1],
    ),
    "HFMA2": Instruction(
        "HFMA2", 2, "fma.rn.f16x2 {x}, {x}, {y}, {z};", _halves(lambda x, y, z: x * y + z),
        _twice(0.5, 0.5, 0.5, 0.5), _twice(1, 2, 3, 4),
    ),
    "HMUL2": Instruction(
        "HMUL2", 2, "mul.rn.f16x2 {x}, {x}, {y};", _halves(lambda x, y, z: x * y),
        _twice(2, 0.5, 3, 0.25),
    ),
    "HADD2": Instruction(
        "HADD2", 2, "add.rn.f16x2 {x}, {x}, {y};", _halves(lambda x, y, z: x + y),
        _twice(1, -1, 2, -2),
    ),
    "PRMT": Instruction(  # a byte of y on top of three of x
        "PRMT", 2, "prmt.b32 {x}, {x}, {y}, {z};", lambda x, y, z: x >> 8 | y << 24,
        (0x3E, 0x3D, 0x3C, 0x3B), (0x4321,) * ROUNDS,
    ),
    "LOP3": Instruction(
        "LOP3.LUT", 2, "lop3.b32 {x}, {x}, {y}, {z}, 0x96;", lambda x, y, z: x ^ y ^ z,
        ENDS, ENDS[::-1],
    ),
    "IMAD": Instruction(  # after 16 rounds nothing is left of where x began
        "IMAD", 2, "mad.lo.s32 {x}, {x}, {y}, {z};", lambda x, y, z: x * y + z,
        (2, 4, 8, 2), (1, 3, 5, 7),
    ),
    "F2FP.BF16": Instruction(
        "F2FP.BF16.F32.*", 2, "cvt.rn.bf16x2.f32 {x}, {x}, {x};", _bf16_twice
    ),
    "F2FP.E4M3 of float32": Instruction(
        "F2FP.SATFINITE.E4M3.F32.*", 2,
        "cvt.rn.satfinite.e4m3x2.f32 h1, {y}, {x};\n"
        "cvt.rn.satfinite.e4m3x2.f32 h0, {x}, {z};\n"
        "mov.b32 {x}, {{h0, h1}};",
        _codes_of_floats, _bits(1.875, 1.75, 1.625, 1.5), _bits(1, 2, 3, 4), each=2, rounds=8,
    ),
    # Each second one to e5m2: to e4m3 twice would be one.
    "F2FP.E4M3 of halves": Instruction(
        "F2FP.SATFINITE.E?M?.F16.*", 2,
        "cvt.rn.satfinite.e5m2x2.f16x2 h1, {x};\n"
        "cvt.rn.satfinite.e4m3x2.f16x2 h0, {x};\n"
        "mov.b32 {x}, {{h0, h1}};",
        _codes_of_halves, each=2, rounds=8,
    ),
    "F2IP": Instruction(
        "F2IP.U8.F32.NTZ", 2,
        "cvt.rni.s32.f32 t0, {x};\ncvt.rni.s32.f32 t1, {y};\n"
        "cvt.pack.sat.u8.s32.b32 {x}, t0, t1, {z};",
        _integer_codes, CENTS, CENTS[::-1],
    ),
    "MUFU.EX2": Instruction(  # tends to 0.641
        "MUFU.EX2", 8, "neg.f32 {x}, {x};\nex2.approx.ftz.f32 {x}, {x};",
        _floats(lambda x, y, z: np.exp2(-x)), tolerance=1e-5,
    ),
}  # fmt: skip


def arithmetic(name: str, inputs: int, count: int = 0) -> Role:
    """`count` of one of INSTRUCTIONS a pass, its y and z at `inputs` in shared memory.

    Behind the time each has a WGMMA, of whatever is in shared memory: in kernels without one
    ptxas gives half of the work on halves to another pipe (HFMA2.MMA), in attention never.
    """
    instruction = INSTRUCTIONS[name]
    count = count or VALUES * instruction.rounds * instruction.each
    steps = count // instruction.each
    assert steps % VALUES == 0, count
    y, z = ([f"{letter}{i}" for i in range(ROUNDS)] for letter in "yz")
    setup = [f".reg .b32 x<{VALUES}>, y<{ROUNDS}>, z<{ROUNDS}>, t<2>, unused<4>;\n.reg .b16 h<2>;"]
    for i in range(VALUES):
        setup += [
            f"add.u32 %at, %thread, {i + 1};",
            f"cvt.rn.f32.u32 x{i}, %at;",
            f"mul.f32 x{i}, x{i}, 0f3B800000;",  # 1 / 256
        ]
    setup.append("mad.lo.u32 %at, %lane, 4, %base;")
    for i, register in enumerate(y + z):
        setup.append(f"ld.shared.b32 {register}, [%at+{inputs + 128 * i}];")
    body = [
        instruction.ptx.format(
            x=f"x{i % VALUES}", y=y[i // VALUES % ROUNDS], z=z[i // VALUES % ROUNDS]
        )
        for i in range(steps)
    ]
    behind = [
        "wgmma.fence.sync.aligned;",
        wgmma(8, "unused", ["x0", "x1", "x2", "x3"], "%base_descriptor", accumulate=False),
        "wgmma.commit_group.sync.aligned;",
        "wgmma.wait_group.sync.aligned 0;",
    ]

    def expected(_copy: int, passes: int) -> np.ndarray:
        x = (np.arange(128)[:, None] + np.arange(VALUES) + 1) / 256
        x = x.astype(np.float32).view(np.uint32)
        words = np.array([instruction.y, instruction.z], np.uint32)[..., None]
        for i in range(min(passes * steps // VALUES, SETTLED)):
            x = instruction.step(x, *words[:, i % ROUNDS])
        return x.view(np.float32)

    return Role(
        lines(setup),
        lines(body),
        "",
        lines(behind),
        tuple(f"x{i}" for i in range(VALUES)),
        (Work(name, count, instruction.clocks, instruction.opcode),),
        expected,
        instruction.tolerance,
    )


SETTLED = 12 * ROUNDS
"""Rounds after which chains only repeat their last four."""
