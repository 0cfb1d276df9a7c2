"""Integer, floating-point and logic arithmetic, comparison and selection.

f32 arithmetic is numpy float32.  fma is computed in float64 and rounded once more to float32: the
product is exact there, the sum is rounded twice, which differs from a true fma in about one case in
2^29.  ex2, lg2, rcp, rsqrt, sqrt and tanh ``.approx`` are float64 functions rounded to float32: at
least as accurate as hardware; calibration against a device belongs here.
"""

import numpy as np

from hopper_attention.simulator.instructions.registry import helper, pure
from hopper_attention.simulator.ptx.parser import (
    SINK,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Pair,
    Vector,
)
from hopper_attention.simulator.ptx.vectorize import BITS, Operation

VIEW = {
    "b8": "H", "u8": "H", "s8": "S", "b16": "H", "u16": "H", "s16": "S", "f16": "E",
    "b32": "U", "u32": "U", "s32": "I", "f32": "F",
    "b64": "W", "u64": "W", "s64": "J", "f64": "D", "pred": "P",
}  # fmt: skip
_TINY = np.float32(2.0**-126)


def view_of(instruction: Instruction, position: int = -1) -> str:
    kind = instruction.parts[position]
    if kind not in VIEW:
        raise instruction.unknown(f"type .{kind}")
    return VIEW[kind]


def require(instruction: Instruction, allowed: str) -> None:
    """Refuse modifiers that would change the result."""
    for part in instruction.parts[1:-1]:
        if part not in allowed.split():
            raise instruction.unknown(f"modifier .{part}")


def simple(
    instruction: Instruction,
    expression: str,
    view: str,
    inputs: str,
    out: str = "",
    chain: str = "",
) -> list[Operation]:
    """Return one operation on operands 1.., read through the views in ``inputs``."""
    destination = instruction.operands[0]
    if destination == SINK:
        return []
    pairs = list(zip(inputs, instruction.operands[1:], strict=True))
    return [
        Operation(
            instruction,
            expression,
            [(out or view, destination)],
            pairs,
            "",
            chain,
            instruction.guard,
        )
    ]


@helper
def ftz(x: np.ndarray) -> np.ndarray:
    """Flush subnormal float32 values to zero of the same sign."""
    small = np.abs(x) < _TINY
    return np.where(small, np.copysign(np.float32(0), x), x) if small.any() else x


@helper
def approx(function, x: np.ndarray) -> np.ndarray:
    return function(x.astype(np.float64)).astype(np.float32)


@helper
def reciprocal(x: np.ndarray) -> np.ndarray:
    return 1.0 / x


@helper
def reciprocal_root(x: np.ndarray) -> np.ndarray:
    return 1.0 / np.sqrt(x)


@helper
def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    product = np.multiply(a, b, dtype=np.float64)
    return np.add(product, c, out=product).astype(np.float32)


@helper
def fma16(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) * b + c).astype(np.float16)


@helper
def saturate(x: np.ndarray) -> np.ndarray:
    return np.fmin(np.fmax(x, np.float32(0)), np.float32(1))


@helper
def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the upper half of a 32x32-bit product; signed or unsigned by the operands' type."""
    wide = np.int64 if np.asarray(a).dtype.kind == "i" else np.uint64
    return (np.multiply(a, b, dtype=wide) >> wide(32)).astype(np.uint32)


@helper
def high64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the upper half of an unsigned 64x64-bit product."""
    mask, a, b = np.uint64(0xFFFFFFFF), np.asarray(a, np.uint64), np.asarray(b, np.uint64)
    s = np.uint64(32)
    a0, a1, b0, b1 = a & mask, a >> s, b & mask, b >> s
    middle = a1 * b0 + (a0 * b0 >> s)
    return a1 * b1 + (middle >> s) + ((a0 * b1 + (middle & mask)) >> s)


@helper
def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divide integers towards zero; by zero gives all ones as the hardware does."""
    a, b = np.broadcast_arrays(a, b)
    zero = b == 0
    safe = np.where(zero, 1, b).astype(a.dtype)
    result = a // safe
    if a.dtype.kind == "i":
        result = result + ((result < 0) & (result * safe != a))
    return np.where(zero, a.dtype.type(-1) if a.dtype.kind == "i" else ~a.dtype.type(0), result)


