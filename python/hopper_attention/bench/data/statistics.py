"""Medians and spreads of repeated measurements, and ratios between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Statistics of one series of samples, in the samples' unit."""

    median: float
    spread: float
    """Half the distance between the quartiles, as a fraction of the median."""
    minimum: float
    count: int

    @staticmethod
    def of(samples: Sequence[float]) -> Summary:
        """Raises ValueError without samples."""
        if not samples:
            raise ValueError("no samples")
        low, median, high = (float(x) for x in np.quantile(samples, [0.25, 0.5, 0.75]))
        spread = (high - low) / 2 / median if median else 0.0
        return Summary(median, spread, float(min(samples)), len(samples))


@dataclass(frozen=True)
class Ratio:
    """after / before of two medians."""

    value: float
    noise: float
    """Relative, from both spreads: a change within it says nothing."""

    @staticmethod
    def of(before: Summary, after: Summary) -> Ratio:
        return Ratio(after.median / before.median, math.hypot(before.spread, after.spread))

    @property
    def is_significant(self) -> bool:
        return abs(self.value - 1) > self.noise
