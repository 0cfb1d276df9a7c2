"""How a block of dQ lies in the registers of two warpgroups and in global memory.

dQ (tile_m, head_dim) = dS K is split between the warpgroups by rows where there are 128, else by
columns.  In memory it keeps the order of the registers: warpgroup w's elements as `vectors` times
128 threads times 4 floats, so that every access is 16 bytes a thread and coalesced, and
what adds it up and what reads it at the end need not know rows and columns.
"""

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int64
from cutlass.cute.nvgpu import OperandMajorMode


@dataclass(frozen=True)
class DqTile:
    dtype: Any
    tile_m: int
    head_dim: int

    @property
    def split(self) -> tuple[int, int, int]:
        """Warpgroups along rows, columns, keys."""
        return (2, 1, 1) if self.tile_m == 128 else (1, 2, 1)

    @property
    def columns(self) -> int:
        """Columns of one warpgroup."""
        return self.head_dim // self.split[1]

    @property
    def elements(self) -> int:
        """Elements of one warpgroup."""
        return self.tile_m * self.head_dim // 2

    @property
    def vectors(self) -> int:
        """Vectors of 4 elements that a thread has."""
        return self.elements // 512

    @property
    def mma(self) -> cute.TiledMma:
        """A = dS (tile_m, keys), keys contiguous; B = K (head_dim, keys), head_dim contiguous."""
        k, mn = OperandMajorMode.K, OperandMajorMode.MN
        shape = (64, self.columns)
        return sm90.make_trivial_tiled_mma(
            self.dtype, self.dtype, k, mn, Float32, self.split, shape
        )

    def accumulator(self) -> cute.Tensor:
        shape = self.mma.partition_shape_C((self.tile_m, self.head_dim))
        return cute.make_rmem_tensor(shape, Float32)

    def of_thread(self, start: cute.Pointer, warpgroup, thread) -> cute.Tensor:
        """(4, vectors) view of the block at `start`, of a thread (0 to 127) of a warpgroup."""
        place = (start + (warpgroup * self.elements + thread * 4)).align(16)
        return cute.make_tensor(place, cute.make_layout((4, self.vectors), stride=(1, 512)))

    def add(self, acc: cute.Tensor, address: Int64) -> None:
        """To global memory, where this thread's first element is at `address`."""
        vectors = self.as_vectors(acc)
        for v in range(self.vectors):
            cute.arch.inline_ptx(
                "red.global.add.v4.f32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
                read_only_args=[address + v * 2048, *(vectors[j, v] for j in range(4))],
            )

    def as_vectors(self, acc: cute.Tensor) -> cute.Tensor:
        return cute.make_tensor(acc.iterator, cute.make_layout((4, self.vectors)))
