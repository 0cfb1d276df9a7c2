"""A compiled kernel that writes down when its warps wait and issue, without its sources.

The instance's own PTX gets clock stamps: the first lane of every warp of the first blocks writes
(clock << 8 | mark) to a buffer, its address a further parameter.  NVIDIA's in-kernel tracer (IKET)
was the alternative: it needs marks in the sources, and the DSL with its compiler in the profiled
process; this needs the driver's PTX compiler only, and works for every instance.

The stamps cost registers and issue slots, and ptxas may schedule around them otherwise than in the
kernel that is shipped: trust the picture for who waits for whom, not for totals.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hopper_attention.errors import UserError
from hopper_attention.profiling.spans import ISSUE, Span

CAPACITY = 4096
"""Stamps of a warp; later ones are lost."""
STAMP_BYTES = 8

PTX_VERSION = "8.7"
"""The PTX version that the oldest supported driver (CUDA 12.8) compiles."""

BEGIN = "// begin inline asm"
END = "// end inline asm"

ARITHMETIC = "arithmetic"

EVENTS: tuple[tuple[str, str], ...] = (
    (r"mbarrier\.try_wait", "wait for mbarrier"),
    (r"\bbar(?:rier)?\.sync(?:\.aligned)?\s+(?!\s|0\s*;)", "wait for turn"),
    (r"wgmma\.wait_group", "wait for WGMMA"),
    (r"cp\.async\.wait_(?:group|all)", "wait for copies"),  # Ampere's kernels
)
"""PTX that a warp may wait in -> name of the range around it."""
ISSUE_STARTS, ISSUE_ENDS = r"wgmma\.fence", r"wgmma\.commit_group"

NAMES = (*(name for _, name in EVENTS), ISSUE)
"""Mark 2 i + 1 starts range i, 2 i + 2 ends it; 0 is an empty slot."""

PROLOGUE = """\
	.reg .pred 	%stamp_on, %stamp_fits;
	.reg .b32 	%stamp_lane, %stamp_warp, %stamp_block;
	.reg .b64 	%stamp_at, %stamp_end, %stamp_value;
	mov.u32 	%stamp_warp, %tid.x;
	and.b32 	%stamp_lane, %stamp_warp, 31;
	shr.u32 	%stamp_warp, %stamp_warp, 5;
	mov.u32 	%stamp_block, %ctaid.x;
	setp.lt.u32 	%stamp_on, %stamp_block, {blocks};
	setp.eq.and.u32 	%stamp_on, %stamp_lane, 0, %stamp_on;
	mad.lo.s32 	%stamp_warp, %stamp_block, {warps}, %stamp_warp;
	ld.param.b64 	%stamp_value, [{parameter}];
	mul.wide.u32 	%stamp_at, %stamp_warp, {bytes};
	add.s64 	%stamp_at, %stamp_at, %stamp_value;
	add.s64 	%stamp_end, %stamp_at, {bytes};
"""

STAMP = """\
	mov.u64 	%stamp_value, %clock64;
	shl.b64 	%stamp_value, %stamp_value, 8;
	or.b64 	%stamp_value, %stamp_value, {mark};
	setp.lt.and.u64 	%stamp_fits, %stamp_at, %stamp_end, %stamp_on;
	@%stamp_fits st.global.b64 	[%stamp_at], %stamp_value;
	add.s64 	%stamp_at, %stamp_at, 8;
"""


@dataclass(frozen=True)
class Stamped:
    ptx: str
    kernel: str
    blocks: int
    warps: int
    """Warps of a block."""

    @property
    def slots(self) -> int:
        """The size of the buffer: 64-bit words, zero before the launch."""
        return self.blocks * self.warps * CAPACITY


def instrument(ptx: str, kernel: str, blocks: int) -> Stamped:
    """Raises UserError for PTX that is not laid out as the DSL's compiler writes it."""
    entry = re.search(
        rf"\.entry {kernel}\((?P<parameters>[^)]*)\)\s*\.reqntid (?P<threads>\d+)[^{{]*\{{\n"
        r"(?P<registers>(?:\s*\.reg [^\n]*\n)*)(?P<body>.*\n)\}",
        ptx,
        re.S,
    )
    if entry is None:
        raise UserError(f"cannot put stamps into the PTX of {kernel}")
    warps = int(entry["threads"]) // 32
    parameter = f"{kernel}_stamps"
    prologue = PROLOGUE.format(
        blocks=blocks, warps=warps, parameter=parameter, bytes=CAPACITY * STAMP_BYTES
    )
    text = (
        ptx[: entry.end("parameters")].rstrip()
        + f",\n\t.param .u64 {parameter}\n"
        + ptx[entry.end("parameters") : entry.end("registers")]
        + prologue
        + "".join(_stamped(entry["body"].splitlines(keepends=True)))
        + ptx[entry.end("body") :]
    )
    text = re.sub(r"^\.version .*$", f".version {PTX_VERSION}", text, count=1, flags=re.M)
    return Stamped(text, kernel, blocks, warps)


def _stamped(lines: Sequence[str]) -> Iterator[str]:
    for statement in _statements(lines):
        before, after = _marks(statement)
        if before:
            yield STAMP.format(mark=before)
        yield statement
        if after:
            yield STAMP.format(mark=after)


def _statements(lines: Sequence[str]) -> Iterator[str]:
    """Lines, but inline assembly as a whole."""
    pending: list[str] = []
    for line in lines:
        pending.append(line)
        inside = pending[0].strip() == BEGIN
        if not inside or line.strip() == END:
            yield "".join(pending)
            pending = []
    assert not pending, "unfinished inline assembly"


def _marks(statement: str) -> tuple[int, int]:
    """Marks before and after a statement; 0 for none."""
    for index, (pattern, _) in enumerate(EVENTS):
        if re.search(pattern, statement):
            return 2 * index + 1, 2 * index + 2
    issue = NAMES.index(ISSUE)
    if re.search(ISSUE_STARTS, statement):
        return 2 * issue + 1, 0
    if re.search(ISSUE_ENDS, statement):
        return 0, 2 * issue + 2
    return 0, 0


def decode(buffer: np.ndarray, stamped: Stamped) -> list[Span]:
    """The ranges of all warps, and what lies between them as `arithmetic`.

    `buffer`: uint64, of `stamped.slots` words.
    """
    by_block = buffer.reshape(stamped.blocks, stamped.warps, CAPACITY)
    spans: list[Span] = []
    for block, warps in enumerate(by_block):
        written = warps[warps != 0]
        if written.size:
            first = int(written.min() >> 8)
            for warp, stamps in enumerate(warps):
                spans += _warp_spans(block, warp, stamps[stamps != 0], first)
    return spans


def _warp_spans(block: int, warp: int, stamps: np.ndarray, first: int) -> Iterator[Span]:
    started: dict[int, int] = {}
    previous: int | None = None
    for stamp in stamps.tolist():
        time, (index, is_end) = (stamp >> 8) - first, divmod((stamp & 0xFF) - 1, 2)
        if not is_end:
            if previous is not None and not started and time > previous:
                yield Span(block, warp, ARITHMETIC, previous, time)
            started.setdefault(index, time)
        elif index in started:
            yield Span(block, warp, NAMES[index], started.pop(index), time)
            previous = time
