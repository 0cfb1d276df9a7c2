"""FP8 attention in PyTorch with the arithmetic of a Hopper GPU: what quantisation costs, on a CPU.

For every query, over tiles of keys from the last to the first (`quantize.py` makes the operands):

    S = Q K^T                                   tensor core: e4m3 products, `bits` bits kept of sums
    s = S * descale_q * descale_k * softmax_scale * log2(e)                              float32
    m = max(m, max(s));  p = 2^(s - m + 8);  l = l * 2^(m_before - m) + sum(p)           float32
    P = e4m3(p * descale_v / its largest of the head), to the nearest, ties to even
    O = O * 2^(m_before - m) + P V              tensor core, or flushed into float32: `Arithmetic`
    out = O / l * the largest descale_v;  lse = (m - 8) ln 2 + ln l

p spans [0, 256], below e4m3's 448: of the powers of two the one that leaves the fewest of its
values to the subnormal numbers (FlashAttention-3; arXiv 2606.06521).  l sums p unrounded, as in
FlashAttention-3: rounding errors of P do not cancel, but have mean 0.

**The accumulator.**  Hopper's FP8 tensor cores keep fewer bits of a sum than the float32 register
that holds it: the leading one and 13 more.  SageAttention2 (arXiv 2411.10958) saw the register's
last 10 bits come back as zeros; DeepSeek-V3 (arXiv 2412.19437, section 3.3.2) describes products
shifted to the greatest exponent and about 14 bits kept; arXiv 2512.07004 has bit-accurate models.
Two models of that, after each 32 values of k:

    Cut.SUMS      sum the products in float32, add, cut the sum to `bits` significant bits: the
                  simulator's model (`simulator.Options.fp8_accumulator_bits`), bit for bit
    Cut.PRODUCTS  shift the products and the accumulator to the greatest exponent among them, cut
                  each, sum exactly, cut the sum: more pessimistic, and slower by a factor of 20

**Codes** (`Arithmetic.codes`, `exact_softmax=False`).  The eight bits of an e4m3 number are, read
as an integer, a line through its logarithm at every power of two: 8 (log2 p + 7).  Rounding that to
an integer gives P without an exponential, off by 3.1 % (rms; 7.9 % at most; to the nearest number
e4m3 is off by 2.6 and 6.25 %).  l is then the sum of P as the tensor core adds it, since there is
no p: the errors cancel in O / l where values are alike.  What is below 2^-15 of the greatest score
becomes 0.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hopper_attention import reference
from hopper_attention.problem.quantization import Quantized
from hopper_attention.problem.values import FULL, Mask
from hopper_attention.reference.quantize import spread

HOPPER_BITS = 14
"""Significant bits of a sum, the leading one included."""
FLOAT32_BITS = 24
STEP = 32
"""Values of k that one FP8 instruction sums."""
P_EXPONENT = 8
"""P is at most 2^8."""
CODE_OFFSET = -0.45
"""The mean error of codes is 6e-4 of P then, and powers of two are exact."""
LOG2_E = math.log2(math.e)
ELEMENTS = 1 << 20
"""The number of a tile's scores that are computed at once, as caches hold so many."""
PRODUCTS = 1 << 24
"""The number of products that `Cut.PRODUCTS` holds at once."""
VISIBLE = 1 << 26
"""Elements of a mask that are held at once."""