def _float(instruction: Instruction, expression: str, view: str, count: int, chain: str = ""):
    """Return float arithmetic with .ftz and .sat applied around the expression."""
    parts = instruction.parts
    if "ftz" in parts and view == "F":
        for k in range(count):
            expression = expression.replace(f"{{{k}}}", f"ftz({{{k}}})")
        expression, chain = f"ftz({expression.replace('{out}', '')})", ""
    if "sat" in parts:
        expression, chain = f"saturate({expression.replace('{out}', '')})", ""
    return simple(instruction, expression, view, view * count, chain=chain)


_BINARY = {"add": "np.add", "sub": "np.subtract", "mul": "np.multiply"}


@pure("add", "sub", "mul", modifiers="rn ftz sat wide hi lo")
def _add(instruction: Instruction) -> list[Operation]:
    name, parts, view = instruction.parts[0], instruction.parts, view_of(instruction)
    if view in "FED":
        require(instruction, "rn ftz sat")
        chain = "add" if name == "add" and view == "F" else ""
        return _float(instruction, _BINARY[name] + "({0}, {1}{out})", view, 2, chain)
    if "wide" in parts:
        wide, dtype = {
            "S": ("I", "np.int32"), "H": ("U", "np.uint32"),
            "I": ("J", "np.int64"), "U": ("W", "np.uint64"),
        }[view]  # fmt: skip
        return simple(
            instruction, f"np.multiply({{0}}, {{1}}, dtype={dtype}{{out}})", view, view * 2, wide
        )
    if "hi" in parts:
        require(instruction, "hi")
        if view in "UI":
            return simple(instruction, "high({0}, {1})", view, view * 2, "U")
        if view == "W":
            return simple(instruction, "high64({0}, {1})", view, "WW")
        if view in "SH":
            wide, narrow = {"S": ("np.int32", "np.int16"), "H": ("np.uint32", "np.uint16")}[view]
            text = f"(np.multiply({{0}}, {{1}}, dtype={wide}) >> 16).astype({narrow})"
            return simple(instruction, text, view, view * 2)
        raise instruction.unknown(f"mul.hi.{parts[-1]}")
    require(instruction, "lo")
    return simple(instruction, _BINARY[name] + "({0}, {1}{out})", view, view * 2)


@pure("fma", "mad", modifiers="rn ftz sat wide hi lo relu")
def _fma(instruction: Instruction) -> list[Operation]:
    view = view_of(instruction)
    if view == "F":
        require(instruction, "rn ftz sat")
        return _float(instruction, "fma({0}, {1}, {2})", view, 3)
    if view == "E":
        require(instruction, "rn")
        return simple(instruction, "fma16({0}, {1}, {2})", view, "EEE")
    if view == "D":
        require(instruction, "rn")
        return simple(instruction, "{0} * {1} + {2}", view, "DDD")
    if "wide" in instruction.parts:
        require(instruction, "wide")
        wide, dtype = {
            "S": ("I", "np.int32"), "H": ("U", "np.uint32"),
            "I": ("J", "np.int64"), "U": ("W", "np.uint64"),
        }[view]  # fmt: skip
        text = f"np.multiply({{0}}, {{1}}, dtype={dtype}) + {{2}}"
        return simple(instruction, text, view, view * 2 + wide, wide)
    if "hi" in instruction.parts and view in "UI":
        require(instruction, "hi")
        return simple(instruction, "high({0}, {1}) + {2}", view, view * 2 + "U", "U")
    require(instruction, "lo")
    return simple(instruction, "np.add(np.multiply({0}, {1}), {2}{out})", view, view * 3)


@pure("div", "rem", modifiers="rn approx full ftz")
def _div(instruction: Instruction) -> list[Operation]:
    view = view_of(instruction)
    if view in "FD":
        require(instruction, "rn approx full ftz")
        return _float(instruction, "np.divide({0}, {1}{out})", view, 2)
    require(instruction, "")
    text = "quotient({0}, {1})"
    if instruction.parts[0] == "rem":
        text = "({0} - quotient({0}, {1}) * {1})"
    return simple(instruction, text, view, view * 2)


