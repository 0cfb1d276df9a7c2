"""Online softmax over blocks of keys, in the exp2 domain, on accumulator fragments.

After each block, for every row: row_max = max of the scores so far, row_sum = sum of
exp2((score - row_max) * scale_log2 + headroom) over *this thread's* columns; the quad's four
partial sums are added once, at the end.  FlashAttention-2 (arXiv 2307.08691), section 3.1.

Where groups of a block have scales of their own, row_max is of the scaled scores.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from hopper_attention.cute_kernels.primitives.arithmetic import maximum
from hopper_attention.cute_kernels.primitives.instructions import fmax

LN_2 = math.log(2.0)
LOG2_E = math.log2(math.e)

LOWEST = -1e30
"""The start of row_max.  Lower scores, -inf above all, weigh nothing; it is finite, times the
greatest scale (1e6) as well, since -inf - -inf would be NaN."""
CHAINS = 4
"""Independent chains of a row's reduction: one dependent chain would be bound by latency."""


def reduce_row(scores: cute.Tensor, row: int, op, columns: range | None = None) -> Float32:
    """op over one row of this thread's (rows, columns) fragment, or some columns of it."""
    start, *rest = range(cute.size(scores, mode=[1])) if columns is None else columns
    partial = [scores[row, start], *(scores[row, j] for j in rest[: CHAINS - 1])]
    for count, j in enumerate(rest[CHAINS - 1 :]):
        partial[count % CHAINS] = op(partial[count % CHAINS], scores[row, j])
    return op(op(partial[0], partial[1]), op(partial[2], partial[3]))


def add(a, b):
    return a + b


def top_unless_negative(scores: cute.Tensor, row: int, columns: range) -> Float32:
    """The maximum of one row's columns, unless it is negative; then any of them.

    As integers, three at a time and as fast as two floats (VIMNMX3).  They order what is not
    negative as the floats do, NaN on top, and the negative ones below, but the other way round.
    """
    values = [scores[row, j].bitcast(Int32) for j in columns]
    while len(values) > 1:
        values = [functools.reduce(maximum, values[i : i + 3]) for i in range(0, len(values), 3)]
    return values[0].bitcast(Float32)


def quad_max(value: Float32) -> Float32:
    """Over the four threads that hold a row."""
    return cute.arch.warp_reduction(value, fmax, threads_in_group=4)


@dataclass(frozen=True)
class ScaleGroup:
    """Columns of a block whose scores share a scale."""

    columns: range
    """The columns of one thread."""
    scale_log2: Float32
    """softmax_scale * log2(e), positive."""
    headroom: Any = None
    """exp2 of it is what the largest score so far becomes; None: 0."""
    weight: Any = None
    """The factor of the columns in the sum; None: 1."""
    inner: Any = None
    """The inner factor of `cap`, if there is one."""

    def of(self, scores: cute.Tensor) -> cute.Tensor:
        """These columns of (rows, columns)."""
        place = self.columns.start // len(self.columns)
        return cute.logical_divide(scores, (None, len(self.columns)))[None, (None, place)]