class Cut(enum.Enum):
    SUMS = "sums"
    PRODUCTS = "products"


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of the emulated kernel; by default Hopper's, with two levels.

    bits: significant bits that tensor cores keep of sums; None: float32's.
    cut: where bits are lost.
    two_level: PV of `accumulate_every` tiles goes into an accumulator of its own, which is then
        added to O in float32: after each tile, last to first, whose number it divides.  False: one
        accumulator in the tensor core for all tiles ("plain"), rescaled in float32 when the maximum
        grows.
    p_dtype: P is rounded to it; None: not at all.
    codes: P is the e4m3 number whose bits are 8 (log2 p + 7) + CODE_OFFSET, rounded.
    tile_n: keys of a tile.
    """

    bits: int | None = HOPPER_BITS
    cut: Cut = Cut.SUMS
    two_level: bool = True
    accumulate_every: int = 1
    p_dtype: torch.dtype | None = torch.float8_e4m3fn
    codes: bool = False
    tile_n: int = 128

    def __post_init__(self) -> None:
        if self.bits is not None and not 2 <= self.bits <= FLOAT32_BITS:
            raise ValueError(f"bits must be 2 to {FLOAT32_BITS} or None, got {self.bits}")
        if self.tile_n < 1 or self.tile_n % STEP:
            raise ValueError(f"tile_n must be a multiple of {STEP}, got {self.tile_n}")
        if self.codes and self.p_dtype is not torch.float8_e4m3fn:
            raise ValueError(f"codes are e4m3 numbers, p_dtype is {self.p_dtype}")
        if self.accumulate_every < 1:
            raise ValueError(f"accumulate_every must be at least 1, got {self.accumulate_every}")


HOPPER = Arithmetic()
PLAIN = Arithmetic(two_level=False)
EXACT = Arithmetic(bits=None, two_level=False)
"""Sums in float32; P is still rounded."""
CODES = Arithmetic(codes=True)


def attention(
    q: Quantized,
    k: Quantized,
    v: Quantized,
    *,
    softmax_scale: float,
    mask: Mask = FULL,
    arithmetic: Arithmetic = HOPPER,
) -> tuple[Tensor, Tensor]:
    """(out, lse), float32: (batch, seqlen_q, heads, dv) and (batch, heads, seqlen_q).

    Values of q (batch, seqlen_q, heads, d), k (batch, seqlen_k, heads_kv, d), v (.., dv) may have
    any float dtype: with `exactly(x)` an operand is not quantised.  The masks are those of
    `reference.attention`.  Queries without keys: out 0, lse -inf.
    """
    batch, seqlen_q, heads, _ = q.values.shape
    out = q.values.new_zeros((batch, seqlen_q, heads, v.values.shape[-1]), dtype=torch.float32)
    lse = out.new_full((batch, heads, seqlen_q), -torch.inf)
    for b in range(batch):
        sequence = _Sequence.of(q, k, v, b, softmax_scale * LOG2_E)
        if arithmetic.codes and bool((sequence.v_relative != 1).any()):
            raise ValueError("codes: V must have one scale a head, as P cannot take its blocks'")
        for rows in sequence.blocks_of_queries(arithmetic.tile_n, mask):
            part = sequence.attend(rows, mask, arithmetic)
            out[b, rows], lse[b, :, rows] = part[0].transpose(0, 1), part[1]
    return out, lse


def exactly(x: Tensor) -> Quantized:
    """Values that are what they stand for."""
    return Quantized(x, torch.ones(1, device=x.device))


def dequantized(x: Quantized) -> Tensor:
    """float64, (batch, seqlen, heads, head_dim)."""
    return x.values.double() * spread(x.descale, x.values).double()


def gemm(a: Tensor, b: Tensor, total: Tensor | None, arithmetic: Arithmetic) -> Tensor:
    """total + a b of a (.., m, k) and b (.., k, n), float32, 32 values of k at a time."""
    if arithmetic.bits is None:
        return a @ b if total is None else total + a @ b
    for start in range(0, a.shape[-1], STEP):
        left, right = a[..., start : start + STEP], b[..., start : start + STEP, :]
        if arithmetic.cut is Cut.PRODUCTS:
            total = _aligned_step(left, right, total, arithmetic.bits)
        else:
            total = left @ right if total is None else total + left @ right
            total = cut(total, arithmetic.bits)
    return a @ b if total is None else total


def cut(x: Tensor, bits: int) -> Tensor:
    """Toward zero, to so many significant bits; x float32, which is overwritten."""
    return x.view(torch.int32).bitwise_and_(-(1 << (FLOAT32_BITS - bits))).view(torch.float32)


def _aligned_step(a: Tensor, b: Tensor, total: Tensor | None, bits: int) -> Tensor:
    """total + a b with products and total cut to the greatest one's last kept bit."""
    if total is None:
        total = a.new_zeros((*a.shape[:-1], b.shape[-1]))
    result = torch.empty_like(total)
    rows = max(1, PRODUCTS // max(1, b.numel()))
    for start in range(0, a.shape[-2], rows):
        part = slice(start, start + rows)
        products = a[..., part, None, :].double() * b.mT[..., None, :, :].double()
        terms = torch.cat((products, total[..., part, :, None].double()), dim=-1)
        exponent = torch.frexp(terms.abs().amax(dim=-1, keepdim=True)).exponent
        last = torch.ldexp(torch.ones_like(exponent, dtype=terms.dtype), exponent - bits)
        kept = (terms / last).trunc().sum(dim=-1) * last[..., 0]
        result[..., part, :] = cut(kept.float(), bits)
    return result


@dataclass
class _Sequence:
    """One sequence of a batch.  Heads come first: heads_kv products, a group's rows together."""

    q: Tensor
    """(heads, seqlen_q, d), float32."""
    k: Tensor
    """(heads_kv, seqlen_k, d)."""
    v: Tensor
    """(heads_kv, seqlen_k, dv)."""
    q_factor: Tensor
    """(heads, seqlen_q, 1): descale times softmax_scale times log2(e)."""
    k_factor: Tensor
    """(heads, 1, seqlen_k): each query head's, of the head it reads."""
    v_largest: Tensor
    """(heads, 1, 1): descale."""
    v_relative: Tensor
    """(heads, 1, seqlen_k): descales over the largest of a head."""

    @staticmethod
    def of(q: Quantized, k: Quantized, v: Quantized, b: int, scale: float) -> _Sequence:
        heads, heads_kv, seqlen_k = q.values.shape[2], k.values.shape[2], k.values.shape[1]
        group = heads // heads_kv

        def heads_first(x: Quantized) -> Tensor:
            return x.values[b].float().transpose(0, 1).contiguous()

        def factors(x: Quantized) -> Tensor:
            """(heads of x, seqlen, 1)."""
            batch, seqlen, count, _ = x.values.shape
            return spread(x.descale, x.values).expand(batch, seqlen, count, 1)[b].transpose(0, 1)

        v_factor = factors(v).mT.repeat_interleave(group, dim=0)
        v_largest = (
            v_factor.amax(dim=-1, keepdim=True) if seqlen_k else v_factor.new_ones(heads, 1, 1)
        )
        return _Sequence(
            q=heads_first(q),
            k=heads_first(k),
            v=heads_first(v),
            q_factor=factors(q) * scale,
            k_factor=factors(k).mT.repeat_interleave(group, dim=0),
            v_largest=v_largest,
            v_relative=v_factor / v_largest,
        )

    def blocks_of_queries(self, tile_n: int, mask: Mask) -> Iterator[slice]:
        heads, seqlen_q, _ = self.q.shape
        step = max(1, ELEMENTS // (heads * tile_n))
        if mask != FULL:
            step = max(1, min(step, VISIBLE // max(1, self.k.shape[1])))
        for start in range(0, seqlen_q, step):
            yield slice(start, min(start + step, seqlen_q))

    def attend(self, rows: slice, mask: Mask, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
        """(heads, rows, dv) and (heads, rows)."""
        (heads, seqlen_q, _), seqlen_k, n = self.q.shape, self.k.shape[1], arithmetic.tile_n
        count = rows.stop - rows.start
        state = _State.start(heads, count, self.v.shape[-1], arithmetic)
        seen = None
        if mask != FULL:
            seen = reference.visible(mask, seqlen_q, seqlen_k, rows, self.q.device)
        for start in range((seqlen_k - 1) // n * n, -1, -n):
            keys = slice(start, min(start + n, seqlen_k))
            if seen is not None and not seen[:, keys].any():
                continue
            scores = self.scores(rows, keys, seen, arithmetic)
            weights = state.weights(scores, self.v_relative[..., keys])
            state.add(weights, self.v[:, keys], start // n)
        out, lse = state.result()
        return out * self.v_largest, lse

    def scores(
        self, rows: slice, keys: slice, seen: Tensor | None, arithmetic: Arithmetic
    ) -> Tensor:
        """(heads, rows, keys) in units of log 2."""
        q, k = self.q[:, rows], self.k[:, keys]
        products = _ungrouped(gemm(_grouped(q, len(k)), k.mT, None, arithmetic), self.q.shape[0])
        scores = products * self.q_factor[:, rows] * self.k_factor[..., keys]
        return scores if seen is None else scores.masked_fill_(~seen[:, keys], -torch.inf)


@dataclass
class _State:
    """The state of online softmax, for (heads, rows)."""

    arithmetic: Arithmetic
    row_max: Tensor
    row_sum: Tensor
    main: Tensor
    """(heads, rows, dv), float32: what was flushed; with codes a column of row sums behind it."""
    partial: Tensor | None = None
    """The tensor core's accumulator, of as many columns."""

    @staticmethod
    def start(heads: int, rows: int, dv: int, arithmetic: Arithmetic) -> _State:
        least = torch.full((heads, rows, 1), -torch.inf)
        columns = dv + arithmetic.codes
        return _State(
            arithmetic, least, torch.zeros_like(least), torch.zeros((heads, rows, columns))
        )

    def weights(self, scores: Tensor, v_relative: Tensor) -> Tensor:
        """P of a tile as the tensor core gets it; everything before is rescaled."""
        row_max = torch.maximum(self.row_max, scores.amax(dim=-1, keepdim=True))
        shown = torch.where(row_max == -torch.inf, 0.0, row_max)  # a row without keys so far
        exponents = scores.sub_(shown - P_EXPONENT)
        alpha = torch.exp2(self.row_max - shown)
        self.main *= alpha
        if self.partial is not None:
            self.partial *= alpha
        self.row_max = row_max
        if self.arithmetic.codes:
            return coded(exponents)
        p = exponents.exp2_()
        self.row_sum = self.row_sum * alpha + p.sum(dim=-1, keepdim=True)
        dtype, p = self.arithmetic.p_dtype, p * v_relative
        return p if dtype is None else p.to(dtype).float()

    def add(self, p: Tensor, v: Tensor, tile: int) -> None:
        """p (heads, rows, keys) times v (heads_kv, keys, dv)."""
        if self.arithmetic.codes:
            v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
        heads_kv, heads = len(v), len(p)
        total = None if self.partial is None else _grouped(self.partial, heads_kv)
        sums = gemm(_grouped(p, heads_kv), v, total, self.arithmetic)
        self.partial = _ungrouped(sums, heads)
        if self.arithmetic.two_level and tile % self.arithmetic.accumulate_every == 0:
            self.flush()

    def flush(self) -> None:
        if self.partial is not None:
            self.main += self.partial
        self.partial = None

    def result(self) -> tuple[Tensor, Tensor]:
        self.flush()
        sums, row_sum = self.main, self.row_sum
        if self.arithmetic.codes:
            sums, row_sum = sums[..., :-1], sums[..., -1:]
            # Codes know no NaN: the maximum tells of it, and of an infinity.
            lost = self.row_max.isnan() | (self.row_max == torch.inf)
            row_sum = row_sum.masked_fill(lost, torch.nan)
        out = sums / row_sum.masked_fill(row_sum == 0, 1.0)
        lse = (self.row_max - P_EXPONENT) / LOG2_E + row_sum.log()
        return out, lse[..., 0]


def coded(exponents: Tensor) -> Tensor:
    """Return 2^exponents as e4m3 codes: -inf and whatever is small become 0."""
    codes = (8 * (exponents + 7) + CODE_OFFSET).round().clamp(0, 255).to(torch.uint8)
    return codes.view(torch.float8_e4m3fn).float()


def _grouped(heads: Tensor, heads_kv: int) -> Tensor:
    """(heads, rows, n) -> (heads_kv, group * rows, n)."""
    count, rows, n = heads.shape
    return heads.reshape(heads_kv, count // heads_kv * rows, n)


def _ungrouped(grouped: Tensor, heads: int) -> Tensor:
    """(heads_kv, group * rows, n) -> (heads, rows, n)."""
    heads_kv, rows, n = grouped.shape
    return grouped.reshape(heads, heads_kv * rows // heads, n)
