"""Loops that add to global memory (L2): RED.128 from registers, bulk from shared memory."""

from __future__ import annotations

import numpy as np

from .kernel import Role, Work, lines
from .operands import BF16, accumulators, k_major, wgmma
from .roles import B, matrices

VECTORS = 8
"""RED.128 of a thread in one pass: a warpgroup's share of backward's dQ at d = 128."""
VALUES = [f"x{i}" for i in range(4 * VECTORS)]
SUMS = [f"sum{v}" for v in range(VECTORS)]
TILE_BYTES = VECTORS * 128 * 16
SLOTS = 4
"""Tiles that passes add to in turn: 17 MB of L2 for two warpgroups of each SM."""
BYTES_PER_CLOCK = 64
"""From an SM to L2, as the simulator has it."""
DELAY = 512
"""Dependent FFMAs of four clocks: reductions of the pass before are no longer under way."""
TILE = (np.arange(TILE_BYTES // 4) % 16).astype(np.float32)
"""What bulk reductions add, from the start of shared memory."""
WORD = 5
"""Of the tile, looked at when everything was added."""


def _red(address: str) -> list[str]:
    """Return the reduction that hopper/backward/dq_tile.py issues."""
    return [
        f"red.global.add.v4.f32 [{address}+{2048 * v}], {{{', '.join(VALUES[4 * v : 4 * v + 4])}}};"
        for v in range(VECTORS)
    ]


def _sums(address: str) -> list[str]:
    """The first of each vector of a thread, when everything was added."""
    return [
        f"ld.relaxed.gpu.global.b32 {word}, [{address}+{2048 * v}];" for v, word in enumerate(SUMS)
    ]


def reductions() -> Role:
    """RED.128 after RED.128, of registers that keep their values."""
    setup = [
        f".reg .b32 x<{len(VALUES)}>, sum<{VECTORS}>, slot;\n.reg .b64 own, at;",
        "mad.wide.u32 own, %thread, 16, %scratch;",
        "mov.b32 slot, 0;",
    ]
    for i, value in enumerate(VALUES):
        setup += [f"add.u32 %at, %thread, {i};", f"cvt.rn.f32.u32 {value}, %at;"]
    body = ["cvt.u64.u32 at, slot;", "add.u64 at, own, at;", *_red("at"), *_next_slot()]

    def expected(_copy: int, passes: int) -> np.ndarray:
        return -(-passes // SLOTS) * (np.arange(128)[:, None] + 4 * np.arange(VECTORS))

    clocks = TILE_BYTES / VECTORS / BYTES_PER_CLOCK
    return Role(
        lines(setup),
        lines(body),
        "",
        lines(_sums("own")),
        tuple(SUMS),
        (Work("RED.128 of a warpgroup, 2 KiB", VECTORS, clocks, "REDG.E.ADD.F32x4.*"),),
        expected,
        scratch_bytes=SLOTS * TILE_BYTES,
    )


def _next_slot() -> list[str]:
    return [f"add.u32 slot, slot, {TILE_BYTES};", f"and.b32 slot, slot, {SLOTS * TILE_BYTES - 1};"]


def accumulator_reuse(*, reduce: bool) -> Role:
    """WGMMA into registers that REDs have just read, and a delay in which those end.

    How much longer a pass is with `reduce` is how long the registers were not free, with the issue.
    """
    n = 2 * len(VALUES)
    setup = [
        f".reg .b32 x<{len(VALUES)}>, sum<{VECTORS}>, chain, total;\n.reg .b64 own, at, da, db;",
        "mov.b32 total, 0;",
        *(f"mov.b32 {value}, 0;" for value in VALUES),
        f"add.u64 da, %base_descriptor, {k_major(0, 64, 0)};",
        f"add.u64 db, %base_descriptor, {k_major(B, n, 0)};",
        "mad.wide.u32 own, %thread, 16, %scratch;",
        "mov.b64 at, own;",
    ]
    body = [
        *(_red("at") if reduce else ()),
        "wgmma.fence.sync.aligned;",
        wgmma(n, "x", "da", "db"),
        "wgmma.commit_group.sync.aligned;",
        "wgmma.wait_group.sync.aligned 0;",
        "mov.b32 chain, x0;",
        *["fma.rn.f32 chain, chain, 0f3F000000, 0f3E800000;"] * DELAY,  # to a half
        "add.f32 total, total, chain;",
        "cvt.rzi.u32.f32 %at, chain;",  # 0: the next REDs have to wait for it
        "mad.wide.u32 at, %at, 16, own;",
    ]

    def expected(_copy: int, passes: int) -> np.ndarray:
        (a, *_), b = matrices(n)
        product = accumulators(a[:, : BF16.k] @ b[:, : BF16.k].T)[:, ::4]
        sums = product * (passes * (passes - 1) // 2 * reduce)
        return np.hstack([sums, np.full((128, 1), passes / 2)])

    kind = f"{'REDs, ' if reduce else ''}WGMMA, delay"
    return Role(
        lines(setup),
        lines(body),
        "",
        lines(_sums("own")),
        (*SUMS, "total"),
        (Work(kind, 1, opcode=BF16.opcode.format(n=n)),),
        expected,
        scratch_bytes=TILE_BYTES,
    )


def bulk_reductions() -> Role:
    """One thread that keeps bulk reductions of a tile in flight."""
    setup = [
        ".reg .b32 slot, sum;\n.reg .b64 at;\n.reg .pred first;",
        "setp.eq.u32 first, %lane, 0;",
        "mov.b32 slot, 0;",
    ]
    body = [
        "cvt.u64.u32 at, slot;",
        "add.u64 at, %scratch, at;",
        "@first cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 "
        f"[at], [%base], {TILE_BYTES};",
        "@first cp.async.bulk.commit_group;",
        f"@first cp.async.bulk.wait_group.read {SLOTS - 1};",
        *_next_slot(),
    ]
    behind = [
        "@first cp.async.bulk.wait_group 0;",
        "bar.warp.sync -1;",
        f"ld.relaxed.gpu.global.b32 sum, [%scratch+{4 * WORD}];",
    ]

    def expected(_copy: int, passes: int) -> np.ndarray:
        return np.full((32, 1), -(-passes // SLOTS) * TILE[WORD])

    return Role(
        lines(setup),
        lines(body),
        "",
        lines(behind),
        ("sum",),
        (Work("bulk reduction of 16 KiB", 1, TILE_BYTES / BYTES_PER_CLOCK, "UBLKRED.*"),),
        expected,
        warps=1,
        scratch_bytes=SLOTS * TILE_BYTES,
    )