@pure("min", "max", modifiers="ftz NaN relu")
def _min(instruction: Instruction) -> list[Operation]:
    """Translate min and max; without .NaN, a NaN operand is ignored: numpy's fmin and fmax."""
    name, view = instruction.parts[0], view_of(instruction)
    if view not in "FED":
        require(instruction, "relu")
        if "relu" in instruction.parts:
            clamped = f"np.maximum(np.{name}imum({{0}}, {{1}}), 0{{out}})"
            return simple(instruction, clamped, view, view * 2)
        return simple(instruction, f"np.{name}imum({{0}}, {{1}}{{out}})", view, view * 2)
    require(instruction, "ftz NaN")
    ufunc = f"np.{name}imum" if "NaN" in instruction.parts else f"np.f{name}"
    chain = "" if "NaN" in instruction.parts or view != "F" else f"f{name}"
    return _float(instruction, ufunc + "({0}, {1}{out})", view, 2, chain)


@pure("neg", "abs", modifiers="ftz")
def _neg(instruction: Instruction) -> list[Operation]:
    view = view_of(instruction)
    ufunc = "np.negative" if instruction.parts[0] == "neg" else "np.abs"
    if view in "FED":
        return _float(instruction, ufunc + "({0}{out})", view, 1)
    require(instruction, "")
    return simple(instruction, ufunc + "({0}{out})", view, view)


_APPROX = {
    "ex2": "np.exp2", "lg2": "np.log2", "rcp": "reciprocal", "rsqrt": "reciprocal_root",
    "sqrt": "np.sqrt", "tanh": "np.tanh", "sin": "np.sin", "cos": "np.cos",
}  # fmt: skip


@pure(*_APPROX, modifiers="approx ftz rn")
def _approx(instruction: Instruction) -> list[Operation]:
    view = view_of(instruction)
    if view != "F":
        raise instruction.unknown(f"{instruction.parts[0]} of .{instruction.parts[-1]}")
    require(instruction, "approx ftz rn")
    return _float(instruction, f"approx({_APPROX[instruction.parts[0]]}, {{0}})", "F", 1)


@pure("and", "or", "xor", "not", "cnot", modifiers="")
def _logic(instruction: Instruction) -> list[Operation]:
    name, view = instruction.parts[0], view_of(instruction)
    if name == "not":
        return simple(instruction, "np.invert({0}{out})", view, view)
    if name == "cnot":
        return simple(instruction, "({0} == 0)", view, view)
    return simple(instruction, f"np.bitwise_{name}({{0}}, {{1}}{{out}})", view, view * 2)


@pure("lop3", modifiers="")
def _lop3(instruction: Instruction) -> list[Operation]:
    if instruction.parts != ("lop3", "b32"):
        raise instruction.unknown("lop3 with a predicate")
    destination, *sources, table = instruction.operands
    terms = []
    for bit in range(8):
        if table.value >> bit & 1:
            terms.append("&".join(_as_is_or_not(k, x, bit) for k, x in enumerate(sources)))
    text = "|".join(f"({term})" for term in terms) or "0"
    inputs = [("U", x) for x in sources]
    return [Operation(instruction, text, [("U", destination)], inputs, guard=instruction.guard)]


def _as_is_or_not(place: int, source: Operand, row: int) -> str:
    """Return a source as it stands in that row of the truth table."""
    if row >> (2 - place) & 1:
        return f"{{{place}}}"
    # `~` would make a negative Python integer of a constant.
    return f"({{{place}}}^0xffffffff)" if isinstance(source, Immediate) else f"~{{{place}}}"


