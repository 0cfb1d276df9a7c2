"""Conversions, cvt, between integers, f32, f16, bf16 and the fp8 formats.

cvt.rn.bf16x2.f32 d, a, b puts a into the high half and b into the low half, as the other packed
conversions do.
"""

import numpy as np

from hopper_attention.simulator.hardware.formats import (
    FP8,
    bf16_bits,
    f16_bits,
    fp8_bits,
    widen_bf16,
)
from hopper_attention.simulator.instructions.arithmetic import VIEW, simple
from hopper_attention.simulator.instructions.registry import HELPERS, helper, pure
from hopper_attention.simulator.ptx.parser import Instruction
from hopper_attention.simulator.ptx.vectorize import BITS, Operation


@helper
def bf16_pair(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return bf16_bits(high) << 16 | bf16_bits(low)


@helper
def f16_pair(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return f16_bits(high) << 16 | f16_bits(low)


@helper
def fp8_pair(high: np.ndarray, low: np.ndarray, name: str) -> np.ndarray:
    return (fp8_bits(high, name) << 8 | fp8_bits(low, name)).astype(np.uint16)


@helper
def to_integer(x: np.ndarray, mode: str, dtype: type) -> np.ndarray:
    """Convert floats to integers: rounded, clamped to the range, NaN to 0."""
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode]
    limits = np.iinfo(dtype)
    value = np.nan_to_num(rounding(x.astype(np.float64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
    result = np.clip(value, limits.min, limits.max)
    clipped: np.ndarray = np.where(result >= limits.max, 0, result).astype(dtype)
    return np.where(result >= limits.max, dtype(limits.max), clipped)


@helper
def saturated_pair(
    high: np.ndarray, low: np.ndarray, below: np.ndarray | int, name: str
) -> np.ndarray:
    """Put two integers, clamped to the format `name`, below the lower bits of `below`."""
    signed, bits = name[0] == "s", int(name[1:])
    least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    mask = (1 << bits) - 1
    first, second = (np.clip(x, least, most).astype(np.int64) & mask for x in (high, low))
    both = (first << bits | second).astype(np.uint64)
    above = np.asarray(below).astype(np.uint64) << np.uint64(2 * bits)
    return (both | above).astype(np.uint32)


_DTYPE = {
    "u8": "uint8", "s8": "int8", "u16": "uint16", "s16": "int16", "u32": "uint32", "s32": "int32",
    "u64": "uint64", "s64": "int64",
}  # fmt: skip


_PACKS = {f"cvt.pack.sat.{name}.s32": name for name in ("u16", "s16")}
_PACKS_BELOW = {
    f"cvt.pack.sat.{name}.s32.b32": name for name in ("u8", "s8", "u4", "s4", "u2", "s2")
}
"""Opcode -> type; a third operand fills the bits above the two numbers."""


def _pack(instruction: Instruction) -> list[Operation]:
    opcode = instruction.opcode
    if opcode in _PACKS:
        return simple(
            instruction, f"saturated_pair({{0}}, {{1}}, 0, {_PACKS[opcode]!r})", "U", "II"
        )
    if opcode in _PACKS_BELOW:
        text = f"saturated_pair({{0}}, {{1}}, {{2}}, {_PACKS_BELOW[opcode]!r})"
        return simple(instruction, text, "U", "IIU")
    raise instruction.unknown(opcode)


@pure("cvt")
def _cvt(instruction: Instruction) -> list[Operation]:
    parts = instruction.parts
    if parts[1] == "pack":
        return _pack(instruction)
    to, source = parts[-2], parts[-1]
    modifiers = set(parts[1:-2])
    if to in ("bf16x2", "f16x2") and source == "f32" and modifiers <= {"rn", "ftz"}:
        return simple(instruction, f"{to[:-2]}_pair({{0}}, {{1}})", "F", "FF", "U")
    if to in ("e4m3x2", "e5m2x2") and source == "f32" and modifiers <= {"rn", "satfinite"}:
        return simple(instruction, f"fp8_pair({{0}}, {{1}}, {to[:4]!r})", "F", "FF", "H")
    if to in ("e4m3x2", "e5m2x2") and source == "f16x2" and modifiers <= {"rn", "satfinite"}:
        halves = (f"({{0}}{shift}).astype(np.uint16).view(np.float16)" for shift in (" >> 16", ""))
        text = f"fp8_pair({', '.join(halves)}, {to[:4]!r})"
        return simple(instruction, text, "U", "U", "H")
    if to == "f16x2" and source in ("e4m3x2", "e5m2x2"):
        table = f"{source[:4]}_f16"
        text = f"{table}[{{0}} & 255] | {table}[{{0}} >> 8] << 16"
        return simple(instruction, text, "H", "H", "U")
    if to == "bf16" and source == "f32" and modifiers <= {"rn"}:
        return simple(instruction, "bf16_bits({0})", "F", "F", "H")
    if to == "f32" and source == "bf16" and not modifiers:
        return simple(instruction, "widen_bf16({0})", "H", "H", "F")
    if to == "f16" and source == "f32" and modifiers <= {"rn"}:
        return simple(instruction, "f16_bits({0})", "F", "F", "H")
    if to == "f32" and source == "f16" and not modifiers:
        return simple(instruction, "{0}", "E", "E", "F")
    return _scalar(instruction, to, source, modifiers)


def _scalar(instruction: Instruction, to: str, source: str, modifiers: set[str]) -> list[Operation]:
    out = "U" if to == "b32" else VIEW.get(to)
    view = VIEW.get(source)
    if out is None or view is None:
        raise instruction.unknown(f"cvt.{to}.{source}")
    if source in _DTYPE and to in _DTYPE and not modifiers - {"sat"}:
        if "sat" in modifiers:
            raise instruction.unknown("saturating integer conversion")
        destination, operand = instruction.operands
        register_bits = getattr(operand, "bits", BITS[view])
        view = {16: "H", 32: "U", 64: "W"}[register_bits]
        wide = {16: "H", 32: "U", 64: "W"}[destination.bits]
        # The source's low bits, sign or zero extended, cut to the target and extended again.
        text = f"{{0}}.astype(np.{_DTYPE[source]}).astype(np.{_DTYPE[to]})"
        text += f".astype(np.{'int' if to[0] == 's' else 'uint'}{BITS[wide]})"
        text += f".view(np.uint{BITS[wide]})" if to[0] == "s" else ""
        return simple(instruction, text, view, view, wide)
    if source in ("f32", "f64") and to in _DTYPE:
        mode = (modifiers & {"rni", "rzi", "rmi", "rpi"}) or {"rzi"}
        text = f"to_integer({{0}}, {mode.pop()!r}, np.{_DTYPE[to]})"
        return simple(instruction, text, view, view, out)
    if source in _DTYPE and to in ("f32", "f64", "f16"):
        return simple(instruction, f"{{0}}.astype(np.{_DTYPE[source]})", view, view, out)
    if source in ("f32", "f64") and to in ("f32", "f64") and modifiers <= {"rn"}:
        return simple(instruction, "{0}", view, view, out)
    if source == to == "f32" and len(modifiers) == 1 and modifiers <= {"rni", "rzi", "rmi", "rpi"}:
        names = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
        return simple(instruction, f"np.{names[modifiers.pop()]}({{0}}{{out}})", "F", "F")
    raise instruction.unknown(f"cvt.{to}.{source} with {sorted(modifiers)}")


def _install() -> None:
    """Make roundings and tables callable from generated code."""
    for function in (bf16_bits, f16_bits, widen_bf16):
        helper(function)
    for name, table in FP8.items():
        HELPERS[f"{name}_f16"] = table.astype(np.float16).view(np.uint16).astype(np.uint32)


_install()
