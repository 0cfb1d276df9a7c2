"""Element types by the names that configurations use, and the tensors kernels are compiled for."""

import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import make_fake_tensor

DTYPES = {
    "bf16": cutlass.BFloat16,
    "fp16": cutlass.Float16,
    "e4m3": cutlass.Float8E4M3FN,
    "e5m2": cutlass.Float8E5M2,
}


def strided(dtype, rank: int):
    """Operands and results: last dimension contiguous, everything else in steps of 16 bytes."""
    n = 128 // dtype.width
    shape = (*(cute.sym_int32() for _ in range(rank - 1)), cute.sym_int32(divisibility=n))
    stride = (*(cute.sym_int64(divisibility=n) for _ in range(rank - 1)), 1)
    return make_fake_tensor(dtype, shape, stride, assumed_align=16)


def row_statistics(divisibility: int = 1, strided_rows: bool = False):
    """(batch, heads, rows) float32; rows start at multiples of `divisibility` elements.

    With `strided_rows` they may have any stride, 0 for instance.
    """
    shape = tuple(cute.sym_int32() for _ in range(3))
    stride = tuple(cute.sym_int64(divisibility=divisibility) for _ in range(2))
    last = cute.sym_int64() if strided_rows else 1
    align = 4 * divisibility
    return make_fake_tensor(cutlass.Float32, shape, (*stride, last), assumed_align=align)


def key_scales():
    """(batch, heads_kv, pairs of blocks, 4) float32, for loads of 16 bytes."""
    shape = (*(cute.sym_int32() for _ in range(3)), 4)
    stride = (*(cute.sym_int64(divisibility=4) for _ in range(3)), 1)
    return make_fake_tensor(cutlass.Float32, shape, stride, assumed_align=16)
