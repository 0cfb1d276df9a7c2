"""Single instructions, where results or speed depend on which it is."""

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint16, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op


def permute_bytes(a: Uint32, b: Uint32, selector: Int32) -> Uint32:
    """The four that `selector` names: bytes 0 to 3 are those of a, 4 to 7 those of b."""
    return Uint32(cute.arch.prmt(a, b, selector))


@dsl_user_op
def fma(a: Float32, b: Float32, c: Float32, *, loc=None, ip=None) -> Float32:
    """a * b + c, rounded once; said, not left to ptxas, because the result depends on it."""
    operands = [x.ir_value(loc=loc, ip=ip) for x in (a, b, c)]
    code = "fma.rn.f32 $0, $1, $2, $3;"
    return Float32(
        llvm.inline_asm(T.f32(), operands, code, "=f,f,f,f", has_side_effects=False, loc=loc, ip=ip)
    )


@dsl_user_op
def product(a: Float32, b: Float32, *, loc=None, ip=None) -> Float32:
    """a * b, rounded: never part of an fma."""
    operands = [x.ir_value(loc=loc, ip=ip) for x in (a, b)]
    code = "mul.rn.f32 $0, $1, $2;"
    return Float32(
        llvm.inline_asm(T.f32(), operands, code, "=f,f,f", has_side_effects=False, loc=loc, ip=ip)
    )


@dsl_user_op
def to_fp8(low: Float32, high: Float32, *, loc=None, ip=None) -> Uint16:
    """Two bytes of e4m3: nearest even, saturating."""
    operands = [x.ir_value(loc=loc, ip=ip) for x in (high, low)]
    code = "cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;"
    return Uint16(
        llvm.inline_asm(T.i16(), operands, code, "=h,f,f", has_side_effects=False, loc=loc, ip=ip)
    )


@dsl_user_op
def fmax(a: Float32, b: Float32, *, loc=None, ip=None) -> Float32:
    """The greater one; NaN if one is NaN."""
    operands = [x.ir_value(loc=loc, ip=ip) for x in (a, b)]
    code = "max.NaN.f32 $0, $1, $2;"
    return Float32(
        llvm.inline_asm(T.f32(), operands, code, "=f,f,f", has_side_effects=False, loc=loc, ip=ip)
    )
