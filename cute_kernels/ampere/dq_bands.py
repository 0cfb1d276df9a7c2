"""How dQ lies in the workspace between the Ampere kernels.

16 rows after the other, of them 8 columns after the other: of such a block, which is four
registers of an accumulator (mma.py), first what the lanes have in register 0, then in 1, 2, 3.
So whatever a warp adds or reads with one instruction is 128 bytes in a row, however big the tiles
of the kernel are that adds, and whatever share of them a warp has.
"""

from cutlass import Float32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op
from hopper_attention.cute_kernels.ampere.config import MATRIX

REGISTER_BYTES = 4 * 32
"""Bytes of one register of all lanes."""
BLOCK_BYTES = 4 * REGISTER_BYTES
"""Bytes of 16 rows and 8 columns."""


def block_place(row, column, head_dim: int):
    """Byte of the 16 x 8 block that begins at (row, column), from the first row's beginning."""
    return row // MATRIX * (MATRIX * 4 * head_dim) + column // 8 * BLOCK_BYTES


@dsl_user_op
def add(address: Int64, constant: int, value: Float32, *, loc=None, ip=None) -> None:
    """To the float32 in global memory at `address` + constant; in any order with others."""
    llvm.inline_asm(
        None,
        [x.ir_value(loc=loc, ip=ip) for x in (address, value)],
        f"red.global.add.f32 [$0 + {constant}], $1;",
        "l,f",
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )
