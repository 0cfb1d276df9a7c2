"""Formats of 16 and 8-bit floating-point numbers: rounding to them, widening from them.

numpy has f16 only.  The fp8 tables are built from the formats' definitions.
"""

import numpy as np

ELEMENT_BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1}
"""Bytes of an element of a matrix operand, by type."""


def _fp8_table(exponent_bits: int, mantissa_bits: int, bias: int, has_infinity: bool) -> np.ndarray:
    codes = np.arange(256)
    exponent = codes >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = codes & ((1 << mantissa_bits) - 1)
    scale = 2.0**-mantissa_bits
    value = np.where(
        exponent == 0,
        mantissa * scale * 2.0 ** (1 - bias),
        (1 + mantissa * scale) * 2.0 ** (exponent.astype(np.float64) - bias),
    )
    top = exponent == (1 << exponent_bits) - 1
    if has_infinity:
        value = np.where(top, np.where(mantissa == 0, np.inf, np.nan), value)
    else:
        value = np.where(top & (mantissa == (1 << mantissa_bits) - 1), np.nan, value)
    return np.where(codes >= 128, -value, value).astype(np.float32)


FP8 = {"e4m3": _fp8_table(4, 3, 7, False), "e5m2": _fp8_table(5, 2, 15, True)}
_FP8_FINITE = {
    name: np.sort(table[:128][np.isfinite(table[:128])]).astype(np.float64)
    for name, table in FP8.items()
}


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """Round f32 to nearest even bf16; returns the 16 bits as uint32."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16
    nan = np.isnan(x)
    return np.where(nan, np.uint32(0x7FFF), rounded) if nan.any() else rounded


def f16_bits(x: np.ndarray) -> np.ndarray:
    """Round f32 to nearest even f16; returns the 16 bits as uint32."""
    x = np.asarray(x, np.float32).astype(np.float16)
    bits = x.view(np.uint16).astype(np.uint32)
    nan = np.isnan(x)
    return np.where(nan, np.uint32(0x7FFF), bits) if nan.any() else bits


def fp8_bits(x: np.ndarray, name: str) -> np.ndarray:
    """Round f32 to nearest even fp8, saturating to the largest finite value; NaN stays NaN."""
    finite = _FP8_FINITE[name]
    magnitude = np.abs(np.asarray(x, np.float64))
    upper = np.clip(np.searchsorted(finite, magnitude), 1, len(finite) - 1)
    below, above = finite[upper - 1], finite[upper]
    distance = (magnitude - below) - (above - magnitude)
    take_upper = (distance > 0) | ((distance == 0) & (upper % 2 == 0))
    code = np.where(take_upper, upper, upper - 1).astype(np.uint32)
    code |= np.where(np.signbit(x), np.uint32(0x80), np.uint32(0))
    return np.where(np.isnan(x), np.uint32(0x7F), code)


def widen_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)
