"""mma.sync.m16n8k16: operands, accumulators with WGMMA's layout, GEMMs of one warp.

An accumulator of M x N is ((2, 2, N/8), M/16, 1): column pair, row half, column block; row block.
Lane l holds rows l / 4 and l / 4 + 8 of each row block, columns 2 (l % 4) and the next of each
column block, so all that fragments.py and masks/apply.py say of WGMMA's accumulators holds.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op
from hopper_attention.cute_kernels.ampere.config import MATRIX
from hopper_attention.cute_kernels.ampere.shared_tile import Lanes, SharedTile, split
from hopper_attention.cute_kernels.primitives.fragments import PackedFragment

PTX_TYPES = {cutlass.BFloat16: "bf16", cutlass.Float16: "f16"}


def accumulator(rows: int, columns: int) -> cute.Tensor:
    """The accumulator of one warp."""
    shape = ((2, 2, columns // 8), rows // MATRIX, 1)
    return cute.make_rmem_tensor(cute.make_layout(shape), Float32)


@dataclass(frozen=True)
class Coordinates:
    """(row, column) in a tile of a thread's accumulator [i, j], as `rows_and_columns` has them."""

    first_row: Any
    """The first row of the warp."""
    lane: Any
    first_column: Any = 0

    def __getitem__(self, place: tuple[int, int]):
        i, j = place
        row = self.first_row + i // 2 * MATRIX + i % 2 * 8 + (self.lane >> 2)
        return row, self.column_block(j // 2) + (self.lane & 3) * 2 + j % 2

    def column_block(self, number):
        """First column of a block of 8."""
        return self.first_column + number * 8


@dataclass(frozen=True)
class PartCoordinates(Coordinates):
    """Coordinates where warps share columns: each has a part of every span."""

    span: int = 64
    parts: int = 1

    def column_block(self, number):
        spans, within = split(number, self.span // self.parts // 8)
        return self.first_column + spans * self.span + within * 8


@dataclass(frozen=True)
class SharedA:
    """A from a tile in shared memory, whose rows are M, or K if it is `transposed`."""

    tile: SharedTile
    lanes: Lanes
    transposed: bool = False
    parts: int = 1
    """Parts of M, if it is `transposed`."""

    def block(self, m: int, k: int) -> list[Int32]:
        if self.transposed:
            column = self.tile.column_of(m, self.parts)
            return self.lanes.load(self.tile, MATRIX * k, column, transposed=True)
        return self.lanes.load(self.tile, MATRIX * m, MATRIX * k)


@dataclass(frozen=True)
class PackedA:
    """A from an accumulator of another GEMM, rounded: its columns are K."""

    fragment: PackedFragment

    def block(self, m: int, k: int) -> list[Int32]:
        (_, _, column_blocks), _, _ = self.fragment.view.shape
        start = 2 * column_blocks * m + 4 * k
        return [self.fragment.words[start + i] for i in range(4)]


@dataclass(frozen=True)
class SharedB:
    """B from a tile in shared memory, whose rows are N, or K if it is `transposed`."""

    tile: SharedTile
    lanes: Lanes
    transposed: bool
    parts: int = 1
    """Parts of N, if it is `transposed`."""

    @property
    def slices(self) -> int:
        """The number of slices of K."""
        return (self.tile.rows if self.transposed else self.tile.columns) // MATRIX

    def block(self, n: int, k: int) -> tuple[tuple[Int32, Int32], tuple[Int32, Int32]]:
        """Two column blocks of 8."""
        row, column = (n, MATRIX * k)
        if self.transposed:
            row, column = (k, self.tile.column_of(n, self.parts))
        a, b, c, d = self.lanes.load(self.tile, MATRIX * row, column, self.transposed)
        return (a, b), (c, d)


def gemm(acc: cute.Tensor, a: Any, b: SharedB, dtype: Any, accumulate: bool) -> None:
    """acc = a b, or acc += a b."""
    (_, _, column_blocks), row_blocks, _ = acc.shape
    for k in range(b.slices):
        blocks_a = [a.block(m, k) for m in range(row_blocks)]
        for n in range(column_blocks // 2):
            for half, pair in enumerate(b.block(n, k)):
                for m, block_a in enumerate(blocks_a):
                    start = 4 * (m * column_blocks + 2 * n + half)
                    multiply(acc, start, block_a, pair, dtype, accumulate or k > 0)


@dsl_user_op
def multiply(
    acc: cute.Tensor,
    start: int,
    a: list,
    b: tuple,
    dtype: Any,
    accumulate: bool,
    *,
    loc=None,
    ip=None,
) -> None:
    """Elements start to start + 3 of acc (+)= a b."""
    kind = PTX_TYPES[dtype]
    before = [acc[start + i] if accumulate else Float32(0.0) for i in range(4)]
    values = [x.ir_value(loc=loc, ip=ip) for x in (*a, *b, *before)]
    result = llvm.inline_asm(
        llvm.StructType.get_literal([T.f32()] * 4),
        values,
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, "
        "{$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4),
        has_side_effects=False,
        loc=loc,
        ip=ip,
    )
    for i in range(4):
        acc[start + i] = Float32(llvm.extractvalue(T.f32(), result, [i], loc=loc, ip=ip))
