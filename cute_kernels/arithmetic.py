"""Integer arithmetic on Python integers and traced values alike: host tests run the same code."""

import cutlass


def minimum(a, b):
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else cutlass.min(a, b)


def maximum(a, b):
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else cutlass.max(a, b)


def ceil_div(a, b: int):
    """ceil(a / b) for a >= 0 and b > 0."""
    return (a + (b - 1)) // b


def clamp(a, low, high):
    return minimum(maximum(a, low), high)
