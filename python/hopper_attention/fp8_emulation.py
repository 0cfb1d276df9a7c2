"""The former place of `hopper_attention.reference.fp8`; it goes with version 0.2."""

from hopper_attention.reference.fp8 import (
    EXACT,
    HOPPER,
    PLAIN,
    Arithmetic,
    Cut,
    attention,
    dequantized,
    exactly,
)

__all__ = ["EXACT", "HOPPER", "PLAIN", "Arithmetic", "Cut", "attention", "dequantized", "exactly"]
