"""Vectors of 8 columns: what a thread of the quantisation kernels loads at once."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from hopper_attention.cute_kernels.primitives.instructions import permute_bytes

LANES = 4
"""Lanes that read a row."""
VECTOR = 8
"""Columns of 16 bytes: one load."""
SPAN = LANES * VECTOR
"""Columns that the lanes of a row load at once."""


def vector_of(address: Int64, vector: Int32) -> cute.Tensor:
    """(VECTOR,) of an array of float32, in registers."""
    start = cute.make_ptr(Float32, address, cute.AddressSpace.gmem, assumed_align=32)
    source = cute.make_tensor(start, cute.make_layout(1 << 30))
    loaded = cute.make_rmem_tensor((VECTOR,), Float32)
    cute.autovec_copy(cute.local_tile(source, (VECTOR,), (vector,)), loaded)
    return loaded


def widen(loaded: cute.Tensor) -> cute.Tensor:
    """In float32, as exactly.  Of bf16 the DSL makes three instructions for two elements.

    e5m2 is the upper byte of fp16.
    """
    values = cute.make_rmem_tensor(loaded.shape, Float32)
    if loaded.element_type is cutlass.BFloat16:
        words = cute.recast_tensor(loaded, Int32)
        for i in range(cute.size(words)):
            values[2 * i] = (words[i] << 16).bitcast(Float32)
            values[2 * i + 1] = (words[i] & Int32(-1 << 16)).bitcast(Float32)
    elif loaded.element_type is cutlass.Float8E5M2:
        words = cute.recast_tensor(loaded, Uint32)
        halves = cute.make_rmem_tensor(loaded.shape, cutlass.Float16)
        pairs = cute.recast_tensor(halves, Uint32)
        for i in range(cute.size(words)):
            pairs[2 * i] = permute_bytes(words[i], Uint32(0), 0x1404)
            pairs[2 * i + 1] = permute_bytes(words[i], Uint32(0), 0x3424)
        values.store(halves.load().to(Float32))
    else:
        values.store(loaded.load().to(Float32))
    return values
