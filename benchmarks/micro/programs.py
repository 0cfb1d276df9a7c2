"""The programs and their cases; README.md says what each of them decides."""

from __future__ import annotations

from collections.abc import Iterator

from .arithmetic import INSTRUCTIONS, arithmetic
from .kernel import Case, Role
from .operands import BF16, E4M3, Format
from .reductions import TILE, accumulator_reuse, bulk_reductions, reductions
from .roles import (
    BULK_SHARED_BYTES,
    INPUTS,
    beside,
    bulk_loads,
    multiply,
    operand_image,
    shared_loads,
)
from .tile import SCHEDULES, Tile

PROGRAMS = {
    "alu": "one arithmetic instruction each: alone, beside another warpgroup's WGMMA",
    "qgmma": "WGMMA of e4m3 alone: A from registers or shared memory, N, number of warpgroups",
    "red": "adding to L2: RED.128, bulk reductions, how long REDs keep their registers",
    "exp2": "exp2 alone, beside another warpgroup's WGMMA, beside its own",
    "wgmma": "WGMMA alone: A from registers or shared memory, N, number of warpgroups",
    "shared": "WGMMA with N = 64 while others use shared memory",
    "tile": "d64's inner loop in miniature: where exp2 stands between the waits",
}
WARPGROUPS = (1, 2, 3)


def cases() -> Iterator[Case]:
    """Return the cases in the order of PROGRAMS."""
    yield from alu_cases()
    yield from qgmma_cases()
    yield from red_cases()
    yield from exp2_cases()
    for n, b_mn_major in ((64, False), (64, True), (128, False), (256, False)):
        for from_registers in (False, True):
            for copies in WARPGROUPS:
                if (n, from_registers, copies) != (256, True, 3):  # too many registers
                    yield wgmma_case(n, from_registers, b_mn_major, copies)
    yield from shared_cases()
    yield from tile_cases()


def alu_cases() -> Iterator[Case]:
    for name, instruction in INSTRUCTIONS.items():
        role, image = arithmetic(name, INPUTS), operand_image(128, inputs=instruction.inputs)
        for copies in (1, 3):
            yield Case("alu", f"{name}, {copies} WG", ((role, copies),), image)
        products = multiply(128, from_registers=True)
        yield Case("alu", f"{name}, 2 WG beside 1 of RS N=128", ((products, 1), (role, 2)), image)


def _products(
    *widths: int, from_registers: bool, form: Format = BF16, b_mn_major: bool = False
) -> tuple[Role, str, bytes]:
    role = multiply(*widths, from_registers=from_registers, form=form, b_mn_major=b_mn_major)
    name = f"{'RS' if from_registers else 'SS'} N={'+'.join(map(str, widths))}"
    name += " MN-major B" if b_mn_major else ""
    return role, name, operand_image(max(widths), form=form, b_mn_major=b_mn_major)


def qgmma_cases() -> Iterator[Case]:
    for widths in ((8,), (64,), (72,), (128,), (136,), (128, 8)):
        for from_registers in (False, True):
            role, name, image = _products(*widths, from_registers=from_registers, form=E4M3)
            for copies in (1, 2):
                yield Case("qgmma", f"e4m3 {name}, {copies} WG", ((role, copies),), image)


def red_cases() -> Iterator[Case]:
    red, bulk = reductions(), bulk_reductions()
    for copies in (1, 2):
        yield Case("red", f"RED.128, {copies} WG", ((red, copies),), bytes(16))
    yield Case("red", "bulk reductions", ((bulk, 1),), TILE.tobytes())
    yield Case("red", "RED.128, 1 WG beside bulk reductions", ((red, 1), (bulk, 1)), TILE.tobytes())
    products, name, image = _products(128, from_registers=True)
    yield Case("red", f"RED.128, 2 WG beside 1 of {name}", ((products, 1), (red, 2)), image)
    for reduce in (False, True):
        role, what = accumulator_reuse(reduce=reduce), "with" if reduce else "without"
        for copies in (1, 2):
            name = f"accumulators used again, {what} REDs, {copies} WG"
            yield Case("red", name, ((role, copies),), operand_image(64))


def wgmma_case(n: int, from_registers: bool, b_mn_major: bool, copies: int) -> Case:
    role, name, image = _products(n, from_registers=from_registers, b_mn_major=b_mn_major)
    return Case("wgmma", f"{name}, {copies} WG", ((role, copies),), image)


def exp2_cases() -> Iterator[Case]:
    """Return cases with as much of the one as of the other: 8 clocks an exp2, N / 2 a WGMMA."""
    for n in (64, 128):
        for from_registers in (False, True):
            role, name, image = _products(n, from_registers=from_registers)
            groups = ((role, 1), (arithmetic("MUFU.EX2", INPUTS), 2))
            yield Case("exp2", f"2 WG beside 1 of {name}", groups, image)
            both = beside(role, arithmetic("MUFU.EX2", INPUTS, n // 2))
            for copies in (1, 3):
                yield Case("exp2", f"{copies} WG, beside own {name}", ((both, copies),), image)


def shared_cases() -> Iterator[Case]:
    for from_registers in (False, True):
        role, name, image = _products(64, from_registers=from_registers, b_mn_major=True)
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
