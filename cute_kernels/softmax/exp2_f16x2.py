"""Two halves (IEEE, 16 bits) in one register, and their exponentials without MUFU.

An instruction on a register of halves serves two exponentials.  ptxas issues one every two clocks
(its rate was not measured); MUFU takes eight clocks for one exponential.  `exp2_pair` is as exact
as P in e4m3 needs it, where rounding errs by 2.6 % (rms; 6.25 % at most): 0.31 % (rms; 0.53 % at
most), exact for powers of two, and 0 below 2^-15, where e4m3 has been 0 since 2^-10.

With x = n + f, 0 <= f < 1, the integer (x + 15) 2^10 is, read as a half, 2^n (1 + f): the line that
meets 2^x where f is 0 (Schraudolph, Neural Computation 11, 1999).  What is missing, 2^f / (1 + f),
is a parabola of 1 + f, the half's mantissa.  FlashAttention-4 has a share of its exponentials
computed by polynomials, too, in float32.
"""

import functools
import struct

from cutlass import Float32, Int32
from hopper_attention.cute_kernels.primitives.instructions import number, word

SMALLEST = -15
"""log2 of what becomes 0."""
OCTAVES = 32.0
"""The range of a half's exponent."""
PARABOLA = (0.243408203125, -0.72607421875, 1.482421875)
"""2^(h - 1) / h for 1 <= h < 2, highest power first, as halves: 1 where h is 1, mean error 2e-5."""
ONES = 2.0**23
"""float32 from here on are integers, with the last bit for 1."""


def exp2_pair(x: tuple[Float32, Float32], scale: Float32, shift: Float32) -> Int32:
    """exp2(x * scale - shift) of both; their scale and shift from `fractions`.  NaN becomes 0."""
    fractions = [_multiply_add_saturated(value, scale, shift) for value in x]
    integers = [value * 2.0**15 + ONES for value in fractions]
    line = _lower_halves(*integers)
    mantissa = _mantissas(line)
    a, b, c = map(_twice, PARABOLA)
    return multiply(line, _multiply_add(mantissa, _multiply_add(mantissa, a, b), c))


def fractions(scale: Float32, shift: Float32) -> tuple[Float32, Float32]:
    """Factors for `exp2_pair`: x * scale - shift as a fraction of the exponent's range."""
    return scale * (1.0 / OCTAVES), shift * (-1.0 / OCTAVES) - SMALLEST / OCTAVES


def pair_of(value: Float32) -> Int32:
    """Twice the same."""
    return word("cvt.rn.f16x2.f32 $0, $1, $1;", value)


def multiply(a: Int32, b: Int32) -> Int32:
    return word("mul.rn.f16x2 $0, $1, $2;", a, b)


def sum_of(pairs: list[Int32]) -> Float32:
    """Pairwise: each half is rounded as seldom as can be."""
    while len(pairs) > 1:
        pairs = [functools.reduce(_add, pairs[i : i + 2]) for i in range(0, len(pairs), 2)]
    return number(
        "{ .reg .b16 low, high; .reg .f32 a, b; mov.b32 {low, high}, $1; "
        "cvt.f32.f16 a, low; cvt.f32.f16 b, high; add.rn.f32 $0, a, b; }",
        pairs[0],
    )


def _twice(constant: float) -> Int32:
    return Int32(int.from_bytes(2 * struct.pack("<e", constant), "little", signed=True))


def _add(a: Int32, b: Int32) -> Int32:
    return word("add.rn.f16x2 $0, $1, $2;", a, b)


def _multiply_add(a: Int32, b: Int32, c: Int32) -> Int32:
    return word("fma.rn.f16x2 $0, $1, $2, $3;", a, b, c)


def _multiply_add_saturated(a: Float32, b: Float32, c: Float32) -> Float32:
    """Clamped to [0, 1]."""
    return number("fma.rn.sat.f32 $0, $1, $2, $3;", a, b, c)


def _lower_halves(low: Float32, high: Float32) -> Int32:
    return word("prmt.b32 $0, $1, $2, 0x5410;", low, high)


def _mantissas(pair: Int32) -> Int32:
    """1 <= mantissa < 2 of both.  One instruction, as one of the constants is in a register."""
    return word(
        "{ .reg .b32 one; mov.b32 one, 0x3c003c00; lop3.b32 $0, $1, 0x03ff03ff, one, 0xea; }", pair
    )
