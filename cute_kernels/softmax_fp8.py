"""Online softmax of FP8 attention: some of the exponentials are computed in half precision."""

import functools
from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from cutlass import Float32
from hopper_attention.cute_kernels import halves
from hopper_attention.cute_kernels.softmax import OnlineSoftmax, Part, add


@dataclass(frozen=True)
class Fp8Softmax(OnlineSoftmax):
    in_halves: Any = ()
    """Groups of four columns whose exponentials do without MUFU; they become two registers of
    halves in place of the first two (`Fp8Fragment`)."""

    def exponentials(self, scores: cute.Tensor, row: int, part: Part, shift: Float32) -> Float32:
        sums, pairs = [], []
        fractions = halves.fractions(part.scale_log2, shift)
        for j in part.columns[::4]:
            values = [scores[row, j + i] for i in range(4)]
            if j // 4 in self.in_halves:
                both = [halves.exp2_pair(x, *fractions) for x in (values[:2], values[2:])]
                scores[row, j], scores[row, j + 1] = (pair.bitcast(Float32) for pair in both)
                pairs += both
            else:
                for i, value in enumerate(values):
                    scores[row, j + i] = self.exponential(value, part, shift)
                own = [scores[row, j + i] for i in range(4)]
                sums = [add(*two) for two in zip(sums, own)] if sums else own
        if pairs:
            sums.append(halves.sum_of(pairs))
        return functools.reduce(add, sums)
