"""Arithmetic on f16, bf16 and pairs of them: computed wider and rounded once.

A register of two elements holds the first in its low half.  f16 of one element has numpy's own
type and stays with arithmetic.py where that rounds correctly.
"""

from collections.abc import Callable

import numpy as np

from hopper_attention.simulator.hardware.formats import bf16_bits
from hopper_attention.simulator.instructions.arithmetic import require
from hopper_attention.simulator.instructions.registry import PURE, helper, pure
from hopper_attention.simulator.ptx.parser import SINK, Immediate, Instruction
from hopper_attention.simulator.ptx.vectorize import Operation

_FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
    "neg": lambda a: -a,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
    "min.NaN": np.minimum,
    "max.NaN": np.maximum,
    "ex2": np.exp2,
    "tanh": np.tanh,
}


def _widen(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def _round(x: np.ndarray, kind: str, clamp: str) -> np.ndarray:
    """Round to odd at f32 first: the second rounding then gives what one would."""
    if clamp == "relu":
        x = np.where(np.isnan(x), x, np.maximum(x, 0.0))
    elif clamp == "sat":
        x = np.fmin(np.fmax(x, 0.0), 1.0)
    if kind == "f16":
        half = x.astype(np.float16)
        return np.where(np.isnan(x), np.uint16(0x7FFF), half.view(np.uint16)).astype(np.uint32)
    single = x.astype(np.float32)
    bits = single.view(np.uint32)
    inexact = np.isfinite(x) & (single.astype(np.float64) != x)
    down = np.abs(single.astype(np.float64)) > np.abs(x)
    bits = np.where(inexact, (bits - down.astype(np.uint32)) | np.uint32(1), bits)
    return bf16_bits(np.ascontiguousarray(bits, np.uint32).view(np.float32))


@helper
def packed(name: str, kind: str, clamp: str, pair: bool, *operands: np.ndarray) -> np.ndarray:
    """Apply the operation to each element of 16 or 32-bit registers."""
    operands = tuple(np.atleast_1d(np.asarray(x)) for x in operands)
    function = _FUNCTIONS[name]
    low = _round(function(*(_widen(x & 0xFFFF, kind) for x in operands)), kind, clamp)
    if not pair:
        return low.astype(np.uint16)
    upper = _round(function(*(_widen(x >> 16, kind) for x in operands)), kind, clamp)
    return low | upper.astype(np.uint32) << np.uint32(16)


_KINDS = ("f16x2", "bf16x2", "bf16", "f16")
_MODIFIERS = {
    "add": "rn sat", "sub": "rn sat", "mul": "rn sat", "fma": "rn sat relu", "neg": "", "abs": "",
    "min": "NaN", "max": "NaN", "ex2": "approx ftz", "tanh": "approx",
}  # fmt: skip


def _translate(instruction: Instruction) -> list[Operation]:
    name, kind = instruction.parts[0], instruction.parts[-1]
    require(instruction, _MODIFIERS[name])
    modifiers = instruction.parts[1:-1]
    clamp = next((part for part in ("relu", "sat") if part in modifiers), "")
    pair = kind.endswith("x2")
    view = "U" if pair else "H"
    destination, *sources = instruction.operands
    if destination == SINK:
        return []
    inputs = [(view, Immediate(x.value) if isinstance(x, Immediate) else x) for x in sources]
    values = ", ".join(f"{{{k}}}" for k in range(len(inputs)))
    full = f"{name}.NaN" if "NaN" in modifiers else name
    text = f"packed({full!r}, {kind.removesuffix('x2')!r}, {clamp!r}, {pair}, {values})"
    return [Operation(instruction, text, [(view, destination)], inputs, guard=instruction.guard)]


def _install() -> None:
    """Take instructions of these kinds; others stay with arithmetic.py."""
    for name in _MODIFIERS:

        def choose(instruction: Instruction, other=PURE[name]) -> list[Operation]:
            mine = instruction.parts[-1] in _KINDS
            return _translate(instruction) if mine else other(instruction)

        PURE[name] = choose


_install()


@pure("movmatrix", modifiers="sync aligned m8n8 trans")
def _transpose(instruction: Instruction) -> list[Operation]:
    """Translate movmatrix: each warp holds an 8x8 matrix of halves, a row in four lanes."""
    target, source = instruction.operands
    line = "{d0} = transpose_matrix(L, {0})"
    return [Operation(instruction, line, [("U", target)], [("U", source)], effect="load")]


@helper
def transpose_matrix(lanes, value: np.ndarray) -> np.ndarray:
    matrix = np.ascontiguousarray(value).reshape(-1, 32).view(np.uint16).reshape(-1, 8, 8)
    return np.ascontiguousarray(matrix.transpose(0, 2, 1)).reshape(-1).view(np.uint32)