@dataclass(frozen=True)
class OnlineSoftmax:
    """Running statistics of the rows one thread holds."""

    row_max: cute.Tensor
    """(rows,) float32 registers: scores, times `scale_log2` of their group if that differs."""
    row_sum: cute.Tensor
    """(rows,) float32 registers: this thread's share."""
    scale_log2: Any = None
    """Common to all groups; None: not."""
    headroom: float = 0.0
    """Headroom of groups whose weight is 1."""
    integer_maxima: bool = False
    """True: scores that are not masked are compared as integers, which is worth it on sm_90."""

    @classmethod
    def create(cls, rows: int, **fields: Any) -> "OnlineSoftmax":
        row_max = cute.make_rmem_tensor((rows,), Float32)
        row_sum = cute.make_rmem_tensor((rows,), Float32)
        softmax = cls(row_max, row_sum, **fields)
        softmax.reset()
        return softmax

    def reset(self) -> None:
        """No key was seen yet."""
        self.row_max.fill(LOWEST)
        self.row_sum.fill(0.0)

    def maxima(
        self, scores: cute.Tensor, groups: tuple[ScaleGroup, ...], masked: bool
    ) -> cute.Tensor:
        """Maxima of this thread's columns of a block's scores (rows, columns), in row_max's unit.

        `groups` are all of the columns.  Where they are `in_integers`, any negative number stands
        for the negative maximum until `raise_to` finds the exact one.
        """
        found = cute.make_rmem_tensor_like(self.row_max)
        for row in range(cute.size(found)):
            if self.in_integers(masked):
                tops = [top_unless_negative(scores, row, group.columns) for group in groups]
            else:
                tops = [reduce_row(scores, row, fmax, group.columns) for group in groups]
            if self.scale_log2 is None:
                tops = [top * group.scale_log2 for top, group in zip(tops, groups)]
            found[row] = functools.reduce(fmax, tops)
        return found

    def in_integers(self, masked: bool) -> bool:
        """-inf, a masked score, would be the largest of the negative ones."""
        return self.integer_maxima and not masked

    def begin(self, maxima: cute.Tensor) -> None:
        """row_max <- that of the first block.  By whole warps, as all that follows."""
        for i in range(cute.size(maxima)):
            self.row_max[i] = fmax(quad_max(maxima[i]), Float32(LOWEST))

    def exceeded_by(self, maxima: cute.Tensor, masked: bool) -> Boolean:
        """True if a row of the warp may have a new maximum; NaN is one.

        In integers, always while the largest so far is negative: such blocks take longer.
        """
        new = Boolean(False)
        for i in range(cute.size(maxima)):
            new = new | cutlass.not_(maxima[i] <= self.row_max[i])
            if self.in_integers(masked):
                new = new | (self.row_max[i] < 0.0)
        return cute.arch.vote_any_sync(new)

    @cute.jit
    def exact_maxima(self, maxima: cute.Tensor, scores: cute.Tensor, groups: cutlass.Constexpr):
        """Maxima that are negative, if there are any, as what they are."""
        negative = Boolean(False)
        for i in cutlass.range_constexpr(cute.size(maxima)):
            negative = negative | (maxima[i] < 0.0)
        if cute.arch.vote_any_sync(negative):
            found = self.maxima(scores, groups, masked=True)
            for i in cutlass.range_constexpr(cute.size(maxima)):
                maxima[i] = found[i]

    @cute.jit
    def raise_to(
        self,
        maxima: cute.Tensor,
        factors: cute.Tensor,
        scores: cute.Tensor,
        groups: cutlass.Constexpr,
        masked: cutlass.Constexpr,
    ):
        """factors (rows,) <- by what everything that was accumulated before must be multiplied."""
        if const_expr(self.in_integers(masked)):
            self.exact_maxima(maxima, scores, groups)
        for i in cutlass.range_constexpr(cute.size(maxima)):
            row_max = quad_max(fmax(maxima[i], self.row_max[i]))
            factors[i] = cute.math.exp2(self.log2(self.row_max[i] - row_max), fastmath=True)
            self.row_sum[i] = self.row_sum[i] * factors[i]
            self.row_max[i] = row_max

    @cute.jit
    def exponentiate(
        self, scores: cute.Tensor, groups: cutlass.Constexpr, first: cutlass.Constexpr
    ):
        """scores <- exp2((scores - row_max) * scale + headroom), and the sums of rows.

        `groups` are all of the columns; the `first` block's sums replace row_sum.
        """
        for i in cutlass.range_constexpr(cute.size(self.row_max)):
            top = self.log2(self.row_max[i])
            for group in groups:
                shift = top if group.headroom is None else top - group.headroom
                row_sum = self.exponentials(scores, i, group, shift)
                if const_expr(group.weight is not None):
                    row_sum = row_sum * group.weight
                if const_expr(not first or group is not groups[0]):
                    row_sum = self.row_sum[i] + row_sum
                self.row_sum[i] = row_sum

    def exponentials(
        self, scores: cute.Tensor, row: int, group: ScaleGroup, shift: Float32
    ) -> Float32:
        """scores <- exp2(scores * scale - shift) in the columns of a group; their sum."""
        for j in group.columns:
            scores[row, j] = self.exponential(scores[row, j], group, shift)
        return reduce_row(scores, row, add, group.columns)

    def exponential(self, score: Float32, group: ScaleGroup, shift: Float32) -> Float32:
        return cute.math.exp2(score * group.scale_log2 - shift, fastmath=True)

    def log2(self, score: Float32) -> Float32:
        """The base-2 logarithm of exp(score in row_max's unit)."""
        return score if self.scale_log2 is None else score * self.scale_log2

    @cute.jit
    def finish(self, sinks_log2: cute.Tensor) -> cute.Tensor:
        """The factors that normalise the rows (rows,); turns row_max into their LSE (`lse`).

        `sinks_log2` (rows,): scores (times log2(e)) that join the sums without a value; -inf: none.
        A row without keys or sink has row_sum 0: factor 0, LSE -inf.
        """
        factors = cute.make_rmem_tensor_like(self.row_sum)
        for i in cutlass.range_constexpr(cute.size(self.row_sum)):
            row_sum = cute.arch.warp_reduction(self.row_sum[i], add, threads_in_group=4)
            row_max = self.log2(self.row_max[i])
            if const_expr(self.headroom != 0.0):
                row_max = row_max - self.headroom
            sink_log2 = sinks_log2[i]
            top = cute.arch.fmax(row_max, sink_log2)
            shrink = cute.math.exp2(row_max - top, fastmath=True)
            row_sum = row_sum * shrink + cute.math.exp2(sink_log2 - top, fastmath=True)
            inverse = shrink * cute.arch.rcp_approx(row_sum)
            factors[i] = Float32(0.0) if row_sum == 0.0 else inverse
            self.row_max[i] = (top + cute.math.log2(row_sum, fastmath=True)) * LN_2
        return factors

    @property
    def lse(self) -> cute.Tensor:
        """Natural log-sum-exp of the scaled scores (rows,): after `finish`."""
        return self.row_max


@cute.jit
def cap(scores: cute.Tensor, inner: Float32, outer: Float32):
    """scores <- outer * tanh(scores * inner / (2 log2(e))).

    From exp2 and 1/x, not tanh.approx, whose error of 2^-11 would grow by the cap itself.
    """
    for i in cutlass.range_constexpr(cute.size(scores)):
        grown = cute.math.exp2(scores[i] * inner, fastmath=True)
        scores[i] = outer - 2.0 * outer * cute.arch.rcp_approx(grown + 1.0)


@cute.jit
def scale_rows(acc: cute.Tensor, factors: cute.Tensor):
    """acc (rows, columns) *= factors (rows,)."""
    for i in cutlass.range_constexpr(cute.size(factors)):
        for j in cutlass.range_constexpr(cute.size(acc, mode=[1])):
            acc[i, j] = acc[i, j] * factors[i]
