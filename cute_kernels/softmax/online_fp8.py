"""Online softmax of FP8 attention: with some exponentials in half precision, or without any."""

import functools
from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from cutlass import Float32
from hopper_attention.cute_kernels.softmax import exp2_f16x2
from hopper_attention.cute_kernels.softmax.online import OnlineSoftmax, ScaleGroup, add


@dataclass(frozen=True)
class Fp8Softmax(OnlineSoftmax):
    f16x2_groups: Any = ()
    """Groups of four columns whose exponentials do without MUFU; they become two registers of
    halves in place of the first two (`Fp8Fragment`)."""

    def exponentials(
        self, scores: cute.Tensor, row: int, group: ScaleGroup, shift: Float32
    ) -> Float32:
        """Halves are summed before they are lowered to the group's headroom.

        What a small scale of V takes from P might leave nothing of them for the sum.
        """
        sums, pairs, below = [], [], group.headroom - self.headroom
        fractions = exp2_f16x2.fractions(group.scale_log2, shift + below)
        lowering = cute.math.exp2(below, fastmath=True)
        lower = exp2_f16x2.pair_of(lowering)
        for j in group.columns[::4]:
            values = [scores[row, j + i] for i in range(4)]
            if j // 4 in self.f16x2_groups:
                both = [exp2_f16x2.exp2_pair(x, *fractions) for x in (values[:2], values[2:])]
                lowered = (exp2_f16x2.multiply(pair, lower).bitcast(Float32) for pair in both)
                scores[row, j], scores[row, j + 1] = lowered
                pairs += both
            else:
                own = [self.exponential(value, group, shift) for value in values]
                for i, value in enumerate(own):
                    scores[row, j + i] = value
                sums = [add(*two) for two in zip(sums, own)] if sums else own
        total = functools.reduce(add, sums)
        return total + exp2_f16x2.sum_of(pairs) * lowering if pairs else total


CODES_PER_OCTAVE = 8
"""e4m3 has three bits of mantissa."""
CODE_OF_ONE = 56
"""The bits of 1 in e4m3."""
CODE_OFFSET = -0.45
"""Makes the mean error of P 6e-4 and keeps powers of two exact (reference/fp8.py)."""


@dataclass(frozen=True)
class CodedSoftmax(OnlineSoftmax):
    """P is not computed: its e4m3 bits, read as an integer, are 8 (log2 p + 7), nearly.

    Scores become that number, which `CodedFragment` rounds.  The rows' sums are the tensor cores'.
    Codes know no NaN: NaN and a maximum of infinity reach O and LSE through row_max, in `finish`.
    """

    def exponentials(
        self, scores: cute.Tensor, row: int, group: ScaleGroup, shift: Float32
    ) -> Float32:
        scale = group.scale_log2 * CODES_PER_OCTAVE
        offset = shift * CODES_PER_OCTAVE - (CODE_OF_ONE + CODE_OFFSET)
        for j in group.columns:
            scores[row, j] = scores[row, j] * scale - offset
        return Float32(0.0)