@pure("shl", "shr", modifiers="")
def _shift(instruction: Instruction) -> list[Operation]:
    """Translate shifts; amounts beyond the width give 0 or the sign, in PTX and in numpy alike."""
    name, view = instruction.parts[0], view_of(instruction)
    ufunc = "np.left_shift" if name == "shl" else "np.right_shift"
    destination, value, amount = instruction.operands
    if isinstance(amount, Immediate):
        inputs = [(view, value), (view, Immediate(min(amount.value, BITS[view])))]
        text = ufunc + "({0}, {1}{out})"
    else:
        dtype = {"H": "uint16", "S": "int16", "U": "uint32", "I": "int32"}.get(view)
        dtype = dtype or {"W": "uint64", "J": "int64"}[view]
        inputs = [(view, value), ("U", amount)]
        text = ufunc + f"({{0}}, np.minimum({{1}}, {BITS[view]}).astype(np.{dtype}){{out}})"
    return [Operation(instruction, text, [(view, destination)], inputs, guard=instruction.guard)]


@helper
def funnel(a: np.ndarray, b: np.ndarray, c: np.ndarray, left: bool, wrap: bool) -> np.ndarray:
    both = np.asarray(b).astype(np.uint64) << np.uint64(32) | a
    amount = (c & np.uint32(31)) if wrap else np.minimum(c, np.uint32(32))
    amount = np.asarray(amount).astype(np.uint64)
    if left:
        return (both << amount >> np.uint64(32)).astype(np.uint32)
    return (both >> amount).astype(np.uint32)


@pure("shf", modifiers="l r clamp wrap")
def _funnel(instruction: Instruction) -> list[Operation]:
    left, wrap = "l" in instruction.parts, "wrap" in instruction.parts
    return simple(instruction, f"funnel({{0}}, {{1}}, {{2}}, {left}, {wrap})", "U", "UUU")


