"""The former place of `hopper_attention.quantize.Lengths`; it goes with version 0.2."""

from hopper_attention.problem.values import Lengths

__all__ = ["Lengths"]
