"""Spans of warps: ranges by block and warp, as a Perfetto trace or a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hopper_attention.errors import UserError

ISSUE = "issue GEMM"
COLOURS = {
    ISSUE: "tab:green",
    "arithmetic": "tab:orange",
    "wait for WGMMA": "gainsboro",
    "wait for turn": "tab:blue",
    "wait for mbarrier": "tab:purple",
    "wait for copies": "tab:pink",
}
ROW_INCHES = 0.35
PICTURE_UNITS = 20_000
"""Units of time that a picture shows, from the middle.  The trace has everything."""


@dataclass(frozen=True)
class Span:
    block: int
    warp: int
    name: str
    """One of COLOURS."""
    start: int
    end: int
    """In `unit`s since the first stamp of the block."""


def write_perfetto(spans: Iterable[Span], path: Path, unit: str) -> None:
    """Chrome's trace format, which ui.perfetto.dev opens: a process a block, a thread a warp.

    The format knows microseconds only: one of them is one `unit`.
    """
    events = [
        {
            "name": span.name,
            "ph": "X",
            "ts": span.start,
            "dur": span.end - span.start,
            "pid": span.block,
            "tid": span.warp,
        }
        for span in spans
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, "otherData": {"unit": unit}}) + "\n")


def write_picture(spans: Sequence[Span], path: Path, unit: str, title: str) -> None:
    """A PNG of the first block's middle: a row a warpgroup, or a warp; time to the right.

    Raises UserError without spans.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not spans:
        raise UserError("nothing was recorded: the problem has no key block to attend to")
    block = min(span.block for span in spans)
    labels = _labels([s for s in spans if s.block == block])
    spans = middle([s for s in spans if s.block == block and s.warp in labels])
    warps = sorted({span.warp for span in spans})
    figure = Figure(figsize=(12, 1.2 + ROW_INCHES * len(warps)), layout="constrained")
    axis = figure.subplots()
    for row, warp in enumerate(warps):
        for name, colour in COLOURS.items():
            own = [(s.start, s.end - s.start) for s in spans if (s.warp, s.name) == (warp, name)]
            axis.broken_barh(own, (row, 0.8), facecolors=colour)  # no edges: they hide short ones
    axis.set_yticks([row + 0.4 for row in range(len(warps))], [labels[warp] for warp in warps])
    axis.invert_yaxis()
    axis.set_xlabel(unit)
    axis.set_title(title, fontsize="small")
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _labels(spans: Iterable[Span]) -> dict[int, str]:
    """The warps of a block that are shown, by their number.

    Of warpgroups that issue GEMMs, the consumers, and of one that does not, the first warp; all of
    a kernel without warpgroups.
    """
    spans = list(spans)
    warps = sorted({span.warp for span in spans})
    consumers = sorted({span.warp for span in spans if span.name == ISSUE})
    if not consumers:
        return {warp: f"warp {warp}" for warp in warps}
    labels = {warp: "producer" for warp in warps if warp % 4 == 0}
    first = [warp for warp in consumers if warp % 4 == 0]
    return labels | {warp: f"consumer {index}" for index, warp in enumerate(first)}


def middle(spans: list[Span]) -> list[Span]:
    """Return the spans in the middle `PICTURE_UNITS`, cut to it."""
    start, end = min(s.start for s in spans), max(s.end for s in spans)
    first = max(start, (start + end - PICTURE_UNITS) // 2)
    last = min(end, first + PICTURE_UNITS)
    cut = (replace(s, start=max(s.start, first), end=min(s.end, last)) for s in spans)
    return [span for span in cut if span.end > span.start]
