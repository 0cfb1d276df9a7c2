"""The programs and their cases; README.md says what each of them decides."""

from __future__ import annotations

from collections.abc import Iterator

from .kernel import Case, Role
from .roles import (
    BULK_SHARED_BYTES,
    MAXIMA_INPUTS,
    beside,
    bulk_loads,
    conversions,
    exponentials,
    fused_multiply_add,
    maxima,
    multiply,
    operand_image,
    shared_loads,
)
from .tile import SCHEDULES, Tile

PROGRAMS = {
    "wgmma": "WGMMA alone: A from registers or shared memory, N, number of warpgroups",
    "exp2": "exp2 alone, beside another warpgroup's WGMMA, beside its own",
    "shared": "WGMMA with N = 64 while others use shared memory",
    "tile": "d64's inner loop in miniature: where exp2 stands between the waits",
    "alu": "maxima of two and three, conversion, beside FFMA and exp2",
}
WARPGROUPS = (1, 2, 3)


def cases() -> Iterator[Case]:
    for n, b_mn_major in ((64, False), (64, True), (128, False), (256, False)):
        for from_registers in (False, True):
            for copies in WARPGROUPS:
                if (n, from_registers, copies) != (256, True, 3):  # too many registers
                    yield wgmma_case(n, from_registers, b_mn_major, copies)
    yield from exp2_cases()
    yield from shared_cases()
    yield from tile_cases()
    yield from alu_cases()


def _products(n: int, from_registers: bool, b_mn_major: bool = False) -> tuple[Role, str, bytes]:
    role = multiply(n, from_registers=from_registers, b_mn_major=b_mn_major)
    name = f"{'RS' if from_registers else 'SS'} N={n}{' MN-major B' if b_mn_major else ''}"
    return role, name, operand_image(n, b_mn_major=b_mn_major)


def wgmma_case(n: int, from_registers: bool, b_mn_major: bool, copies: int) -> Case:
    role, name, image = _products(n, from_registers, b_mn_major)
    return Case("wgmma", f"{name}, {copies} WG", ((role, copies),), image)


def exp2_cases() -> Iterator[Case]:
    for copies in WARPGROUPS:
        yield Case("exp2", f"alone, {copies} WG", ((exponentials(), copies),), bytes(16))
    for n in (64, 128):
        for from_registers in (False, True):
            role, name, image = _products(n, from_registers)
            groups = ((role, 1), (exponentials(), 2))
            yield Case("exp2", f"2 WG beside 1 of {name}", groups, image)
            # As much of the one as of the other: 8 clocks an exp2, N / 2 a WGMMA.
            both = beside(role, exponentials(n // 2))
            for copies in (1, 3):
                yield Case("exp2", f"{copies} WG, beside own {name}", ((both, copies),), image)


def shared_cases() -> Iterator[Case]:
    for from_registers in (False, True):
        role, name, image = _products(64, from_registers, True)
        loads, bulk = shared_loads(), bulk_loads()
        yield Case("shared", f"3 WG {name} beside 1 WG of loads", ((role, 3), (loads, 1)), image)
        yield Case(
            "shared", f"3 WG {name} beside bulk copies", ((role, 3), (bulk, 1)), image,
            BULK_SHARED_BYTES,
        )  # fmt: skip
    image = operand_image(64, b_mn_major=True)
    yield Case("shared", "1 WG of loads", ((shared_loads(), 1),), image)
    yield Case("shared", "bulk copies", ((bulk_loads(), 1),), image, BULK_SHARED_BYTES)


def tile_cases() -> Iterator[Case]:
    for tile, copies in TILES:
        name = f"64x{tile.keys} {tile.schedule}"
        name += ", softmax" if tile.softmax else ", exp2"
        name += ", P in shared memory" if tile.p_in_shared else ""
        name += ", turns" if tile.turns else ""
        groups = ((tile.role(), copies),)
        yield Case("tile", f"{name}, {copies} WG", groups, tile.image(), tile.shared_memory_bytes)


TILES = (
    *((Tile(128, schedule), copies) for copies in (1, 3) for schedule in SCHEDULES),
    *((Tile(128, schedule, softmax=True), 3) for schedule in SCHEDULES),
    *((Tile(128, schedule, softmax=True, turns=True), 3) for schedule in ("sunk", "pinned")),
    (Tile(128, "sunk", softmax=True, p_in_shared=True), 3),
    (Tile(128, "pinned", softmax=True, p_in_shared=True), 3),
    # As FlashAttention-3 has it; pinned it spills, since P then waits in registers of its own.
    (Tile(192, "sunk", softmax=True, p_in_shared=True), 3),
    (Tile(192, "sunk", softmax=True, p_in_shared=True, turns=True), 3),
)
"""With copies."""


def alu_cases() -> Iterator[Case]:
    roles = {
        "FFMA": fused_multiply_add(),
        "FMNMX": maxima("max.f32"),
        "VIMNMX3": maxima("max.s32"),
        "F2FP": conversions(),
        "MUFU.EX2": exponentials(),
    }
    for name, role in roles.items():
        for copies in (1, 3):
            yield Case("alu", f"{name}, {copies} WG", ((role, copies),), MAXIMA_INPUTS.tobytes())
