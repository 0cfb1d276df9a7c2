"""The PTX around timed loops: shared memory filled, warps sent to their roles, clocks, results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from hopper_attention.profiling.stamps import PTX_VERSION

KERNEL = "micro"
MAX_GROUPS = 4


@dataclass(frozen=True)
class Work:
    """Work that a loop's pass does `count` times: a warpgroup's WGMMAs, a warp's instructions."""

    kind: str
    count: int
    model: float | None = None
    """Clocks of its unit for each, of one sub-core for a warp's instruction."""
    opcode: str = ""
    """What it is in machine code, with wildcards."""


@dataclass(frozen=True)
class Role:
    """The work of some warps' threads, as PTX in a scope of its own.

    The text may use %base (shared address of the image), %base_descriptor (the same as the low bits
    of a matrix descriptor), %image (global address), %scratch (global address of zeros that are the
    copy's own), %number (which copy of the role, from 0), %thread (of the copy, from 0), %lane, and
    the predicates %always and %never.
    """

    setup: str
    """Before the barrier behind which clocks run."""
    body: str
    """One pass of the timed loop."""
    finish: str
    """Behind the loop, inside the time."""
    behind: str
    """After the time."""
    results: tuple[str, ...]
    """32-bit registers that each thread leaves behind."""
    does: tuple[Work, ...]
    expected: Callable[[int, int], np.ndarray]
    """(copy, passes) to the results as float32, (threads, len(results))."""
    tolerance: float = 0.0
    """The allowed error of the results, relative to the largest."""
    warps: int = 4
    """A power of two."""
    scratch_bytes: int = 0
    """Of global memory."""


@dataclass(frozen=True)
class Case:
    """One kernel: groups of warps, each so many copies of a role, and what shared memory holds."""

    program: str
    name: str
    groups: tuple[tuple[Role, int], ...]
    image: bytes
    shared_memory_bytes: int = 0
    """If more than the image's."""

    def __post_init__(self) -> None:
        assert 0 < len(self.groups) <= MAX_GROUPS, "a count of passes each"
        assert len(self.image) % 16 == 0, "copied in vectors"
        assert self.threads <= 1024, self.threads

    @property
    def threads(self) -> int:
        return sum(32 * role.warps * copies for role, copies in self.groups)

    @property
    def shared_bytes(self) -> int:
        return max(len(self.image), self.shared_memory_bytes)

    @property
    def result_words(self) -> int:
        """A thread's share of the buffer of results."""
        return max(len(role.results) for role, _ in self.groups)

    @property
    def scratch_bytes(self) -> int:
        """Global memory of a block."""
        return sum(role.scratch_bytes * copies for role, copies in self.groups)

    def threads_of(self, group: int) -> range:
        first = sum(32 * role.warps * copies for role, copies in self.groups[:group])
        role, copies = self.groups[group]
        return range(first, first + 32 * role.warps * copies)

    def check(self, results: np.ndarray, passes: list[int]) -> list[str]:
        """Return faults of the results, uint32 (threads, result_words)."""
        wrong = []
        for index, (role, copies) in enumerate(self.groups):
            mine = results[list(self.threads_of(index)), : len(role.results)].view(np.float32)
            for copy, got in enumerate(np.split(mine, copies)):
                expected = role.expected(copy, passes[index]).astype(np.float32)
                same = got.view(np.uint32) == expected.view(np.uint32)  # of NaN, too
                error = np.where(same, 0.0, np.abs(got - expected)).max(initial=0.0)
                if not error <= role.tolerance * np.abs(expected).max(initial=1.0):
                    what = " and ".join(work.kind for work in role.does)
                    wrong.append(f"{self.name}: {what}, copy {copy}: off by {error:g}")
        return wrong

    def ptx(self) -> str:
        """Parameters: addresses of image, results, clocks and scratch, passes of each group."""
        first, dispatch, texts, scratch = 0, [], [], 0
        for index, (role, copies) in enumerate(self.groups):
            last = first + role.warps * copies
            dispatch.append(f"setp.lt.u32 %here, %warp, {last};\n@%here bra GROUP_{index};")
            texts.append(_group(index, role, first, scratch))
            first, scratch = last, scratch + copies * role.scratch_bytes
        return _KERNEL.format(
            version=PTX_VERSION,
            kernel=KERNEL,
            threads=self.threads,
            vectors=len(self.image) // 16,
            result_bytes=4 * self.result_words,
            warps=self.threads // 32,
            scratch_bytes=self.scratch_bytes,
            dispatch="\n".join(dispatch),
            groups="\n".join(texts),
        )


