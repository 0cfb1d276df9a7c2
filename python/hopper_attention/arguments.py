"""The former place of lengths and masks, which are in `problem/values.py`; it goes with 0.2."""

from hopper_attention.problem.values import CAUSAL, FULL, Lengths, Mask

__all__ = ["CAUSAL", "FULL", "Lengths", "Mask"]
