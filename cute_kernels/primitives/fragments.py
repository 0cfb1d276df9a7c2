"""WGMMA accumulator fragments: views, conversion, ties to a point of the program."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op
from hopper_attention.cute_kernels.primitives.instructions import number, to_fp8, word


def rows_and_columns(acc: cute.Tensor) -> cute.Tensor:
    """((2, 2, N/8), M, N) accumulator as (rows of this thread, columns of this thread)."""
    (c, r, v), m, n = acc.shape
    (sc, sr, sv), sm, sn = acc.stride
    layout = cute.make_layout(((r, m), (c, v, n)), stride=((sr, sm), (sc, sv, sn)))
    return cute.make_tensor(acc.iterator, layout)


def _convert_pair(low, high, dtype) -> cutlass.Int32:
    ptx_type = {cutlass.BFloat16: "bf16x2", cutlass.Float16: "f16x2"}[dtype]
    return word(f"cvt.rn.{ptx_type}.f32 $0, $1, $2;", high, low)


def converted_pair(low: cutlass.Float32, high: cutlass.Float32, dtype) -> cute.Tensor:
    """Two elements of `dtype` in registers, as what is stored at once."""
    if dtype is cutlass.Float32:
        pair = cute.make_rmem_tensor((2,), dtype)
        pair[0], pair[1] = low, high
        return pair
    packed = to_fp8(low, high) if dtype.width == 8 else _convert_pair(low, high, dtype)
    pair = cute.make_rmem_tensor((1,), type(packed))
    pair[0] = packed
    return pair


@dataclass(frozen=True)
class PackedFragment:
    """A 16-bit fragment kept in 32-bit registers.

    A plain bf16 fragment that lives across loop iterations is converted and carried element by
    element: twice the registers, and spills (nvidia-cutlass-dsl 4.8.1; fp16 is spared).
    """

    words: cute.Tensor
    view: cute.Tensor
    """The registers with the accumulator's shape and the 16-bit type."""

    @staticmethod
    def like(acc: cute.Tensor, dtype) -> "PackedFragment":
        words = cute.make_rmem_tensor((cute.size(acc) // 2,), cutlass.Int32)
        iterator = cute.recast_tensor(words, dtype).iterator
        return PackedFragment(words, cute.make_tensor(iterator, cute.make_layout(acc.shape)))

    @property
    def rows_and_pairs(self) -> cute.Tensor:
        """(rows of this thread, pairs of columns): one word each."""
        layout = cute.make_layout((2, cute.size(self.words) // 2))
        return cute.make_tensor(self.words.iterator, layout)

    def part(self, index: int, parts: int) -> "PackedFragment":
        """The columns of one of `parts` equal shares: the same registers."""
        size = cute.size(self.words) // parts
        words = cute.make_tensor(self.words.iterator + index * size, cute.make_layout(size))
        (c, r, v), m, n = self.view.shape
        iterator = cute.recast_tensor(words, self.view.element_type).iterator
        layout = cute.make_layout(((c, r, v // parts), m, n))
        return PackedFragment(words, cute.make_tensor(iterator, layout))

    def convert(self, acc: cute.Tensor) -> None:
        """Round a float32 accumulator into this fragment, two elements an instruction."""
        for i in range(cute.size(self.words)):
            self.words[i] = _convert_pair(acc[2 * i], acc[2 * i + 1], self.view.element_type)

    def unpacked(self, i: int) -> cutlass.Float32:
        """Element i in float32: a shift or a mask of bf16, a conversion of fp16."""
        pair, high = self.words[i // 2], i % 2 == 1
        if self.view.element_type is cutlass.BFloat16:
            return (pair & -65536 if high else pair << 16).bitcast(cutlass.Float32)
        place = "ignored, half" if high else "half, ignored"
        code = f"{{ .reg .b16 half, ignored; mov.b32 {{{place}}}, $1; cvt.f32.f16 $0, half; }}"
        return number(code, pair)


def _convert_four(values) -> cutlass.Int32:
    """To e4m3: four float32, or two registers of halves."""
    kind, low, high = ("f32", "$2, $1", "$4, $3") if len(values) == 4 else ("f16x2", "$1", "$2")
    code = (
        f"{{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.{kind} low, {low}; "
        f"cvt.rn.satfinite.e4m3x2.{kind} high, {high}; mov.b32 $0, {{low, high}}; }}"
    )
    return word(code, *values)


@dataclass(frozen=True)
class Fp8Fragment:
    """A float32 accumulator as the e4m3 A operand of the next GEMM, of which it has the columns.

    A thread holds columns 2t, 2t + 1, 8 + 2t and 9 + 2t of every 16, where the operand wants 4t to
    4t + 3.  Nothing is moved: the operand's column 4t + 2x + c is the accumulator's 8x + 2t + c,
    and B's rows must lie in that order (`interleaved`).
    """

    words: cute.Tensor
    """Four columns each: rows r and r + 8 of the first 16 columns, then of the second."""
    f16x2_groups: tuple[int, ...]
    """A thread's groups of four columns that come as two registers of halves."""

    @staticmethod
    def like(acc: cute.Tensor, f16x2_groups: tuple[int, ...]) -> "Fp8Fragment":
        words = cute.make_rmem_tensor((cute.size(acc) // 4,), cutlass.Int32)
        return Fp8Fragment(words, f16x2_groups)

    def convert(self, acc: cute.Tensor) -> None:
        for i in range(cute.size(self.words)):
            places = _places(i)
            if i // 2 in self.f16x2_groups:
                pairs = (acc[place].bitcast(cutlass.Int32) for place in places[:2])
                self.words[i] = _convert_four(list(pairs))
            else:
                self.words[i] = _convert_four([acc[place] for place in places])


def _places(i: int) -> tuple[int, int, int, int]:
    """Return the elements of an accumulator that are word i of an e4m3 operand."""
    group, row = divmod(i, 2)
    start = 8 * group + 2 * row
    return start, start + 1, start + 4, start + 5


@dataclass(frozen=True)
class CodedFragment:
    """An `Fp8Fragment` whose bytes come as numbers: rounded to the nearest of 0 to 255.

    What is below, -inf and NaN become 0.  ptxas makes one F2IP of two roundings and a packing.
    """

    words: cute.Tensor

    @staticmethod
    def like(acc: cute.Tensor) -> "CodedFragment":
        return CodedFragment(cute.make_rmem_tensor((cute.size(acc) // 4,), cutlass.Int32))

    def convert(self, acc: cute.Tensor) -> None:
        code = (
            "{ .reg .b32 a, b, c, d; "
            "cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $2; "
            "cvt.rni.s32.f32 c, $3; cvt.rni.s32.f32 d, $4; "
            "cvt.pack.sat.u8.s32.b32 c, d, c, 0; cvt.pack.sat.u8.s32.b32 $0, b, a, c; }"
        )
        for i in range(cute.size(self.words)):
            self.words[i] = word(code, *(acc[place] for place in _places(i)))


def interleaved(column: int) -> int:
    """Which column of the accumulator an e4m3 operand's column is (`Fp8Fragment`)."""
    block, t, x, c = column // 16, column % 16 // 4, column // 2 % 2, column % 2
    return 16 * block + 8 * x + 2 * t + c


@dsl_user_op
def pin(fragment: cute.Tensor, *, loc=None, ip=None) -> None:
    """Tie a float32 fragment to this point of the program; costs no instruction.

    `wgmma.wait_group` has no data dependency on the accumulators, so the compiler may move their
    first use above it, and ptxas then waits after every WGMMA (remark C7514).  Call it after each
    wait, as CUTLASS does with `warpgroup_fence_operand`.
    """
    n = cute.size(fragment)
    values = [fragment[i].ir_value(loc=loc, ip=ip) for i in range(n)]
    constraints = ",".join(["=f"] * n + [str(i) for i in range(n)])
    result = llvm.inline_asm(
        llvm.StructType.get_literal([T.f32()] * n),
        values,
        "",
        constraints,
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )
    for i in range(n):
        fragment[i] = cutlass.Float32(llvm.extractvalue(T.f32(), result, [i], loc=loc, ip=ip))


@dsl_user_op
def opaque(value, *, loc=None, ip=None):
    """The value, kept in a register: ptxas cannot compute it again in a loop."""
    kind, letter = {32: (T.i32(), "r"), 64: (T.i64(), "l")}[value.width]
    copy = llvm.inline_asm(
        kind,
        [value.ir_value(loc=loc, ip=ip)],
        f"mov.b{value.width} $0, $1;",
        f"={letter},{letter}",
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )
    return type(value)(copy)
