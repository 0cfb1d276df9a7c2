"""Single instructions, where results or speed depend on which it is."""

from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint16, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op


def permute_bytes(a: Uint32, b: Uint32, selector: Int32) -> Uint32:
    """The four that `selector` names: bytes 0 to 3 are those of a, 4 to 7 those of b."""
    return Uint32(cute.arch.prmt(a, b, selector))


@dsl_user_op
def _asm(kind: Any, code: str, result: str, operands: tuple, *, loc=None, ip=None) -> Any:
    letters = ["r" if isinstance(x, Int32) else "f" for x in operands]
    values = [x.ir_value(loc=loc, ip=ip) for x in operands]
    constraints = ",".join([result, *letters])
    return llvm.inline_asm(kind, values, code, constraints, has_side_effects=False, loc=loc, ip=ip)


def word(code: str, *operands: Any) -> Int32:
    """The Int32 that PTX leaves in $0, of operands $1 and so on; it has no side effects."""
    return Int32(_asm(T.i32(), code, "=r", operands))


def number(code: str, *operands: Any) -> Float32:
    """The Float32 that PTX leaves in $0."""
    return Float32(_asm(T.f32(), code, "=f", operands))


def fma(a: Float32, b: Float32, c: Float32) -> Float32:
    """a * b + c, rounded once; said, not left to ptxas, because the result depends on it."""
    return number("fma.rn.f32 $0, $1, $2, $3;", a, b, c)


def product(a: Float32, b: Float32) -> Float32:
    """a * b, rounded: never part of an fma."""
    return number("mul.rn.f32 $0, $1, $2;", a, b)


def fmax(a: Float32, b: Float32) -> Float32:
    """The greater one; NaN if one is NaN."""
    return number("max.NaN.f32 $0, $1, $2;", a, b)


def to_fp8(low: Float32, high: Float32) -> Uint16:
    """Two bytes of e4m3: nearest even, saturating."""
    code = "cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;"
    return Uint16(_asm(T.i16(), code, "=h", (high, low)))
