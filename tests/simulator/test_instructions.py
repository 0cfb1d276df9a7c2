"""Instruction families in hand-written PTX against plain statements of what they do."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.snippets import run

from hopper_attention import simulator

RNG = np.random.default_rng(0)
EDGES = [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x8000, 0x00FF00FF]
INTEGERS = np.concatenate([EDGES, RNG.integers(0, 2**32, 21)]).astype(np.uint32)
FLOATS = np.concatenate(
    [[0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 3e38, 1e-40, 0.5], RNG.standard_normal(22) * 9]
).astype(np.float32)


def signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def signed16(x: int) -> int:
    return (x & 0x7FFF) - (x & 0x8000)


def integers(columns: int) -> np.ndarray:
    return np.stack([RNG.permutation(INTEGERS) for _ in range(columns)], axis=1)


def floats(columns: int) -> np.ndarray:
    return np.stack([RNG.permutation(FLOATS) for _ in range(columns)], axis=1)


INTEGER_CASES = {
    "add.s32 %d0, %a0, %a1;": lambda a, b, c: a + b,
    "sub.s32 %d0, %a0, -7;": lambda a, b, c: a + 7,
    "mul.lo.s32 %d0, %a0, %a1;": lambda a, b, c: a * b,
    "mul.hi.u32 %d0, %a0, %a1;": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %d0, %a0, %a1;": lambda a, b, c: signed(a) * signed(b) >> 32,
    "{ .reg .b16 %p, %q; cvt.u16.u32 %p, %a0; cvt.u16.u32 %q, %a1; mul.hi.u16 %p, %p, %q;"
    " cvt.u32.u16 %d0, %p; }": lambda a, b, c: (a & 0xFFFF) * (b & 0xFFFF) >> 16,
    "{ .reg .b16 %p, %q; cvt.u16.u32 %p, %a0; cvt.u16.u32 %q, %a1; mul.hi.s16 %p, %p, %q;"
    " cvt.s32.s16 %d0, %p; }": lambda a, b, c: signed16(a) * signed16(b) >> 16,
    "mad.lo.s32 %d0, %a0, %a1, %a2;": lambda a, b, c: a * b + c,
    "mul.wide.s32 %rd1, %a0, %a1; shr.u64 %rd1, %rd1, 20; cvt.u32.u64 %d0, %rd1;": (
        lambda a, b, c: (signed(a) * signed(b) & (2**64 - 1)) >> 20
    ),
    "mad.wide.u32 %rd1, %a0, %a1, 5; shr.u64 %rd1, %rd1, 9; cvt.u32.u64 %d0, %rd1;": (
        lambda a, b, c: (a * b + 5) >> 9
    ),
    "shl.b32 %d0, %a0, %a1;": lambda a, b, c: a << min(b, 32),
    "shr.u32 %d0, %a0, %a1;": lambda a, b, c: a >> min(b, 32),
    "shr.s32 %d0, %a0, %a1;": lambda a, b, c: signed(a) >> min(b, 32),
    "shr.s32 %d0, %a0, 31;": lambda a, b, c: signed(a) >> 31,
    "and.b32 %d0, %a0, %a1;": lambda a, b, c: a & b,
    "or.b32 %d0, %a0, -16;": lambda a, b, c: a | 0xFFFFFFF0,
    "xor.b32 %d0, %a0, %a1;": lambda a, b, c: a ^ b,
    "not.b32 %d0, %a0;": lambda a, b, c: ~a,
    "neg.s32 %d0, %a0;": lambda a, b, c: -a,
    "abs.s32 %d0, %a0;": lambda a, b, c: abs(signed(a)),
    "min.s32 %d0, %a0, %a1;": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32 %d0, %a0, %a1;": lambda a, b, c: max(a, b),
    "lop3.b32 %d0, %a0, %a1, %a2, 0xE8;": lambda a, b, c: (a & b) | (a & c) | (b & c),
    "lop3.b32 %d0, %a0, 0x03FF03FF, %a1, 0xEA;": lambda a, b, c: (a & 0x03FF03FF) | b,
    "lop3.b32 %d0, %a0, 7, %a1, 0x10;": lambda a, b, c: a & ~7 & ~b & 0xFFFFFFFF,
    "lop3.b32 %d0, %a0, %a1, %a2, 0x72;": (
        lambda a, b, c: sum(
            (0x72 >> ((a >> k & 1) * 4 + (b >> k & 1) * 2 + (c >> k & 1)) & 1) << k
            for k in range(32)
        )
    ),
    "shf.l.wrap.b32 %d0, %a0, %a1, %a2;": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "shf.r.clamp.b32 %d0, %a0, %a1, %a2;": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "prmt.b32 %d0, %a0, %a1, 0x5140;": (
        lambda a, b, c: sum(
            ((b << 32 | a) >> 8 * n & 255) << 8 * k for k, n in enumerate((0, 4, 1, 5))
        )
    ),
    "prmt.b32 %d0, %a0, %a1, 0xBA98;": (
        lambda a, b, c: sum((255 if a >> 8 * k + 7 & 1 else 0) << 8 * k for k in range(4))
    ),
    "bfe.u32 %d0, %a0, 5, 11;": lambda a, b, c: a >> 5 & 0x7FF,
    "bfi.b32 %d0, %a0, %a1, 8, 12;": lambda a, b, c: (b & ~(0xFFF << 8)) | (a & 0xFFF) << 8,
    "popc.b32 %d0, %a0;": lambda a, b, c: a.bit_count(),
    "clz.b32 %d0, %a0;": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 %d0, %a0;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "div.s32 %d0, %a0, 7;": (
        lambda a, b, c: abs(signed(a)) // 7 * (1 if signed(a) >= 0 else -1)
    ),
    "rem.u32 %d0, %a0, 1000;": lambda a, b, c: a % 1000,
    "setp.lt.s32 %p1, %a0, %a1; selp.b32 %d0, %a2, 9, %p1;": (
        lambda a, b, c: c if signed(a) < signed(b) else 9
    ),
    "setp.lo.u32 %p1, %a0, %a1; selp.b32 %d0, 1, 0, %p1;": lambda a, b, c: int(a < b),
    "setp.gt.s32 %p2, %a2, 0; setp.eq.and.b32 %p1, %a0, %a1, !%p2; selp.b32 %d0, 1, 0, %p1;": (
        lambda a, b, c: int(a == b and not signed(c) > 0)
    ),
    "setp.ne.b32 %p1|%p2, %a0, %a1; selp.b32 %r1, 1, 0, %p1; selp.b32 %d0, 2, %r1, %p2;": (
        lambda a, b, c: 1 if a != b else 2
    ),
    "mov.b32 %d0, 5; setp.gt.s32 %p1, %a0, 0; @%p1 mov.b32 %d0, %a1;": (
        lambda a, b, c: b if signed(a) > 0 else 5
    ),
    "mov.b32 {%rs1, %rs2}, %a0; mov.b32 %d0, {%rs2, %rs1};": lambda a, b, c: a >> 16 | a << 16,
    "mov.b64 %rd1, {%a0, %a1}; mov.b64 {%r1, %d0}, %rd1;": lambda a, b, c: b,
    "cvt.s64.s32 %rd1, %a0; shr.u64 %rd1, %rd1, 16; cvt.u32.u64 %d0, %rd1;": (
        lambda a, b, c: (signed(a) & (2**64 - 1)) >> 16
    ),
    "cvt.u16.u32 %rs1, %a0; shr.s16 %rs2, %rs1, 15; cvt.u32.u16 %d0, %rs2;": (
        lambda a, b, c: 0xFFFF if a >> 15 & 1 else 0
    ),
    "cvt.u16.u32 %rs1, %a0; cvt.s16.s8 %rs2, %rs1; cvt.s32.s16 %d0, %rs2;": (
        lambda a, b, c: (a & 255) - (256 if a >> 7 & 1 else 0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("body", INTEGER_CASES)
def test_integers(body):
    inputs = integers(3)
    expected = [INTEGER_CASES[body](*map(int, row)) & 0xFFFFFFFF for row in inputs]
    assert run(body, inputs)[:, 0].tolist() == expected


def f32(x) -> np.float32:
    return np.float32(x)


def flush(x) -> np.float32:
    return np.copysign(np.float32(0), x) if abs(x) < 2.0**-126 else np.float32(x)


def bf16(x: np.float32) -> int:
    if np.isnan(x):
        return 0x7FFF
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    low, high = bits & 0xFFFF, bits >> 16
    return high + (low > 0x8000 or (low == 0x8000 and high & 1))


def f16(x: np.float32) -> int:
    return 0x7FFF if np.isnan(x) else int(np.float16(x).view(np.uint16))


FLOAT_CASES = {
    "add.f32 %d0, %a0, %a1;": lambda a, b, c: a + b,
    "sub.f32 %d0, %a0, %a1;": lambda a, b, c: a - b,
    "mul.f32 %d0, %a0, %a1;": lambda a, b, c: a * b,
    "mul.ftz.f32 %d0, %a0, %a1;": lambda a, b, c: flush(flush(a) * flush(b)),
    "add.sat.f32 %d0, %a0, %a1;": lambda a, b, c: np.fmin(np.fmax(a + b, f32(0)), f32(1)),
    "fma.rn.f32 %d0, %a0, %a1, %a2;": (
        lambda a, b, c: f32(np.float64(a) * np.float64(b) + np.float64(c))
    ),
    "max.f32 %d0, %a0, %a1;": lambda a, b, c: b if np.isnan(a) else a if np.isnan(b) else max(a, b),
    "max.NaN.f32 %d0, %a0, %a1;": lambda a, b, c: np.maximum(a, b),
    "neg.f32 %d0, %a0;": lambda a, b, c: -a,
    "abs.f32 %d0, %a0;": lambda a, b, c: abs(a),
    "ex2.approx.ftz.f32 %d0, %a0;": lambda a, b, c: flush(f32(np.exp2(np.float64(flush(a))))),
    "lg2.approx.f32 %d0, %a0;": lambda a, b, c: f32(np.log2(np.float64(a))),
    "rcp.approx.ftz.f32 %d0, %a0;": lambda a, b, c: flush(f32(1 / np.float64(flush(a)))),
    "rsqrt.approx.f32 %d0, %a0;": lambda a, b, c: f32(1 / np.sqrt(np.float64(a))),
    "setp.gtu.f32 %p1, %a0, %a1; selp.f32 %d0, 0f3F800000, %a2, %p1;": (
        lambda a, b, c: f32(1) if not a <= b else c
    ),
    "setp.ne.f32 %p1, %a0, %a1; selp.f32 %d0, 0f3F800000, 0f00000000, %p1;": (
        lambda a, b, c: f32(a < b or a > b)
    ),
    "setp.eq.f32 %p1, %a0, 0fFF800000; selp.f32 %d0, 0f00000000, %a0, %p1;": (
        lambda a, b, c: f32(0) if a == -np.inf else a
    ),
}  # fmt: skip


@pytest.mark.parametrize("body", FLOAT_CASES)
def test_floats(body):
    inputs = floats(3)
    with np.errstate(all="ignore"):
        expected = np.array([FLOAT_CASES[body](*row) for row in inputs], np.float32)
    got = run(body, inputs.view(np.uint32)).view(np.float32)[:, 0]
    np.testing.assert_array_equal(got, expected)
    decided = ~np.isnan(expected) & ((expected != 0) | ("max" not in body))  # max of +0 and -0
    assert (np.signbit(got) == np.signbit(expected))[decided].all()


CONVERSIONS = {
    "cvt.rn.bf16x2.f32 %d0, %a0, %a1;": lambda a, b: bf16(a) << 16 | bf16(b),
    "cvt.rn.f16x2.f32 %d0, %a0, %a1;": lambda a, b: f16(a) << 16 | f16(b),
    "cvt.rn.bf16.f32 %rs1, %a0; mov.b32 %d0, {%rs1, 0};": lambda a, b: bf16(a),
    "cvt.rn.f16.f32 %rs1, %a0; mov.b32 %d0, {%rs1, 0};": lambda a, b: f16(a),
    "cvt.rzi.s32.f32 %d0, %a0;": lambda a, b: (
        0 if np.isnan(a) else int(np.clip(np.float64(a), -(2**31), 2**31 - 1))
    ),
    "cvt.rni.u32.f32 %d0, %a0;": lambda a, b: (
        0 if np.isnan(a) else int(np.clip(np.rint(np.float64(a)), 0, 2**32 - 1))
    ),
}  # fmt: skip


@pytest.mark.parametrize("body", CONVERSIONS)
def test_conversions_of_f32(body):
    inputs = floats(2)
    with np.errstate(all="ignore"):
        expected = [CONVERSIONS[body](*row) & 0xFFFFFFFF for row in inputs]
    assert run(body, inputs.view(np.uint32))[:, 0].tolist() == expected


def clamped(x: int, name: str) -> int:
    """The bits of a 32-bit integer, saturated to a narrower type."""
    bits = int(name[1:])
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if name[0] == "s" else (0, 2**bits - 1)
    return min(max(signed(x), least), most) & (2**bits - 1)


@pytest.mark.parametrize("name", ["u16", "s16", "u8", "s8", "u4", "s4", "u2", "s2"])
def test_pack_saturates_two_integers_below_a_third(name):
    """ptxas makes one F2IP of cvt.rni.s32.f32 twice and cvt.pack.sat.u8: P as codes of e4m3."""
    bits, inputs = int(name[1:]), integers(3)
    small = RNG.integers(-300, 300, (16, 2)).astype(np.int32).view(np.uint32)
    inputs[:16, :2] = small
    third = "" if bits == 16 else ", %a2"
    body = f"cvt.pack.sat.{name}.s32{'' if bits == 16 else '.b32'} %d0, %a0, %a1{third};"
    expected = [
        (0 if bits == 16 else int(c) << 2 * bits & 0xFFFFFFFF)
        | clamped(int(a), name) << bits
        | clamped(int(b), name)
        for a, b, c in inputs
    ]
    assert run(body, inputs)[:, 0].tolist() == expected


@pytest.mark.parametrize(
    "modifiers", ["u8.s32.b32", "sat.u8.u32.b32", "sat.u16.s32.b32", "sat.u8.s32"]
)
def test_pack_refuses_what_ptx_lacks(modifiers):
    with pytest.raises(simulator.SimulatorError, match="cvt"):
        run(f"cvt.pack.{modifiers} %d0, %a0, %a1, %a2;", integers(3))


def test_widening_conversions_are_exact():
    values = RNG.integers(0, 2**16, 32).astype(np.uint32)
    body = "mov.b32 {%rs1, %rs2}, %a0; cvt.f32.bf16 %d0, %rs1; cvt.f32.f16 %d1, %rs1;"
    got = run(body, values[:, None], outputs=2).view(np.float32)
    np.testing.assert_array_equal(got[:, 0], (values << 16).view(np.float32))
    np.testing.assert_array_equal(
        got[:, 1], values.astype(np.uint16).view(np.float16).astype(np.float32)
    )
    assert run("cvt.rn.f32.s32 %d0, %a0;", INTEGERS[:, None]).view(np.float32)[:, 0].tolist() == [
        np.float32(signed(int(x))) for x in INTEGERS
    ]


@pytest.mark.parametrize(("name", "largest"), [("e4m3", 448.0), ("e5m2", 57344.0)])
def test_fp8_rounds_to_nearest_even_and_saturates(name, largest):
    """Against ml-style enumeration: the nearest of all finite values, ties to the even code."""
    bias, mantissa_bits = {"e4m3": (7, 3), "e5m2": (15, 2)}[name]

    def value(code: int) -> float:
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        fraction = mantissa / (1 << mantissa_bits)
        if exponent == 0:
            return fraction * 2.0 ** (1 - bias)
        return (1 + fraction) * 2.0 ** (exponent - bias)

    finite = [value(code) for code in range(128) if value(code) <= largest]
    assert finite[-1] == largest
    inputs = np.concatenate(
        [RNG.standard_normal(20) * 10.0 ** RNG.integers(-5, 4, 20), [0.0, -0.0, 1e9, -1e9],
         [finite[9], (finite[9] + finite[10]) / 2, (finite[10] + finite[11]) / 2, -finite[1] / 2],
         [np.inf, -np.inf, largest, np.nan]]
    ).astype(np.float32)  # fmt: skip
    body = f"cvt.rn.satfinite.{name}x2.f32 %rs1, %a0, %a1; mov.b32 %d0, {{%rs1, 0}};"
    got = run(body, np.stack([inputs, inputs[::-1]], 1).view(np.uint32))[:, 0]
    for k, x in enumerate(inputs):
        code = int(got[k] >> 8)
        assert code == int(got[len(inputs) - 1 - k] & 255)
        if np.isnan(x):
            assert code & 0x7F == 0x7F
            continue
        distance = [abs(min(abs(float(x)), largest) - v) for v in finite]
        best = [c for c, d in enumerate(distance) if d == min(distance)]
        assert code & 0x7F == min(best, key=lambda c: c % 2)
        assert code >> 7 == np.signbit(x)
    with np.errstate(over="ignore"):
        single = inputs.astype(np.float16)
    halves = single.view(np.uint16).astype(np.uint32)
    body = f"cvt.rn.satfinite.{name}x2.f16x2 %rs1, %a0; mov.b32 %d0, {{%rs1, 0}};"
    from_halves = run(body, (halves << 16 | halves[::-1])[:, None])[:, 0]
    body = f"cvt.rn.satfinite.{name}x2.f32 %rs1, %a0, %a1; mov.b32 %d0, {{%rs1, 0}};"
    rounded = single.astype(np.float32)
    expected = run(body, np.stack([rounded, rounded[::-1]], 1).view(np.uint32))[:, 0]
    assert from_halves.tolist() == expected.tolist()
    back = f"mov.b32 {{%rs1, %rs2}}, %a0; cvt.rn.f16x2.{name}x2 %d0, %rs1;"
    codes = np.arange(32, dtype=np.uint32)
    halves = run(back, (codes | (codes + 64) << 8)[:, None])[:, 0]
    low = (halves & 0xFFFF).astype(np.uint16).view(np.float16)
    assert low.tolist() == [value(c) for c in range(32)]


# ------------------------------------------------------------------------- scheduling of operations

SLOTS = 4
OPERATIONS = {
    "add.f32": ("F", lambda a, b: a + b),
    "mul.f32": ("F", lambda a, b: a * b),
    "max.f32": ("F", np.fmax),
    "add.s32": ("U", lambda a, b: a + b),
    "xor.b32": ("U", lambda a, b: a ^ b),
}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*sorted(OPERATIONS), "store", "load", "select"]),
            st.sampled_from([None, True, False]),
            st.integers(0, 11),
            st.integers(0, 11),
            st.integers(0, 11),
        ),
        min_size=1,
        max_size=60,
    )
)
def test_straight_runs_equal_one_instruction_after_another(program):
    """Batching, chain folding, row numbering and predicates must not change a bit."""
    inputs = RNG.standard_normal((32, 12)).astype(np.float32).view(np.uint32)
    registers = [inputs[:, k].copy() for k in range(12)]
    slots = [inputs[:, 0].copy() for _ in range(SLOTS)]
    odd = np.arange(32) % 2 == 1
    lines = ["and.b32 %r3, %r500, 1;", "setp.eq.u32 %p1, %r3, 1;", "mov.b32 %r1, memory;"]
    lines.append(f"mad.lo.s32 %r2, %r500, {4 * SLOTS}, %r1;")
    lines += [f"st.shared.b32 [%r2+{4 * k}], %a0;" for k in range(SLOTS)]
    with np.errstate(all="ignore"):
        for name, guard, d, a, b in program:
            mask = np.full(32, True) if guard is None else odd == guard
            prefix = {None: "", True: "@%p1 ", False: "@!%p1 "}[guard]
            target = registers
            if name == "store":
                target, d, result = slots, d % SLOTS, registers[a]
                text = f"st.shared.b32 [%r2+{4 * d}], %a{a};"
            elif name == "load":
                result, text = slots[a % SLOTS], f"ld.shared.b32 %a{d}, [%r2+{4 * (a % SLOTS)}];"
            elif name == "select":
                result = np.where(odd, registers[a], registers[b])
                text = f"selp.b32 %a{d}, %a{a}, %a{b}, %p1;"
            else:
                view, function = OPERATIONS[name]
                dtype = np.float32 if view == "F" else np.uint32
                result = function(registers[a].view(dtype), registers[b].view(dtype))
                text = f"{name} %a{d}, %a{a}, %a{b};"
            target[d] = np.where(mask, result.view(np.uint32), target[d])
            lines.append(prefix + text)
    copies = [f"mov.b32 %d{k}, %a{k};" for k in range(12)]
    got = run("\n".join(lines + copies), inputs, outputs=12, shared=32 * 4 * SLOTS)
    for k in range(12):
        want = registers[k]
        nan = np.isnan(want.view(np.float32)) & np.isnan(got[:, k].view(np.float32))
        assert ((got[:, k] == want) | nan).all()


@pytest.mark.parametrize("threads", [1, 32, 128])
def test_chains_are_summed_in_program_order(threads):
    """Two interleaved sums of 40 terms; float32 addition is not associative."""
    terms = (RNG.standard_normal((128, 40)) * 10.0 ** RNG.integers(-4, 5, (128, 40))).astype("f4")
    lines = ["add.f32 %r0, %a0, 0f00000000;", "add.f32 %r100, %a39, %a38;"]
    for k in range(1, 40):
        lines.append(f"add.f32 %r{k}, %r{k - 1}, %a{k};")
        if k < 39:
            lines.append(f"add.f32 %r{100 + k}, %a{38 - k}, %r{99 + k};")
    body = "\n".join([*lines, "mov.b32 %d0, %r39;", "mov.b32 %d1, %r138;"])
    if threads == 1:
        body = "setp.ne.u32 %p9, %r500, 5; @%p9 ret;" + body
    got = run(body, terms.view(np.uint32), 2, threads=max(threads, 32)).view(np.float32)
    for lane in (5,) if threads == 1 else range(threads):
        up = down = np.float32(0)
        for k in range(40):
            up, down = up + terms[lane, k], down + terms[lane, 39 - k]
        assert got[lane].tolist() == [up, down]


# ------------------------------------------------------------------------------------------- memory


def test_shared_and_global_memory_of_all_widths():
    body = """
    mov.b32 %r1, memory;
    shl.b32 %r2, %r500, 4;
    add.s32 %r3, %r1, %r2;
    st.shared.v4.b32 [%r3], {%a0, %a1, %a2, %a3};
    bar.sync 0;
    xor.b32 %r4, %r2, 16;
    add.s32 %r5, %r1, %r4;
    ld.shared.b32 %d0, [%r5+4];
    ld.shared.u16 %rs1, [%r5+2];
    cvt.u32.u16 %d1, %rs1;
    ld.shared.s8 %d2, [%r5+9];
    ld.shared.v2.b64 {%rd1, %rd2}, [%r5];
    mov.b64 {%r6, %d3}, %rd2;
    cvt.u64.u32 %rd3, %r5;
    cvta.shared.u64 %rd4, %rd3;
    ld.b32 %d4, [%rd4+8];
    """
    inputs = integers(4)
    other = inputs[np.arange(32) ^ 1]
    got = run(body, inputs, 5, shared=512)
    byte = (other[:, 2] >> 8 & 0xFF).astype(np.uint8).view(np.int8)
    expected = [other[:, 1], other[:, 0] >> 16, byte.astype(np.int32).view(np.uint32)]
    for column, want in enumerate([*expected, other[:, 3], other[:, 2]]):
        assert got[:, column].tolist() == want.tolist()


def test_atomics():
    counter = np.array([10, 0], np.uint32)
    body = f"""
    mov.b64 %rd1, {counter.ctypes.data};
    atom.global.add.u32 %d0, [%rd1], 2;
    red.relaxed.gpu.global.max.u32 [%rd1+4], %a0;
    """
    values = RNG.permutation(32).astype(np.uint32)
    got = run(body, values[:, None], extra=(counter,))
    assert sorted(got[:, 0].tolist()) == list(range(10, 74, 2))
    assert counter.tolist() == [74, 31]


def test_vector_reductions_and_compare_and_swap():
    target, lock = np.zeros(4, np.float32), np.array([3], np.uint32)
    body = f"""
    mov.b64 %rd1, {target.ctypes.data};
    red.relaxed.gpu.global.add.v4.f32 [%rd1], {{%a0, %a1, %a0, 0f3F800000}};
    mov.b64 %rd2, {lock.ctypes.data};
    add.u32 %r1, %r500, 3;
    add.u32 %r2, %r500, 4;
    atom.global.cas.b32 %d0, [%rd2], %r1, %r2;
    """
    values = RNG.integers(-8, 8, (32, 2)).astype(np.float32)
    got = run(body, values.view(np.uint32), extra=(target, lock))[:, 0]
    assert target.tolist() == [*values.sum(axis=0), values[:, 0].sum(), 32.0]
    assert got.tolist() == list(range(3, 35))
    assert lock[0] == 35


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("ld.global.b32 %d0, [%rd60+128];", simulator.OutOfBounds),
        ("st.global.b32 [%rd60+-4], 1;", simulator.OutOfBounds),
        ("ld.global.b32 %d0, [%rd60+2];", simulator.MisalignedAccess),
        ("ld.global.v4.b32 {%d0, %d1, %d2, %d3}, [%rd60+8];", simulator.MisalignedAccess),
        ("mov.b32 %r1, memory; ld.shared.b32 %d0, [%r1+64];", simulator.OutOfBounds),
        ("mov.b32 %r1, 0; ld.shared.b32 %d0, [%r1];", simulator.OutOfBounds),
        ("mov.b32 %r1, memory; ld.shared.b64 %rd1, [%r1+4];", simulator.MisalignedAccess),
    ],
)
def test_bad_addresses_are_reported_with_the_instruction(body, error):
    with pytest.raises(error, match=r"PTX line \d+: (ld|st)"):
        run(body, np.zeros((32, 1), np.uint32), shared=64)


def test_read_only_memory():
    constant, result = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    from simulator.snippets import module

    memory = simulator.GlobalMemory()
    memory.register(constant.ctypes.data, constant.nbytes, "constant", writable=False)
    memory.register(result.ctypes.data, result.nbytes, "result")
    params = [np.uint64(x.ctypes.data).tobytes() for x in (constant, result)] + [bytes(128)]
    with pytest.raises(simulator.OutOfBounds, match="read-only constant"):
        simulator.launch(
            module("st.global.b32 [%rd60], 1;"), "snippet", grid=(1, 1, 1), block=(32, 1, 1),
            params=params, memory=memory,
        )  # fmt: skip


def test_registers_and_shared_memory_start_as_nan():
    body = "mov.b32 %r1, memory; ld.shared.b32 %d0, [%r1]; add.f32 %d1, %r7, 0f3F800000;"
    got = run(body, outputs=2, shared=64, hazards="off")
    assert np.isnan(got.view(np.float32)).all()
    with pytest.raises(simulator.HazardError, match="reads shared memory that nothing has written"):
        run(body, outputs=2, shared=64)


# ------------------------------------------------------------------------------- lanes of a warp

SHUFFLES = {
    "shfl.sync.bfly.b32 %d0, %a0, 2, 31, -1;": lambda lane: lane ^ 2,
    "shfl.sync.idx.b32 %d0, %a0, 7, 31, -1;": lambda lane: 7,
    "shfl.sync.idx.b32 %d0, %a0, 1, 0x1C1F, -1;": lambda lane: lane & ~3 | 1,
    "shfl.sync.up.b32 %d0, %a0, 3, 0, -1;": lambda lane: lane - 3 if lane >= 3 else lane,
    "shfl.sync.down.b32 %d0, %a0, 5, 31, -1;": lambda lane: lane + 5 if lane + 5 < 32 else lane,
    "xor.b32 %r1, %r500, 31; shfl.sync.idx.b32 %d0, %a0, %r1, 31, -1;": lambda lane: 31 - lane,
}


@pytest.mark.parametrize("body", SHUFFLES)
def test_shuffles_stay_within_each_warp(body):
    values = RNG.integers(0, 2**32, (128, 1)).astype(np.uint32)
    got = run(body, values, threads=128)[:, 0]
    for thread in range(128):
        lane = SHUFFLES[body](thread % 32)
        assert got[thread] == values[thread // 32 * 32 + lane, 0]


def test_votes_and_reductions():
    body = """
    setp.gt.u32 %p1, %a0, 7;
    vote.sync.ballot.b32 %d0, %p1, -1;
    vote.sync.any.pred %p2, %p1, -1;
    selp.b32 %d1, 1, 0, %p2;
    redux.sync.add.u32 %d2, %a0, -1;
    redux.sync.max.s32 %d3, %a0, -1;
    elect.sync %d4|%p3, -1;
    @%p3 add.s32 %d4, %d4, 100;
    """
    values = np.concatenate([np.arange(32), np.zeros(32)]).astype(np.uint32)[:, None]
    got = run(body, values, 5, threads=64)
    assert got[0].tolist() == [0xFFFFFF00, 1, 496, 31, 100]
    assert got[1:32].tolist() == [[0xFFFFFF00, 1, 496, 31, 0]] * 31
    assert got[32].tolist() == [0, 0, 0, 0, 100]


@pytest.mark.parametrize("transpose", ["", ".trans"])
def test_matrix_store_and_load(transpose):
    """Thread t holds row t // 4, columns 2 (t % 4) and the next; transposed: the other way."""
    body = f"""
    mov.b32 %r1, memory;
    mad.lo.s32 %r2, %r500, 16, %r1;
    stmatrix.sync.aligned.m8n8.x4{transpose}.shared.b16 [%r2], {{%a0, %a1, %a2, %a3}};
    bar.sync 0;
    ld.shared.v4.b32 {{%d0, %d1, %d2, %d3}}, [%r2];
    ldmatrix.sync.aligned.m8n8.x4{transpose}.shared.b16 {{%d4, %d5, %d6, %d7}}, [%r2];
    """
    values = RNG.integers(0, 2**32, (32, 4)).astype(np.uint32)
    got = run(body, values, 8, shared=512)
    rows = np.ascontiguousarray(got[:, :4]).view(np.uint16)  # lane 8 i + r: row r of matrix i
    for matrix in range(4):
        for thread in range(32):
            for half in (0, 1):
                row, column = thread // 4, 2 * (thread % 4) + half
                if transpose:
                    row, column = column, row
                element = values[thread, matrix] >> 16 * half & 0xFFFF
                assert rows[8 * matrix + row, column] == element
    np.testing.assert_array_equal(got[:, 4:], values)


