"""Transposed scores of one thread in backward: S^T becomes P^T, dP^T starts with delta."""

from dataclasses import dataclass
from typing import Any, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from hopper_attention.cute_kernels.masks.apply import Mask
from hopper_attention.cute_kernels.primitives.fragments import PackedFragment, pin, rows_and_columns
from hopper_attention.cute_kernels.softmax.online import cap


@dataclass(frozen=True)
class Scores:
    acc: cute.Tensor
    """Accumulator of S^T or dP^T, keys in rows."""
    packed: PackedFragment
    """The probabilities, rounded."""
    coordinates: cute.Tensor
    """(rows, columns) -> (key, query) in the tile."""
    tile_m: cutlass.Constexpr

    @cute.jit
    def exponentiate(
        self, lse: cute.Tensor, problem: Any, mask: Optional[Mask], m_block: Optional[Int32]
    ):
        """S^T becomes P^T in place; with softcap that goes to `packed`, and P^T * slope stays here.

        `lse` (tile_m,) in shared memory; `problem` has scale_log2 and softcap.
        """
        scores, lse_of_columns = rows_and_columns(self.acc), self.load_columns(lse)
        if const_expr(problem.softcap is not None):
            cap(scores, *problem.softcap)
        if const_expr(mask is not None):
            mask.apply(scores, m_block)
        capped = cute.make_rmem_tensor_like(self.acc)
        capped.store(self.acc.load())
        self.to_probabilities(lse_of_columns, problem.scale_log2)
        if const_expr(problem.softcap is not None):
            self.packed.convert(self.acc)
            self.multiply_by_slope(capped, problem.softcap[1])

    def to_probabilities(self, lse_of_columns: cute.Tensor, scale_log2: Float32) -> None:
        """The scores become exp2(-|score * scale_log2 - LSE|).

        A score never exceeds its row's LSE, but their rounded values differ by the digits that
        float32 lacks: by 1 at 1e7, by hundreds at 1e10.  The magnitude keeps probabilities at
        most 1 there; the exponential unit takes it and the sign with its operand, for nothing.
        """
        scores = rows_and_columns(self.acc)
        for i in range(cute.size(scores, mode=[0])):
            for j in range(cute.size(scores, mode=[1])):
                exponent = scores[i, j] * scale_log2 - lse_of_columns[j]
                scores[i, j] = cute.math.exp2(-cute.math.absf(exponent), fastmath=True)

    def multiply_by_slope(self, capped: cute.Tensor, outer: Float32) -> None:
        """Multiply by the slope of `cap`, where it gave `capped`."""
        inverse = cute.arch.rcp_approx(outer)
        for i in range(cute.size(self.acc)):
            tanh = capped[i] * inverse
            # Not below 0: a masked score is -inf.
            slope = cute.arch.fmax(1.0 - tanh * tanh, Float32(0.0))
            self.acc[i] = self.acc[i] * slope

    @cute.jit
    def start_with(self, delta: cute.Tensor):
        """dP^T accumulates onto delta (tile_m,): adding it costs nothing."""
        sums, of_columns = rows_and_columns(self.acc), self.load_columns(delta)
        for i in cutlass.range_constexpr(cute.size(sums, mode=[0])):
            for j in cutlass.range_constexpr(cute.size(sums, mode=[1])):
                sums[i, j] = of_columns[j]
        pin(self.acc)  # copies come before the fence of the WGMMA

    def load_columns(self, statistics: cute.Tensor) -> cute.Tensor:
        """Load the statistics of this thread's columns: pairs of adjacent ones, every 8."""
        layout = cute.make_layout((2, self.tile_m // 8), stride=(1, 8))
        start = (statistics.iterator + self.coordinates[0, 0][1]).align(8)
        values = cute.make_rmem_tensor((2, self.tile_m // 8), Float32)
        cute.autovec_copy(cute.make_tensor(start, layout), values)
        return values
