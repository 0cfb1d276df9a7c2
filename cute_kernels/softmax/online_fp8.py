"""Online softmax of FP8 attention: some of the exponentials are computed in half precision."""

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
