"""Two runs beside each other."""

from __future__ import annotations

from dataclasses import dataclass

from hopper_attention.bench.data.results import Run, timed
from hopper_attention.bench.data.statistics import Ratio
from hopper_attention.errors import UserError


@dataclass(frozen=True)
class Change:
    problem: str
    peer: str
    mode: str
    before_ms: float
    after_ms: float
    speedup: float
    """before / after: above 1 is faster."""
    noise: float
    verdict: str
    """"faster", "slower", or "same" within the noise."""


def compare(before: Run, after: Run) -> list[Change]:
    """Return the rows that both runs timed.  Raises UserError if there are none."""
    earlier, later = timed(before.rows), timed(after.rows)
    changes = []
    for key in (key for key in earlier if key in later):
        a, b = earlier[key].milliseconds, later[key].milliseconds
        ratio = Ratio.of(b, a)
        verdict = "same"
        if ratio.is_significant:
            verdict = "faster" if ratio.value > 1 else "slower"
        changes.append(Change(*key, a.median, b.median, ratio.value, ratio.noise, verdict))
    if not changes:
        raise UserError("the two results have no measurement in common")
    return changes
