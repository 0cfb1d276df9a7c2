"""Loops of one kind of work each: WGMMA, shared-memory traffic, both beside each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .arithmetic import INPUT_BYTES
from .kernel import Role, Work, lines
from .operands import (
    BF16,
    Format,
    a_fragments,
    accumulators,
    bf16_bits,
    k_major,
    mn_major,
    swizzled,
    wgmma,
)

STEPS = 4
"""32 bytes of K each: K = 64 of bf16, 128 of e4m3."""
WGMMAS = 8
"""WGMMAs of a pass: all steps twice."""
COPIES = 3
A_BYTES = 64 * 128
FRAGMENTS = COPIES * A_BYTES
B = FRAGMENTS + A_BYTES
B_BYTES = 256 * 128
INPUTS = B + B_BYTES
"""Of arithmetic."""
FREE = INPUTS + INPUT_BYTES
"""The offset from which the operands leave shared memory free."""


def matrices(n: int, form: Format = BF16) -> tuple[list[np.ndarray], np.ndarray]:
    """A of each copy (64, K) and B (N, K): small integers, so that sums are exact."""
    random, k = np.random.default_rng(n), STEPS * form.k
    return [random.integers(-2, 3, (64, k)).astype(np.float64) for _ in range(COPIES)], (
        random.integers(-2, 3, (n, k)).astype(np.float64)
    )


def operand_image(
    n: int, *, form: Format = BF16, b_mn_major: bool = False, inputs: bytes = bytes(INPUT_BYTES)
) -> bytes:
    """A of each copy, the fragments of the first, B, inputs of arithmetic."""
    a, b = matrices(n, form)
    first = [form.bits(matrix) for matrix in a]
    second = swizzled(form.bits(b.T if b_mn_major else b))
    image = b"".join(map(swizzled, first)) + a_fragments(first[0]) + second
    return image.ljust(INPUTS, b"\0") + inputs


def multiply(
    *widths: int, from_registers: bool, form: Format = BF16, b_mn_major: bool = False
) -> Role:
    """WGMMA with N of `widths` in turn, each into its accumulator, up to two groups in flight.

    Copies have their own A in shared memory, the same one in registers, and share B, of which
    smaller N read the first columns.  QGMMA keeps about 14 bits of its sums, too few for exact ones
    of all passes: they begin anew in each.
    """
    fragments = [[f"a{4 * s + r}" for r in range(4)] for s in range(STEPS)]
    n = max(widths)
    setup = [
        *(f".reg .b32 acc{n}_<{n // 2}>;" for n in widths),
        f".reg .b32 a<{4 * STEPS}>;",
        f".reg .b64 own, da<{STEPS}>, db<{STEPS}>;",
        *(f"mov.b32 acc{n}_{i}, 0;" for n in widths for i in range(n // 2)),
        f"mul.wide.u32 own, %number, {A_BYTES >> 4};",
        "add.u64 own, own, %base_descriptor;",
        "mad.lo.u32 %at, %thread, 16, %base;",
    ]
    for s in range(STEPS):
        if from_registers:
            place = FRAGMENTS + s * 128 * 16
            setup.append(f"ld.shared.v4.b32 {{{', '.join(fragments[s])}}}, [%at+{place}];")
        else:
            setup.append(f"add.u64 da{s}, own, {k_major(0, 64, s)};")
        b_descriptor = mn_major(B, 64, s) if b_mn_major else k_major(B, n, s)
        setup.append(f"add.u64 db{s}, %base_descriptor, {b_descriptor};")
    body = ["wgmma.fence.sync.aligned;"]
    for i in range(WGMMAS):
        s = i % STEPS
        a = fragments[s] if from_registers else f"da{s}"
        going_on = form is BF16 or i > 0
        body += [
            wgmma(
                n, f"acc{n}_", a, f"db{s}",
                form=form, b_mn_major=b_mn_major, accumulate=going_on,
            )
            for n in widths
        ]  # fmt: skip
    body += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 1;"]

    def expected(copy: int, passes: int) -> np.ndarray:
        a, b = matrices(n, form)
        product = WGMMAS / STEPS * (a[0 if from_registers else copy] @ b.T)
        product = product * passes if form is BF16 else product
        return np.hstack([accumulators(product[:, :n]) for n in widths])

    name = "WGMMA" if form is BF16 else "QGMMA"
    clocks = sum(widths) / 2
    return Role(
        lines(setup),
        lines(body),
        "wgmma.wait_group.sync.aligned 0;",
        "",
        tuple(f"acc{n}_{i}" for n in widths for i in range(n // 2)),
        tuple(
            Work(
                f"{name} N={n}, all N" if widths[1:] else name,
                WGMMAS,
                clocks,
                form.opcode.format(n=n),
            )
            for n in widths
        ),
        expected,
    )


def beside(first: Role, second: Role) -> Role:
    """Both in the same warps: the second's work between the first's issue and its wait."""
    *issue, wait = first.body.splitlines()
    assert "wait_group" in wait

    def expected(copy: int, passes: int) -> np.ndarray:
        return np.hstack((first.expected(copy, passes), second.expected(copy, passes)))

    return replace(
        first,
        setup=lines((first.setup, second.setup)),
        body=lines((*issue, second.body, wait)),
        results=first.results + second.results,
        does=first.does + second.does,
        expected=expected,
        tolerance=max(first.tolerance, second.tolerance),
    )


LOADS = 16


def shared_loads() -> Role:
    """16-byte loads from shared memory without conflicts: 512 bytes a warp instruction."""
    setup = [
        f".reg .b32 sum, word<{4 * LOADS}>;",
        "mov.b32 sum, 0;",
        "mad.lo.u32 %at, %lane, 16, %base;",
    ]
    body = []
    for i in range(LOADS):
        words = [f"word{4 * i + j}" for j in range(4)]
        body.append(
            f"ld.volatile.shared.v4.b32 {{{', '.join(words)}}}, [%at+{FRAGMENTS + 512 * i}];"
        )
    body += [f"add.u32 sum, sum, word{i};" for i in range(4 * LOADS)]

    def expected(_copy: int, passes: int) -> np.ndarray:
        words = np.frombuffer(a_fragments(bf16_bits(matrices(64)[0][0])), np.uint32).reshape(
            LOADS, 32, 4
        )
        total = words.sum(axis=(0, 2), dtype=np.uint64) * passes
        return np.tile((total & 0xFFFF).astype(np.float32), 4)[:, None]

    behind = ["and.b32 sum, sum, 0xFFFF;", "cvt.rn.f32.u32 sum, sum;"]
    return Role(
        lines(setup),
        lines(body),
        "",
        lines(behind),
        ("sum",),
        (Work("load of 512 B", LOADS, 16, "LDS.128"),),
        expected,
    )


BULK_BYTES, BULK_STAGES = 16384, 4
BULK_BARRIERS = FREE
BULK_AT = FREE + 1024
BULK_SHARED_BYTES = BULK_AT + BULK_STAGES * BULK_BYTES


def bulk_loads() -> Role:
    """One thread that keeps bulk copies from global memory (L2) in flight, as TMA's producer does.

    The copies go round through stages; a pass waits for a stage's last copy and starts its next.
    """
    barrier = f"[at+{BULK_BARRIERS}]"
    setup = [
        ".reg .b32 at, into, stage, parity, ok;",
        ".reg .pred first, done, wrap;",
        "setp.eq.u32 first, %lane, 0;",
        "mov.b32 stage, 0;",
        "mov.b32 parity, 0;",
        "mov.b32 ok, 0;",
    ]
    for stage in range(BULK_STAGES):
        setup += [
            f"add.u32 at, %base, {8 * stage};",
            f"add.u32 into, %base, {BULK_AT + stage * BULK_BYTES};",
            f"@first mbarrier.init.shared.b64 {barrier}, 1;",
        ]
    setup += ["fence.mbarrier_init.release.cluster;", "bar.warp.sync -1;"]
    for stage in range(BULK_STAGES):
        setup += [
            f"add.u32 at, %base, {8 * stage};",
            f"add.u32 into, %base, {BULK_AT + stage * BULK_BYTES};",
            *_start_copy(barrier),
        ]
    body = [
        "mad.lo.u32 at, stage, 8, %base;",
        f"mad.lo.u32 into, stage, {BULK_BYTES}, %base;",
        f"add.u32 into, into, {BULK_AT};",
        "WAIT:",
        f"mbarrier.try_wait.parity.shared.b64 done, {barrier}, parity;",
        "@!done bra WAIT;",
        "bar.warp.sync -1;",
        *_start_copy(barrier),
        "add.u32 stage, stage, 1;",
        f"setp.eq.u32 wrap, stage, {BULK_STAGES};",
        "@wrap mov.b32 stage, 0;",
        "@wrap xor.b32 parity, parity, 1;",
    ]
    behind = []  # the copies under way
    for i in range(BULK_STAGES):
        behind += [
            "mad.lo.u32 at, stage, 8, %base;",
            f"WAIT_{i}:",
            f"mbarrier.try_wait.parity.shared.b64 done, {barrier}, parity;",
            f"@!done bra WAIT_{i};",
            "add.u32 stage, stage, 1;",
            f"setp.eq.u32 wrap, stage, {BULK_STAGES};",
            "@wrap mov.b32 stage, 0;",
            "@wrap xor.b32 parity, parity, 1;",
        ]
    behind.append(f"ld.shared.b32 ok, [%base+{BULK_AT}];")

    def expected(_copy: int, _passes: int) -> np.ndarray:
        word = np.frombuffer(swizzled(bf16_bits(matrices(64)[0][0]))[:4], np.float32)
        return np.broadcast_to(word, (32, 1))

    return Role(
        lines(setup),
        lines(body),
        "",
        lines(behind),
        ("ok",),
        (Work(f"bulk copy of {BULK_BYTES >> 10} KiB", 1, opcode="UBLKCP.*"),),
        expected,
        warps=1,
    )


def _start_copy(barrier: str) -> list[str]:
    return [
        f"@first mbarrier.arrive.expect_tx.shared.b64 _, {barrier}, {BULK_BYTES};",
        "@first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        f"[into], [%image], {BULK_BYTES}, {barrier};",
    ]