_KERNEL = """\
.version {version}
.target sm_90a
.address_size 64

.extern .shared .align 1024 .b8 memory[];

.visible .entry {kernel}(
	.param .u64 image,
	.param .u64 results,
	.param .u64 clocks,
	.param .u64 scratch,
	.param .align 4 .b8 passes[16]
)
.reqntid {threads}, 1, 1
{{
.reg .pred %here, %more, %always, %never;
.reg .b32 %self, %warp, %lane, %thread, %number, %base, %block, %left, %at;
.reg .b32 %w<4>;
.reg .b64 %image, %results, %clocks, %scratch, %from, %base_descriptor, %start, %stop;
ld.param.u64 %image, [image];
ld.param.u64 %results, [results];
ld.param.u64 %clocks, [clocks];
ld.param.u64 %scratch, [scratch];
setp.eq.u32 %always, 0, 0;
setp.ne.u32 %never, 0, 0;
mov.u32 %self, %tid.x;
mov.u32 %block, %ctaid.x;
mov.b32 %base, memory;
shr.u32 %at, %base, 4;
cvt.u64.u32 %base_descriptor, %at;
and.b32 %lane, %self, 31;
shr.u32 %warp, %self, 5;
shfl.sync.idx.b32 %warp, %warp, 0, 31, -1;
mov.u32 %left, %self;
FILL:
setp.lt.u32 %more, %left, {vectors};
@!%more bra FILLED;
mad.wide.u32 %from, %left, 16, %image;
mad.lo.u32 %at, %left, 16, %base;
ld.global.v4.b32 {{%w0, %w1, %w2, %w3}}, [%from];
st.shared.v4.b32 [%at], {{%w0, %w1, %w2, %w3}};
add.u32 %left, %left, {threads};
bra FILL;
FILLED:
fence.proxy.async.shared::cta;
bar.sync 0;
mad.wide.u32 %results, %self, {result_bytes}, %results;  // the same of every block
mad.lo.u32 %at, %block, {warps}, %warp;
mad.wide.u32 %clocks, %at, 16, %clocks;
mad.wide.u32 %scratch, %block, {scratch_bytes}, %scratch;
{dispatch}
ret;
{groups}
}}
"""

_GROUP = """\
GROUP_{index}:
{{
sub.u32 %number, %warp, {first};
and.b32 %thread, %self, 31;
mad.lo.u32 %thread, %number, 32, %thread;
shr.u32 %number, %number, {log2_warps};
shfl.sync.idx.b32 %number, %number, 0, 31, -1;  // uniform: descriptors in uniform registers
mul.lo.u32 %at, %number, {threads};
sub.u32 %thread, %thread, %at;
mad.lo.u32 %at, %number, {scratch_bytes}, {scratch};
cvt.u64.u32 %from, %at;
add.u64 %scratch, %scratch, %from;
ld.param.u32 %left, [passes+{parameter}];
{setup}
bar.sync 0;
mov.u64 %start, %clock64;
LOOP_{index}:
{body}
sub.u32 %left, %left, 1;
setp.ne.u32 %more, %left, 0;
@%more bra LOOP_{index};
{finish}
mov.u64 %stop, %clock64;
st.global.v2.u64 [%clocks], {{%start, %stop}};
{behind}
{stores}
ret;
}}
"""


def lines(statements: Iterable[str]) -> str:
    return "\n".join(statements)


def _group(index: int, role: Role, first: int, scratch: int) -> str:
    stores = (f"st.global.b32 [%results+{4 * i}], {r};" for i, r in enumerate(role.results))
    return _GROUP.format(
        index=index,
        first=first,
        log2_warps=role.warps.bit_length() - 1,
        threads=32 * role.warps,
        scratch=scratch,
        scratch_bytes=role.scratch_bytes,
        parameter=4 * index,
        setup=role.setup,
        body=role.body,
        finish=role.finish,
        behind=role.behind,
        stores="\n".join(stores),
    )