@helper
def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = np.asarray(b).astype(np.uint64) << np.uint64(32) | a
    selector = np.asarray(selector, np.uint32)
    result = np.zeros(np.shape(both), np.uint32)
    for k in range(4):
        nibble = selector >> np.uint32(4 * k)
        byte = (both >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(
            np.uint32
        )
        byte = byte & np.uint32(0xFF)
        sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        byte = np.where(nibble & np.uint32(8), sign, byte)
        result = result | byte << np.uint32(8 * k)
    return result


@pure("prmt", modifiers="")
def _permute(instruction: Instruction) -> list[Operation]:
    if len(instruction.parts) != 2:
        raise instruction.unknown("prmt with a mode")
    return simple(instruction, "permute({0}, {1}, {2})", "U", "UUU")


@helper
def extract(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    length = np.minimum(np.asarray(length) & np.uint32(0xFF), np.uint32(32)).astype(np.uint64)
    mask = (np.uint64(1) << length) - np.uint64(1)
    shifted = np.asarray(a).astype(np.uint64) >> (np.asarray(position) & np.uint32(0xFF)).astype(
        np.uint64
    )
    return (shifted & mask).astype(np.uint32)


@helper
def extract_signed(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Extract bits; those beyond the top are copies of the sign; a length of 0 gives 0."""
    length = np.minimum(np.asarray(length) & np.uint32(0xFF), np.uint32(32)).astype(np.int64)
    position = np.minimum(np.asarray(position) & np.uint32(0xFF), np.uint32(31)).astype(np.int64)
    shifted = np.asarray(a).astype(np.int64) >> position
    spare = 64 - length
    field = np.where(length == 0, 0, shifted << np.minimum(spare, 63) >> np.minimum(spare, 63))
    return field.astype(np.int32)


@helper
def insert(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    length = np.minimum(np.asarray(length) & np.uint32(0xFF), np.uint32(32)).astype(np.uint64)
    position = (np.asarray(position) & np.uint32(0xFF)).astype(np.uint64)
    mask = ((np.uint64(1) << length) - np.uint64(1)) << position
    value = np.asarray(a).astype(np.uint64) << position
    return ((np.asarray(b).astype(np.uint64) & ~mask) | (value & mask)).astype(np.uint32)


@pure("bfe", "bfi", modifiers="")
def _bit_field(instruction: Instruction) -> list[Operation]:
    if instruction.parts[0] == "bfe" and instruction.parts[1:] == ("s32",):
        return simple(instruction, "extract_signed({0}, {1}, {2})", "I", "IUU")
    if instruction.parts[1:] not in (("u32",), ("b32",)):
        raise instruction.unknown(instruction.opcode)
    if instruction.parts[0] == "bfe":
        return simple(instruction, "extract({0}, {1}, {2})", "U", "UUU")
    return simple(instruction, "insert({0}, {1}, {2}, {3})", "U", "UUUU")


@helper
def bit_mask(position: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Return ones from `position` up, `width` of them as far as there is room."""
    position, width = (np.minimum(x, 32).astype(np.uint64) for x in (position, width))
    ones = (np.uint64(1) << width) - np.uint64(1)
    return (ones << position).astype(np.uint32)


@pure("bmsk.clamp")
def _bit_mask(instruction: Instruction) -> list[Operation]:
    require(instruction, "clamp")
    return simple(instruction, "bit_mask({0}, {1})", view_of(instruction), "UU")


@helper
def count_bits(a: np.ndarray) -> np.ndarray:
    raw = np.ascontiguousarray(a)[..., None].view(np.uint8)
    return np.unpackbits(raw, axis=-1).sum(axis=-1, dtype=np.uint32)


@helper
def highest_bit(a: np.ndarray, bits: int) -> np.ndarray:
    """Return the position of the highest set bit, -1 for zero."""
    a = np.asarray(a, np.uint64)
    high, low = (a >> np.uint64(32), a & np.uint64(0xFFFFFFFF))
    upper, lower = (np.frexp(x.astype(np.float64))[1] - 1 for x in (high, low))
    return np.where(high > 0, upper + 32, lower) if bits == 64 else lower


@helper
def reverse_bits(a: np.ndarray) -> np.ndarray:
    a = np.asarray(a, np.uint32)
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F)):
        a = (a >> np.uint32(shift) & np.uint32(mask)) | (a & np.uint32(mask)) << np.uint32(shift)
    return a.byteswap()


@pure("popc", "clz", "brev", "bfind", modifiers="shiftamt")
def _bits(instruction: Instruction) -> list[Operation]:
    name, view = instruction.parts[0], view_of(instruction)
    if name == "popc":
        return simple(instruction, "count_bits({0})", view, view, "U")
    if name == "brev" and view == "U":
        return simple(instruction, "reverse_bits({0})", "U", "U")
    if view in "UW" and len(instruction.parts) == 2 and name in ("clz", "bfind"):
        text = f"highest_bit({{0}}, {BITS[view]})"
        return simple(instruction, f"31 - {text}" if name == "clz" and view == "U" else (
            f"63 - {text}" if name == "clz" else text), view, view, "I")  # fmt: skip
    raise instruction.unknown(instruction.opcode)


# ---------------------------------------------------------------------- comparison and selection

_COMPARE = {
    "eq": "np.equal", "ne": "np.not_equal", "lt": "np.less", "le": "np.less_equal",
    "gt": "np.greater", "ge": "np.greater_equal", "lo": "np.less", "ls": "np.less_equal",
    "hi": "np.greater", "hs": "np.greater_equal",
}  # fmt: skip
_UNORDERED = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}


def _comparison(instruction: Instruction, name: str, view: str) -> str:
    if name in _COMPARE:
        if name == "ne" and view in "FED":  # ordered: false when an operand is NaN
            return "(({0} < {1}) | ({0} > {1}))"
        return _COMPARE[name] + "({0}, {1}{out})"
    if view in "FED":
        if name == "neu":
            return "np.not_equal({0}, {1}{out})"
        if name == "equ":
            return "~(({0} < {1}) | ({0} > {1}))"
        if name in _UNORDERED:
            return "~" + _COMPARE[_UNORDERED[name]] + "({0}, {1})"
        if name == "nan":
            return "(np.isnan({0}) | np.isnan({1}))"
        if name == "num":
            return "~(np.isnan({0}) | np.isnan({1}))"
    raise instruction.unknown(f"comparison .{name}")


