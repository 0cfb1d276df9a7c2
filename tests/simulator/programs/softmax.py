"""Softmax of fp32 rows of up to 128 columns, one warp a row: shuffles, ex2, predicates, a mask."""

import math

import cuda.bindings.driver as cuda
import cutlass
from common import export, matrix
from cutlass import Float32, cute


class Softmax:
    @cute.jit
    def __call__(self, mX: cute.Tensor, mY: cute.Tensor, stream: cuda.CUstream):
        grid = [cute.ceil_div(mX.shape[0], 4), 1, 1]
        self.kernel(mX, mY).launch(grid=grid, block=[128, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mY: cute.Tensor):
        lane = cute.arch.lane_idx()
        row = cute.arch.block_idx()[0] * 4 + cute.arch.warp_idx()
        if row < mX.shape[0]:
            values = cute.make_rmem_tensor(4, Float32)
            row_max = -Float32.inf
            for i in cutlass.range_constexpr(4):
                values[i] = -Float32.inf
                column = lane + 32 * i
                if column < mX.shape[1]:
                    values[i] = mX[row, column]
                row_max = cute.arch.fmax(row_max, values[i])
            row_max = cute.arch.warp_reduction(row_max, cute.arch.fmax)
            row_sum = Float32(0.0)
            for i in cutlass.range_constexpr(4):
                values[i] = cute.math.exp2((values[i] - row_max) * math.log2(math.e), fastmath=True)
                row_sum += values[i]
            row_sum = cute.arch.warp_reduction(row_sum, lambda a, b: a + b)
            inverse = cute.arch.rcp_approx(row_sum)
            for i in cutlass.range_constexpr(4):
                column = lane + 32 * i
                if column < mX.shape[1]:
                    mY[row, column] = values[i] * inverse


export(Softmax(), "softmax", matrix(cutlass.Float32), matrix(cutlass.Float32))
