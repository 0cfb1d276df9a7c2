"""Loops of one kind of work each: WGMMA, exponentials, other arithmetic, shared-memory traffic."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from .kernel import Role, Work
from .operands import (
    a_fragments,
    accumulators,
    bf16_bits,
    k_major,
    mn_major,
    swizzled,
    wgmma,
)

STEPS = 4
"""k16 steps of the operands: K = 64."""
WGMMAS = 8
"""WGMMAs of a pass: all steps twice."""
COPIES = 3
A_BYTES = 64 * 128
FRAGMENTS = COPIES * A_BYTES
B = FRAGMENTS + A_BYTES
B_BYTES = 256 * 128
FREE = B + B_BYTES
"""The offset from which the operands leave shared memory free."""

VALUES = 32
"""Registers that a loop of arithmetic works on, one dependent chain each."""


def _matrices(n: int) -> tuple[list[np.ndarray], np.ndarray]:
    """A of each copy (64, K) and B (N, K): small integers, so that sums are exact."""
    random = np.random.default_rng(n)
    return [random.integers(-2, 3, (64, 64)).astype(np.float64) for _ in range(COPIES)], (
        random.integers(-2, 3, (n, 64)).astype(np.float64)
    )


def operand_image(n: int, *, b_mn_major: bool) -> bytes:
    """A of each copy, the fragments of the first, B."""
    a, b = _matrices(n)
    second = swizzled(b.T if b_mn_major else b)
    image = b"".join(map(swizzled, a)) + a_fragments(a[0]) + second
    return image.ljust(FREE, b"\0")


def lines(statements: Iterable[str]) -> str:
    return "\n".join(statements)


def multiply(n: int, *, from_registers: bool, b_mn_major: bool = False) -> Role:
    """WGMMA m64nNk16 after WGMMA into one accumulator, up to two groups in flight.

    Copies have their own A in shared memory, the same one in registers, and share B.
    """
    fragments = [[f"a{4 * s + r}" for r in range(4)] for s in range(STEPS)]
    setup = [
        f".reg .b32 acc<{n // 2}>, a<{4 * STEPS}>;",
        f".reg .b64 own, da<{STEPS}>, db<{STEPS}>;",
        *(f"mov.b32 acc{i}, 0;" for i in range(n // 2)),
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
        body.append(wgmma(n, "acc", a, f"db{s}", b_mn_major=b_mn_major))
    body += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 1;"]

    def expected(copy: int, passes: int) -> np.ndarray:
        a, b = _matrices(n)
        return accumulators(passes * WGMMAS / STEPS * (a[0 if from_registers else copy] @ b.T))

    return Role(
        lines(setup),
        lines(body),
        "wgmma.wait_group.sync.aligned 0;",
        "",
        tuple(f"acc{i}" for i in range(n // 2)),
        (Work("WGMMA", WGMMAS, n / 2),),
        expected,
    )


def exponentials(count: int = 2 * VALUES) -> Role:
    """Chains of x = 2^-x, which tend to 0.641."""

    def step(x: np.ndarray) -> np.ndarray:
        return np.exp2(-x)

    return _arithmetic(
        Work("exp2", count, 8),
        lambda i: f"neg.f32 x{i}, x{i};\nex2.approx.ftz.f32 x{i}, x{i};",
        step,
        tolerance=1e-5,
    )


def fused_multiply_add(count: int = 128) -> Role:
    """x = x / 2 + 1, as a yardstick: one a clock."""
    half, one = "0f3F000000", "0f3F800000"
    return _arithmetic(
        Work("FFMA", count, 1),
        lambda i: f"fma.rn.f32 x{i}, x{i}, {half}, {one};",
        lambda x: x / 2 + 1,
        tolerance=1e-6,
    )


def conversions(count: int = 2 * VALUES) -> Role:
    """x = the pair bf16(x), bf16(x), read as a float32 again."""

    def step(x: np.ndarray) -> np.ndarray:
        half = bf16_bits(x).astype(np.uint32)
        return (half | half << 16).view(np.float32)

    return _arithmetic(
        Work("conversion of two", count, 2), lambda i: f"cvt.rn.bf16x2.f32 x{i}, x{i}, x{i};", step
    )


def _arithmetic(
    work: Work,
    instruction: Callable[[int], str],
    step: Callable[[np.ndarray], np.ndarray],
    tolerance: float = 0.0,
) -> Role:
    """So many a pass, round after round over chains that start as (thread + i + 1) / 256."""
    count = work.count
    assert count % VALUES == 0

    def expected(_copy: int, passes: int) -> np.ndarray:
        x = (np.arange(128)[:, None] + np.arange(VALUES) + 1) / 256
        x = x.astype(np.float32)
        for _ in range(min(passes * count // VALUES, 200)):
            x = step(x)
        return x.astype(np.float32)

    return Role(
        lines(_start_values()),
        lines(instruction(i % VALUES) for i in range(count)),
        "",
        "",
        tuple(f"x{i}" for i in range(VALUES)),
        (work,),
        expected,
        tolerance,
    )


def _start_values() -> list[str]:
    setup = [f".reg .b32 x<{VALUES}>;"]
    for i in range(VALUES):
        setup += [
            f"add.u32 %at, %thread, {i + 1};",
            f"cvt.rn.f32.u32 x{i}, %at;",
            f"mul.f32 x{i}, x{i}, 0f3B800000;",  # 1 / 256
        ]
    return setup


def maxima(kind: str, count: int = 128) -> Role:
    """x = max(x, y) with one of four y after another; "max.s32": two of them an instruction.

    ptxas makes one VIMNMX3 of two dependent max.s32, but leaves max.f32 as they are.
    """
    inputs = 4
    setup = [*_start_values(), f".reg .b32 y<{inputs}>;"]
    for j in range(inputs):
        setup.append(f"ld.shared.b32 y{j}, [%base+{4 * j}];")
    pairs = 2 if kind == "max.s32" else 1
    body = [
        f"{kind} x{i % VALUES}, x{i % VALUES}, y{(i // VALUES * pairs + pair) % inputs};"
        for i in range(count)
        for pair in range(pairs)
    ]

    def expected(_copy: int, _passes: int) -> np.ndarray:
        x = ((np.arange(128)[:, None] + np.arange(VALUES) + 1) / 256).astype(np.float32)
        return np.maximum(x, MAXIMA_INPUTS.max())

    return Role(
        lines(setup),
        lines(body),
        "",
        "",
        tuple(f"x{i}" for i in range(VALUES)),
        (Work(f"{kind} of {pairs + 1}", count, 2),),
        expected,
    )


MAXIMA_INPUTS = np.array([0.125, 0.25, 0.1875, 0.0625], np.float32)


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
        words = np.frombuffer(a_fragments(_matrices(64)[0][0]), np.uint32).reshape(LOADS, 32, 4)
        total = words.sum(axis=(0, 2), dtype=np.uint64) * passes
        return np.tile((total & 0xFFFF).astype(np.float32), 4)[:, None]

    behind = ["and.b32 sum, sum, 0xFFFF;", "cvt.rn.f32.u32 sum, sum;"]
    return Role(
        lines(setup),
        lines(body),
        "",
        lines(behind),
        ("sum",),
        (Work("load of 512 B", LOADS, 4),),
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
        word = np.frombuffer(swizzled(_matrices(64)[0][0])[:4], np.float32)
        return np.broadcast_to(word, (32, 1))

    return Role(
        lines(setup),
        lines(body),
        "",
        lines(behind),
        ("ok",),
        (Work(f"bulk copy of {BULK_BYTES >> 10} KiB", 1),),
        expected,
        warps=1,
    )


def _start_copy(barrier: str) -> list[str]:
    return [
        f"@first mbarrier.arrive.expect_tx.shared.b64 _, {barrier}, {BULK_BYTES};",
        "@first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        f"[into], [%image], {BULK_BYTES}, {barrier};",
    ]