@pure(
    "setp",
    "set",
    modifiers="eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu nan num and or xor ftz",
)
def _setp(instruction: Instruction) -> list[Operation]:
    parts, operands, view = instruction.parts, instruction.operands, view_of(instruction)
    if parts[0] == "set":
        raise instruction.unknown("set; only setp is")
    text = _comparison(instruction, parts[1], view)
    modifiers = [part for part in parts[2:-1] if part != "ftz"]
    inputs: list[tuple[str, Operand]] = [(view, operands[1]), (view, operands[2])]
    target = operands[0]
    second = None
    if isinstance(target, Pair):
        target, second = target.first, target.second
    if modifiers:
        if modifiers[0] not in ("and", "or", "xor") or second is not None:
            raise instruction.unknown(f"modifier .{modifiers[0]}")
        inputs.append(("P", operands[3]))
        text = f"np.bitwise_{modifiers[0]}({text.replace('{out}', '')}, {{2}}{{out}})"
    result = []
    for register, expression in ((target, text), (second, f"~{text.replace('{out}', '')}")):
        if register is not None and register != SINK:
            result.append(
                Operation(
                    instruction, expression, [("P", register)], inputs, guard=instruction.guard
                )
            )
    return result


@pure("selp", modifiers="")
def _selp(instruction: Instruction) -> list[Operation]:
    view = {"F": "U", "D": "W", "E": "H"}.get(view_of(instruction), view_of(instruction))
    destination, a, b, predicate = instruction.operands
    if isinstance(predicate, Negated):
        a, b, predicate = b, a, predicate.register
    a, b = (
        Immediate(x.value) if isinstance(x, Immediate) and x.float_bits == BITS[view] else x
        for x in (a, b)
    )
    inputs = [("P", predicate), (view, a), (view, b)]
    text = "where({0}, {1}, {2})"
    return [Operation(instruction, text, [(view, destination)], inputs, guard=instruction.guard)]


@pure("mov", modifiers="")
def _mov(instruction: Instruction) -> list[Operation]:
    if instruction.parts[-1] == "b128":  # two 64-bit registers on either side
        pairs = zip(*(operand.items for operand in instruction.operands), strict=True)
        return [
            Operation(instruction, "{0}", [("W", to)], [("W", source)], guard=instruction.guard)
            for to, source in pairs
            if to != SINK
        ]
    view = {"F": "U", "D": "W", "E": "H", "I": "U", "J": "W", "S": "H"}.get(
        view_of(instruction), view_of(instruction)
    )
    destination, source = instruction.operands
    if isinstance(destination, Vector):
        return _unpack(instruction, destination, source, view)
    if isinstance(source, Vector):
        return _pack(instruction, destination, source, view)
    if isinstance(source, Immediate) and source.float_bits == BITS[view]:
        source = Immediate(source.value)
    return [
        Operation(
            instruction, "{0}", [(view, destination)], [(view, source)], guard=instruction.guard
        )
    ]


def _unpack(
    instruction: Instruction, destination: Vector, source: Operand, view: str
) -> list[Operation]:
    """Translate mov.b32 {low, high}, r: the first item takes the low bits."""
    bits = BITS[view] // len(destination.items)
    small = {32: "U", 16: "H"}.get(bits)
    if small is None:
        raise instruction.unknown("mov to a vector of bytes")
    result = []
    for k, register in enumerate(destination.items):
        if register == SINK:
            continue
        text = (
            f"({{0}} >> {k * bits}).astype(np.uint{bits})" if k else f"{{0}}.astype(np.uint{bits})"
        )
        result.append(
            Operation(
                instruction, text, [(small, register)], [(view, source)], guard=instruction.guard
            )
        )
    return result


def _pack(
    instruction: Instruction, destination: Operand, source: Vector, view: str
) -> list[Operation]:
    bits = BITS[view] // len(source.items)
    small = {32: "U", 16: "H"}.get(bits)
    if small is None:
        raise instruction.unknown("mov from a vector of bytes")
    dtype = f"np.uint{BITS[view]}"
    text = " | ".join(f"{dtype}({{{k}}}) << {k * bits}" for k in range(len(source.items)))
    inputs = [(small, Immediate(x.value) if isinstance(x, Immediate) else x) for x in source.items]
    return [Operation(instruction, text, [(view, destination)], inputs, guard=instruction.guard)]