# --------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("seed", range(4))
def test_nested_branches_and_loops_of_different_length(seed):
    """Collatz steps: irregular lanes, loops and branches within branches."""
    body = """
    mov.b32 %d0, 0;
    mov.b32 %r1, %a0;
    LOOP:
    setp.le.u32 %p1, %r1, 1;
    @%p1 bra DONE;
    and.b32 %r2, %r1, 1;
    setp.eq.u32 %p2, %r2, 0;
    @%p2 bra EVEN;
    mad.lo.s32 %r1, %r1, 3, 1;
    setp.gt.u32 %p3, %r1, 100;
    @!%p3 bra JOIN;
    add.s32 %d1, %d1, 1;
    bra JOIN;
    EVEN:
    shr.u32 %r1, %r1, 1;
    JOIN:
    add.s32 %d0, %d0, 1;
    bra LOOP;
    DONE:
    bar.sync 0;
    """
    values = RNG.permutation(128).astype(np.uint32)
    got = run("mov.b32 %d1, 0;" + body, values[:, None], 2, threads=128, seed=seed)
    for value, row in zip(values.tolist(), got.tolist(), strict=True):
        steps = large = 0
        while value > 1:
            if value % 2:
                value = 3 * value + 1
                large += value > 100
            else:
                value //= 2
            steps += 1
        assert row == [steps, large]


