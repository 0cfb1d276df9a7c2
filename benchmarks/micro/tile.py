"""The inner loop of d64 forward in miniature: always the same block of keys, no masks, no loads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .kernel import Role, Work, lines
from .operands import accumulators, bf16, bf16_bits, k_major, mn_major, swizzled, wgmma

HEAD_DIM = 64
COPIES = 3
SLAB = 64 * 128
"""Bytes of 64 rows of 64 elements."""
FIRST_TURN = 4
"""Named barriers: 1 + number for a copy's own threads, FIRST_TURN + number for turns."""

SCALE = 1.5

SCHEDULES = {
    "serial": "Q K, wait, exp, P V, wait",
    "sunk": "Q K and P V of the block before, wait for both, exp",
    "pinned": "Q K and P V of the block before, wait for Q K, exp, wait for P V",
}


@dataclass(frozen=True)
class Tile:
    """One consumer warpgroup's step: 64 rows by `keys`."""

    keys: int
    schedule: str
    softmax: bool = False
    """Maximum, scale and subtraction, rescaling of O; without, exp2 of the scores and its sum."""
    p_in_shared: bool = False
    """P goes through shared memory, as in FlashAttention-3's 192x192."""
    turns: bool = False
    """Warpgroups issue their products one after another."""

    @property
    def does(self) -> Work:
        """A tile, by the model the larger of WGMMA's and exp2's clocks."""
        products = HEAD_DIM // 16 * self.keys // 2 + self.keys // 16 * HEAD_DIM // 2
        exponentials = 8 * (self.keys // 2 + (2 if self.softmax else 0))
        return Work(f"64x{self.keys}", 1, max(products, exponentials))

    @property
    def k_at(self) -> int:
        return COPIES * SLAB

    @property
    def v_at(self) -> int:
        return self.k_at + self.keys * 128

    @property
    def p_at(self) -> int:
        return self.scale_at + 1024

    @property
    def shared_memory_bytes(self) -> int:
        return self.p_at + COPIES * self.p_bytes

    @property
    def p_bytes(self) -> int:
        """Bytes of a copy of P."""
        return self.keys // 64 * SLAB

    @property
    def scale_at(self) -> int:
        return self.v_at + self.keys * 128

    def image(self) -> bytes:
        q, k, v = self.inputs()
        scale = np.array([SCALE, 0, 0, 0], np.float32).tobytes()
        return b"".join(swizzled(bf16_bits(x)) for x in (*q, k, v)) + scale

    def inputs(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Q of each copy, K, V."""
        random = np.random.default_rng(self.keys)

        def normal(rows: int, scale: float) -> np.ndarray:
            return bf16(scale * random.standard_normal((rows, HEAD_DIM))).astype(np.float64)

        return (
            [normal(64, 0.35) for _ in range(COPIES)],
            normal(self.keys, 0.35),
            normal(self.keys, 1),
        )

    def expected(self, copy: int, passes: int) -> np.ndarray:
        """O and the thread's share of the sums of its two rows, after `passes + 1` blocks."""
        q, k, v = self.inputs()
        scores = q[copy] @ k.T
        if self.softmax:
            scores = SCALE * (scores - scores.max(axis=1, keepdims=True))
        p = np.exp2(scores)
        shares = accumulators(p).reshape(128, -1, 2, 2).sum(axis=(1, 3))
        return (passes + 1) * np.hstack((accumulators(p @ v), shares))

    def role(self) -> Role:
        pipelined = self.schedule != "serial"
        body: list[str] = []
        if pipelined:
            body += self._turn("wait")
            body += ["wgmma.fence.sync.aligned;", *self._scores(), *self._products()]
            body += self._turn("give")
            body += ["wgmma.wait_group.sync.aligned 1;", *self._maximum()]
            if self.schedule == "sunk":
                body.append("wgmma.wait_group.sync.aligned 0;")
            body += self._exponentials()
            if self.schedule == "pinned":
                body += [*PIN, "wgmma.wait_group.sync.aligned 0;"]
            body += [*self._rescale(), *self._convert()]
        else:
            body += [
                "wgmma.fence.sync.aligned;",
                *self._scores(),
                "wgmma.wait_group.sync.aligned 0;",
            ]
            body += [*self._maximum(), *self._exponentials(), *self._rescale(), *self._convert()]
            body += [
                "wgmma.fence.sync.aligned;",
                *self._products(),
                "wgmma.wait_group.sync.aligned 0;",
            ]
        return Role(
            setup=lines(self._setup()),
            body=lines(body),
            finish="",
            behind=lines(self._last()),
            results=(*(f"o{i}" for i in range(HEAD_DIM // 2)), "sum0", "sum1"),
            does=(self.does,),
            expected=self.expected,
            tolerance=0.02,
        )

    def _setup(self) -> list[str]:
        """Registers, and softmax of a first block; the last P V is behind the loop."""
        setup = [
            f".reg .b32 s<{self.keys // 2}>, o<{HEAD_DIM // 2}>, p<{self.keys // 4}>;",
            ".reg .b32 sum<2>, max<2>, old<2>, factor<2>, shift<2>, scale, other;",
            ".reg .b32 own, turn, next, store<4>, row, unit;",
            ".reg .pred impossible;",
            f".reg .b64 a, b, q<4>, k<4>, v<{self.keys // 16}>, own_p;",
            *(f"mov.b32 o{i}, 0;" for i in range(HEAD_DIM // 2)),
            *(f"mov.b32 sum{r}, 0;\nmov.b32 max{r}, 0fFF800000;" for r in range(2)),
            f"ld.shared.b32 scale, [%base+{self.scale_at}];",
            *self._descriptors(),
            *self._store_addresses(),
            "add.u32 own, %number, 1;",
            f"add.u32 turn, %number, {FIRST_TURN};",
            "add.u32 next, turn, 1;",
            f"setp.eq.u32 %here, %number, {COPIES - 1};",
            f"@%here mov.b32 next, {FIRST_TURN};",
        ]
        setup += ["wgmma.fence.sync.aligned;", *self._scores(), "wgmma.wait_group.sync.aligned 0;"]
        setup += [*self._maximum(), *self._exponentials(), *self._convert()]
        if self.schedule == "serial":
            setup += ["wgmma.fence.sync.aligned;", *self._products()]
            setup.append("wgmma.wait_group.sync.aligned 0;")
        if self.turns:
            setup.append("@%here bar.arrive next, 256;")
        return setup

    def _descriptors(self) -> list[str]:
        """Descriptors of Q, each copy its own, of K and V; and the place of P."""
        steps = range(0 if self.p_in_shared else self.keys // 16)
        first = range(HEAD_DIM // 16)
        base = "%base_descriptor"
        code = [f"mul.wide.u32 a, %number, {SLAB >> 4};", f"add.u64 a, a, {base};"]
        code += [f"add.u64 q{i}, a, {k_major(0, 64, i)};" for i in first]
        code += [f"add.u64 k{i}, {base}, {k_major(self.k_at, self.keys, i)};" for i in first]
        code += [f"add.u64 v{i}, {base}, {mn_major(self.v_at, self.keys, i)};" for i in steps]
        return [
            *code,
            f"mul.wide.u32 own_p, %number, {self.p_bytes >> 4};",
            f"add.u64 own_p, own_p, {base};",
        ]

    def _last(self) -> list[str]:
        """P V of the last block; turns end as they began."""
        if self.schedule == "serial":
            return []
        behind = [
            "wgmma.fence.sync.aligned;",
            *self._products(),
            "wgmma.wait_group.sync.aligned 0;",
        ]
        if self.turns:
            behind += ["setp.eq.u32 %here, %number, 0;", "@%here bar.sync turn, 256;"]
        return behind

    def _turn(self, what: str) -> list[str]:
        if not self.turns:
            return []
        return ["bar.sync turn, 256;" if what == "wait" else "bar.arrive next, 256;"]

    def _scores(self) -> list[str]:
        """S = Q K^T."""
        code = []
        for step in range(HEAD_DIM // 16):
            code.append(wgmma(self.keys, "s", f"q{step}", f"k{step}", accumulate=step > 0))
        return [*code, "wgmma.commit_group.sync.aligned;"]

    def _products(self) -> list[str]:
        """O += P V."""
        code = []
        for step in range(self.keys // 16):
            v = mn_major(self.v_at, self.keys, step)
            if self.p_in_shared:  # as many constant descriptors exceed the uniform registers
                p = k_major(self.p_at, 64, step)
                code += [f"add.u64 a, own_p, {p};", f"add.u64 b, %base_descriptor, {v};"]
                code.append(wgmma(HEAD_DIM, "o", "a", "b", b_mn_major=True))
            else:
                a = [f"p{4 * step + i}" for i in range(4)]
                code.append(wgmma(HEAD_DIM, "o", a, f"v{step}", b_mn_major=True))
        return [*code, "wgmma.commit_group.sync.aligned;"]

    def _maximum(self) -> list[str]:
        """New row maxima, shared by the four threads of a row; factors for what was summed."""
        if not self.softmax:
            return []
        code = [f"mov.b32 old{r}, max{r};" for r in range(2)]
        code += [f"max.f32 max{r}, max{r}, s{i};" for i, r in self._scores_and_rows()]
        for lanes in (1, 2):
            for r in range(2):
                code.append(f"shfl.sync.bfly.b32 other, max{r}, {lanes}, 31, -1;")
                code.append(f"max.f32 max{r}, max{r}, other;")
        for r in range(2):
            code += [
                f"sub.f32 factor{r}, old{r}, max{r};",
                f"mul.f32 factor{r}, factor{r}, scale;",
                f"ex2.approx.ftz.f32 factor{r}, factor{r};",
                f"mul.f32 shift{r}, max{r}, scale;",
                f"neg.f32 shift{r}, shift{r};",
            ]
        return code + [
            f"fma.rn.f32 s{i}, s{i}, scale, shift{r};" for i, r in self._scores_and_rows()
        ]

    def _scores_and_rows(self) -> list[tuple[int, int]]:
        return [(i, i // 2 % 2) for i in range(self.keys // 2)]

    def _exponentials(self) -> list[str]:
        """P in place of S, and the sum of everything: what the pin depends on."""
        code = [f"mul.f32 sum{r}, sum{r}, factor{r};" for r in range(2)] if self.softmax else []
        code += [f"ex2.approx.ftz.f32 s{i}, s{i};" for i in range(self.keys // 2)]
        return code + [f"add.f32 sum{r}, sum{r}, s{i};" for i, r in self._scores_and_rows()]

    def _rescale(self) -> list[str]:
        if not self.softmax:
            return []
        return [f"mul.f32 o{i}, o{i}, factor{i // 2 % 2};" for i in range(HEAD_DIM // 2)]

    def _convert(self) -> list[str]:
        """P as bf16: the A operand's registers, or from there to shared memory."""
        code = []
        for step in range(self.keys // 16):
            words = range(4 * step, 4 * step + 4)
            code += [f"cvt.rn.bf16x2.f32 p{i}, s{2 * i + 1}, s{2 * i};" for i in words]
            if self.p_in_shared:
                place = f"store{step % 4}+{self.p_at + step // 4 * SLAB}"
                matrices = ", ".join(f"p{i}" for i in words)
                code.append(f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [{place}], {{{matrices}}};")
        if not self.p_in_shared:
            return code
        return [*code, "fence.proxy.async.shared::cta;", "bar.sync own, 128;"]

    def _store_addresses(self) -> list[str]:
        """Addresses of this lane's row of four 8x8 matrices, for each k16 step of a slab."""
        code = [
            f"mad.lo.u32 row, %number, {self.p_bytes}, %base;",
            "and.b32 unit, %thread, 96;",
            "shr.u32 unit, unit, 1;",
            "and.b32 %at, %thread, 15;",
            "add.u32 unit, unit, %at;",  # 16 rows a warp, lane % 16
            "mad.lo.u32 row, unit, 128, row;",
        ]
        for step in range(4):
            code += [
                "shr.u32 unit, %lane, 4;",
                f"add.u32 unit, unit, {2 * step};",
                "and.b32 %at, %lane, 7;",
                "xor.b32 unit, unit, %at;",
                f"mad.lo.u32 store{step}, unit, 16, row;",
            ]
        return code


PIN = (
    "add.f32 other, sum0, sum1;",
    "setp.lt.f32 impossible, other, 0fBF800000;",
    "@impossible st.shared.b32 [%base], other;",
)
"""No sum is negative, but ptxas cannot know: what leads to the sums stays in front of the wait."""
