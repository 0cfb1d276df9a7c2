"""Scalars in global memory behind addresses that may be absent (0)."""

import cutlass.cute as cute
from cutlass import Int32, Int64


def read(dtype, address: Int64, index: Int32):
    """Element `index` of the array of `dtype` at `address`."""
    start = cute.make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=dtype.width // 8)
    return cute.make_tensor(start, cute.make_layout(1 << 30))[index]