def test_lanes_and_warps_may_exit_early():
    body = """
    mov.b32 %d0, 1;
    setp.lt.u32 %p1, %r500, 45;
    @%p1 st.global.b32 [%rd63], 7;
    @%p1 ret;
    bar.sync 0;
    """
    got = run(body, threads=128)[:, 0]
    assert got.tolist() == [7] * 45 + [1] * 83


def test_predicated_stores_and_atomics_touch_chosen_lanes_only():
    body = """
    mov.b32 %d0, 3;
    setp.eq.u32 %p1, %a0, 1;
    @!%p1 st.global.b32 [%rd62], 9;
    """
    values = RNG.integers(0, 2, (128, 1)).astype(np.uint32)
    before = values.copy()
    run(body, values, threads=128)
    np.testing.assert_array_equal(values, np.where(before == 1, 1, 9))


def test_predicated_loads_of_scattered_lanes():
    """A branch leaves lanes at uneven distances; a predicate chooses among them."""
    body = """
    mov.b32 %d0, 0;
    mul.lo.s32 %r1, %r500, %r500;
    and.b32 %r1, %r1, 9;
    setp.ne.u32 %p1, %r1, 1;
    @%p1 bra SKIP;
    and.b32 %r2, %r500, 2;
    setp.eq.u32 %p2, %r2, 0;
    add.s32 %d0, %d0, 1000;
    @%p2 ld.global.b32 %d0, [%rd62];
    add.s32 %d0, %d0, 1;
    SKIP:
    """
    values = RNG.integers(0, 2**31, 128).astype(np.uint32)
    got = run(body, values[:, None], threads=128)[:, 0]
    for thread in range(128):
        want = 0
        if thread * thread & 9 == 1:
            want = 1001 if thread & 2 else int(values[thread]) + 1
        assert got[thread] == want


def test_a_shuffle_from_an_absent_lane_is_a_hazard():
    body = """
    setp.lt.u32 %p1, %r500, 4;
    @!%p1 bra SKIP;
    shfl.sync.idx.b32 %d0, %r500, 20, 31, -1;
    SKIP:
    """
    with pytest.raises(simulator.HazardError, match="does not take part"):
        run(body)
