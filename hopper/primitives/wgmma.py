"""WGMMA: descriptors of shared memory; groups of fence, instructions, commit.

The DSL's own descriptors are computed from the address in shared memory anew in each iteration of a
loop, and each needs two to three uniform instructions; these need one (docs/kernels/forward.md).
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import warpgroup
from cutlass.cutlass_dsl import T, dsl_user_op
from hopper_attention.cute_kernels.primitives.fragments import opaque

PTX_TYPES = {cutlass.BFloat16: "bf16", cutlass.Float16: "f16", cutlass.Float8E4M3FN: "e4m3"}
DEPTH_BITS = 256
"""Bits of one instruction's depth: K is 16, or 32 of FP8."""


@dataclass(frozen=True)
class Operand:
    """A swizzled tile in shared memory as A or B of WGMMAs."""

    low: Int32
    """Half of the descriptor of one stage's first columns of K: address, leading offset."""
    high: Int32
    """The other half: stride offset, swizzle mode."""
    tile: cute.Tensor
    """((M or N, k), 1, K / k) and perhaps stages: `partition_A` or `partition_B` of the tile."""

    @staticmethod
    def of(tile: cute.Tensor) -> "Operand":
        """PTX ISA, "Matrix Descriptor Format": address, leading and stride offset, swizzle mode."""
        dtype = tile.element_type
        stride, stride_k = tile.stride[0]
        leading = 1  # without meaning, unless M or N is contiguous and has several swizzle spans
        if stride_k == 1:
            span = stride
        else:
            span = stride_k
            if isinstance(stride, tuple):
                leading = units(stride[1], dtype)
        span_bytes = span * dtype.width // 8
        mode = {128: 1, 64: 2, 32: 3}[span_bytes]
        high = span_bytes // 2 | mode << 30  # 8 rows of a span
        low = (Int32(tile.iterator.toint()) >> 4) & 0x3FFF
        # A constant upper half would make ptxas add the halves one by one, with a carry, where one
        # 64-bit instruction will do.
        return Operand(opaque(low | leading << 16), unknown_zero() + high, tile)

    @property
    def transposed(self) -> bool:
        """True if M or N, not K, is contiguous."""
        return self.tile.stride[0][1] != 1

    @property
    def slices(self) -> int:
        return cute.size(self.tile, mode=[2])

    def stage(self, index: Int32) -> "Operand":
        stride = units(cute.crd2idx((0, 0, 0, 1), self.tile.layout), self.tile.element_type)
        return Operand(self.low + index * stride, self.high, self.tile)

    def slice(self, k: int) -> Int64:
        """Descriptor of what instruction `k` reads."""
        place = (0, 0, k, 0)[: cute.rank(self.tile)]
        offset = cute.crd2idx(place, self.tile.layout)
        first = Int64(Uint32(self.low)) | Int64(self.high) << 32
        return first + units(offset, self.tile.element_type)


def unknown_zero() -> Int32:
    """0, but ptxas cannot know: all grids are flat."""
    return cute.arch.grid_dim()[2] - 1


def units(elements: int, dtype) -> int:
    """In the descriptors' 16 bytes."""
    return elements * dtype.width // 128


def issue(acc: cute.Tensor, a: Any, b: Operand, accumulate: Any) -> None:
    """acc = a b, or acc += a b, as one committed group; `a` is an Operand or a packed fragment.

    `accumulate` is a bool, or a Boolean that is known at run time.

    Asynchronous: neither acc nor the operands may be touched before `warpgroup.wait_group`.
    """
    warpgroup.fence()
    for k in range(b.slices):
        _issue_one(acc, a, b, k, accumulate if k == 0 else True)
    warpgroup.commit_group()


@dsl_user_op
def _issue_one(acc, a, b: Operand, k: int, accumulate: Any, *, loc=None, ip=None) -> None:
    n = cute.size(acc)
    shared = isinstance(a, Operand)
    operands = [a.slice(k)] if shared else [a.words[4 * k + i] for i in range(4)]
    operands.append(b.slice(k))
    known = isinstance(accumulate, bool)
    flags = [] if known else [Int32(accumulate)]
    registers = [f"${i}" for i in range(2 * n + len(operands))]
    sources = registers[2 * n :]
    flag = int(accumulate) if known else f"${2 * n + len(operands)}"
    place_a = sources[0] if shared else "{" + ", ".join(sources[:4]) + "}"
    width = b.tile.element_type.width
    transposed = [int(x.transposed) for x in (a, b) if isinstance(x, Operand)]
    assert width == 16 or not any(transposed), "FP8 operands have K contiguous"
    majors = "".join(f", {major}" for major in transposed) if width == 16 else ""
    dtype = PTX_TYPES[b.tile.element_type]
    code = (
        f"{{ .reg .pred p; setp.ne.b32 p, {flag}, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{2 * n}k{DEPTH_BITS // width}.f32.{dtype}.{dtype} "
        f"{{{', '.join(registers[:n])}}}, {place_a}, {sources[-1]}, p, 1, 1{majors}; }}"
    )
    constraints = ["=f"] * n + [str(i) for i in range(n)]
    constraints += ["l" if shared else "r"] * (len(operands) - 1) + ["l"]
    constraints += ["r"] * len(flags)
    values = [acc[i] for i in range(n)] + operands + flags
    result = llvm.inline_asm(
        llvm.StructType.get_literal([T.f32()] * n),
        [x.ir_value(loc=loc, ip=ip) for x in values],
        code,
        ",".join(constraints),
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )
    for i in range(n):
        acc[i] = Float32(llvm.extractvalue(T.f32(), result, [i], loc=loc, ip=ip))
