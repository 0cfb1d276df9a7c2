"""Element types by the names that configurations use, and the tensors kernels are compiled for."""

import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import make_fake_tensor

DTYPES = {"bf16": cutlass.BFloat16, "fp16": cutlass.Float16}


def strided(dtype, rank: int):
    """A 16-bit tensor: last dimension contiguous, everything else in steps of 16 bytes."""
    n = 128 // dtype.width
    shape = (*(cute.sym_int32() for _ in range(rank - 1)), cute.sym_int32(divisibility=n))
    stride = (*(cute.sym_int64(divisibility=n) for _ in range(rank - 1)), 1)
    return make_fake_tensor(dtype, shape, stride, assumed_align=16)


def row_statistics(divisibility: int = 1):
    """(batch, heads, rows) float32; rows start at multiples of `divisibility` elements."""
    shape = tuple(cute.sym_int32() for _ in range(3))
    stride = (*(cute.sym_int64(divisibility=divisibility) for _ in range(2)), 1)
    return make_fake_tensor(cutlass.Float32, shape, stride, assumed_align=4 * divisibility)
