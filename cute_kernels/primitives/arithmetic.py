"""Integer arithmetic on Python integers and traced values alike: host tests run the same code."""

import cutlass
from cutlass import Int32
from cutlass.cutlass_dsl import select_


def minimum(a, b):
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else cutlass.min(a, b)


def maximum(a, b):
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else cutlass.max(a, b)


def ceil_div(a, b: int):
    """ceil(a / b) for a >= 0 and b > 0."""
    return (a + (b - 1)) // b


def clamp(a, low, high):
    return minimum(maximum(a, low), high)


def select(condition, a, b):
    """a if condition else b."""
    if isinstance(condition, bool):
        return a if condition else b
    return Int32(select_(condition, Int32(a), Int32(b)))
