"""Forward attention of FP8 tensors on sm_90a: `kernel.py` with QGMMA for both GEMMs.

Roles, pipelines and timeline are those of kernel.py.  Otherwise:

Layouts    Q (batch, seqlen_q, heads, d), K (batch, seqlen_k, heads_kv, d) e4m3; V transposed,
           (batch, heads_kv, dv, keys), keys a multiple of 16 and zeros behind the last, since FP8
           WGMMA reads operands with contiguous K only; and in every 16 keys interleaved as P lies
           in registers (`Fp8Fragment`), so that P needs no shuffles.  Packed sequences start there
           at multiples of 128 (`values_offset`), with zeros behind each of them, too.  O bf16,
           fp16, float32, or e4m3 divided by a scale.

Scales     float32, of every 64 rows of Q, K and V, or of more (strides of 0).  A consumer has
           64 rows of Q, so its factor is one number.  Those of 64 keys go into the factor in exp2's
           argument.  V's is split: the largest of a head normalises O, and how far theirs is below
           it is taken from their P (exp2's argument again); row sums take it back.  So no scale
           costs an instruction an element, but where P comes in halves one for two: the sums need
           those before V's scale.  The producer loads the keys' with the block of K, and a tile's
           other two, of Q and of O, with the tile: consumers would have to wait for them.

P          up to 2^8, of e4m3's 448: what is small keeps its digits, nothing can saturate.  The
           offset cancels in O, and is taken off the LSE.  Rows are summed before rounding.

           Up to d128 half of the exponentials are computed in half precision, without MUFU
           (`exp2_f16x2.py`): there MUFU would take as long as both GEMMs.

Codes      (`ForwardFp8Config.codes`) have no exponentials at all: P's bits are 8 (log2 p + 7),
           rounded, which is one FFMA an element and half an F2IP.  Nothing is left that could be
           summed, so V has eight columns of ones behind its own: P V is m64n(dv + 8)k32, and the
           sums of rows are four accumulators more, rescaled and flushed like O.  V has one scale a
           head.  Weights below 2^-15 of a row's greatest are lost: docs/fp8.md.

Ping-pong  order is not kept: GEMMs take half as long as those of 16 bits, softmax as long.

Two-level  accumulation: FP8 WGMMA keeps about 14 bits of its sums (DeepSeek-V3, arXiv 2412.19437,
           section 3.3.2).  Then P V of each key block, or of 2, 4, ... successive ones, goes to
           accumulators of its own, which are added to O in float32.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Boolean, Float16, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.tensor_utils import LayoutEnum
from hopper_attention.cute_kernels.primitives.arguments import (
    ForwardOperands,
    SequenceAddresses,
    TileQueueArguments,
    Window,
    example,
)
from hopper_attention.cute_kernels.primitives.arithmetic import minimum
from hopper_attention.cute_kernels.primitives.fragments import CodedFragment, Fp8Fragment, pin
from hopper_attention.cute_kernels.primitives.memory import read
from hopper_attention.cute_kernels.primitives.types import key_scales, row_statistics, strided
from hopper_attention.cute_kernels.scheduling.tile_scheduler import Tile
from hopper_attention.cute_kernels.softmax.online import OnlineSoftmax, ScaleGroup
from hopper_attention.cute_kernels.softmax.online_fp8 import CodedSoftmax, Fp8Softmax
from hopper_attention.hopper.forward.config import ForwardFp8Config
from hopper_attention.hopper.forward.kernel import Forward
from hopper_attention.hopper.forward.output import Output
from hopper_attention.hopper.forward.roles import (
    Accumulators,
    Fragments,
    Mmas,
    Problem,
    Tiles,
    Work,
)
from hopper_attention.hopper.primitives import wgmma
from hopper_attention.hopper.primitives.tma import load_row, permute


class Descales(NamedTuple):
    """`Scaling.q` and `Scaling.v`."""

    q_descale: cute.Tensor
    v_descale: cute.Tensor


class Pointers(NamedTuple):
    """Addresses of float32 arrays, 0 where absent."""

    learnable_sink: Int64
    out_descale: Int64


class Fp8Counts(NamedTuple):
    """`ForwardCounts` of FP8; a kernel of one level does not read `accumulate_every`."""

    num_sequences: Int32
    accumulate_every: Int32
    output_type: Int32


@dataclass(frozen=True)
class Scaling:
    """Factors of quantised values, and when sums become float32."""

    q: cute.Tensor
    """(sequences, heads, ceil(seqlen_q / 64))"""
    keys: cute.Tensor
    """(sequences, heads_kv, ceil(seqlen_k / 128), 4): for each half of the keys, K's descale and
    how far V's is below the largest of its head, log2(descale / largest)."""
    v: cute.Tensor
    """(sequences, heads_kv, 1): the largest."""
    out: Int64
    """Address of what O is divided by, a float32; or 0."""
    accumulate_every: Any
    """Key blocks whose P V is summed by the tensor cores, a power of two; None: all."""


@dataclass(frozen=True)
class Scales:
    """Scales of one tile and consumer."""

    q: Float32
    """With what all scores are multiplied by."""
    keys: cute.Tensor
    """(4, stages of K), in shared memory."""


BLOCK = 64
"""Rows that share a scale."""
SEQUENCE = 128
"""Columns of V that a packed sequence has multiples of."""
HEADROOM = 8.0
"""log2 of the greatest P."""
FOUR_ONES = 0x38383838
"""In e4m3."""


class ForwardFp8(Forward):
    """The kernel of one `ForwardFp8Config`."""

    def __init__(self, config: ForwardFp8Config):
        super().__init__(config)
        self.output = Output(config, BFloat16, (Float32, Float16, self.dtype))

    def example_arguments(self) -> tuple:
        """Arguments that `__call__` is compiled for, without the stream."""
        cfg, number, address = self.cfg, lambda: Int32(1), lambda: Int64(0)
        operands = (strided(self.dtype, 4) for _ in range(3))
        return (
            ForwardOperands(*operands, strided(BFloat16, 4)),
            row_statistics(),
            example(Descales, lambda: row_statistics(strided_rows=True)),
            key_scales(),
            Float32(1.0),
            Float32(1.0) if cfg.softcap else None,
            example(Pointers, address),
            example(Window, number) if cfg.mask == "local" else None,
            example(SequenceAddresses, address) if cfg.varlen else None,
            example(Fp8Counts, number),
            example(TileQueueArguments, address),
        )

    @cute.jit
    def __call__(
        self,
        operands: ForwardOperands,
        lse: cute.Tensor,
        descales: Descales,
        key_descales: cute.Tensor,
        softmax_scale: Float32,
        softcap: Optional[Float32],
        pointers: Pointers,
        window: Optional[Window],
        addresses: Optional[SequenceAddresses],
        counts: Fp8Counts,
        queue: TileQueueArguments,
        stream: cuda.CUstream,
    ):
        mQ, mK, mVt, mO = operands
        mQ, mK, mO = (permute(t, (1, 3, 2, 0)) for t in (mQ, mK, mO))  # (s, d, h, b)
        mV = permute(mVt, (2, 3, 1, 0))  # (d, s, h, b): N and K of the second GEMM
        every = counts.accumulate_every if self.cfg.two_level else None
        scaling = Scaling(
            descales.q_descale, key_descales, descales.v_descale, pointers.out_descale, every
        )
        self.launch(
            ForwardOperands(mQ, mK, mV, mO), lse, self.capped(softmax_scale, softcap),
            pointers.learnable_sink, window, addresses, counts, Int32(1), queue, scaling, stream,
        )  # fmt: skip

    def tiled_mmas(self) -> Mmas:
        cfg, dtype, k = self.cfg, self.dtype, OperandMajorMode.K
        make, warpgroups = sm90.make_trivial_tiled_mma, (self.cfg.warpgroups, 1, 1)
        registers = warpgroup.OperandSource.RMEM
        return Mmas(
            make(dtype, dtype, k, k, Float32, warpgroups, (64, cfg.tile_n)),
            make(dtype, dtype, k, k, Float32, warpgroups, (64, cfg.head_dim_v), registers),
        )

    def layout_v(self, columns: int):
        """So many columns of V, (columns, tile_n, stages); keys are contiguous."""
        pv = (self.cfg.tile_m, columns, self.cfg.tile_n)
        return sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, pv, self.dtype, self.cfg.stages)

    @cute.jit
    def fill_ones(self, v_start: cute.Pointer):
        """Columns of ones behind V's in every stage: one swizzle atom, that TMA leaves alone.

        The pipelines' first barrier orders it before the GEMMs that read it.
        """
        cfg, thread = self.cfg, cute.arch.thread_idx()[0]
        words = cfg.sum_columns * cfg.tile_n // 4
        if thread < words:
            for stage in cutlass.range_constexpr(cfg.stages):
                columns = stage * (cfg.head_dim_v + cfg.sum_columns) + cfg.head_dim_v
                start = cute.recast_ptr(v_start + columns * cfg.tile_n, dtype=Int32)
                cute.make_tensor(start, cute.make_layout(words))[thread] = Int32(FOUR_ONES)
        cute.arch.fence_proxy("async.shared", space="cta")

    def statistics(self, problem: Problem) -> OnlineSoftmax:
        cfg = self.cfg
        if cfg.codes:
            return CodedSoftmax.create(2, headroom=HEADROOM, integer_maxima=True)
        groups = cfg.f16x2_groups
        return Fp8Softmax.create(2, headroom=HEADROOM, integer_maxima=True, f16x2_groups=groups)

    def fragment_p(self, acc_s: cute.Tensor) -> Fp8Fragment | CodedFragment:
        if self.cfg.codes:
            return CodedFragment.like(acc_s)
        return Fp8Fragment.like(acc_s, self.cfg.f16x2_groups)

    def accumulators(self, shape_o: tuple) -> Accumulators:
        acc_o = cute.make_rmem_tensor(shape_o, Float32)
        total = acc_o
        if self.cfg.sums_in_mma:
            total = cute.make_rmem_tensor((cute.size(acc_o) + self.cfg.sum_columns // 2,), Float32)
            acc_o = cute.make_tensor(total.iterator, acc_o.layout)
        pv = cute.make_rmem_tensor_like(total) if self.cfg.two_level else total
        return Accumulators(acc_o, total, pv)

    @cute.jit
    def take_sums(self, fragments: Fragments, softmax: CodedSoftmax):
        """row_sum <- what the tensor cores have summed; every thread of a quad has all of it."""
        for i in cutlass.range_constexpr(2):
            softmax.row_sum[i] = fragments.acc_total[cute.size(fragments.acc_o) + 2 * i] * 0.25

    @cute.jit
    def values_offset(self, problem: Problem, work: Work) -> Int32:
        """The first column of packed keys: sequence b begins in block offset // 128 + b."""
        offset = Int32(0)
        if const_expr(self.cfg.varlen):
            if problem.keys.cu_seqlens != 0:
                offset = (work.keys.offset // SEQUENCE + work.tile.batch) * SEQUENCE
        return offset

    def zero_fill_rows(self, pipe, state, v_start: cute.Pointer, valid: Int32) -> None:
        """V has zeros behind the last key."""

    @cute.jit
    def load_scales(
        self, problem: Problem, work: Work, tiles: Tiles, pipe: Any, state: Any, n_block: Int32
    ):
        """Load the scales of the 128 keys that the tile is, or is half of."""
        pair = n_block * self.cfg.tile_n // (2 * BLOCK)
        source = problem.scaling.keys[work.tile.batch, work.head_kv, pair, None]
        load_row(source, tiles.scales[None, state.index], pipe.producer_get_barrier(state))

    @cute.jit
    def factors(self, problem: Problem, tile: Tile, batch: Int32, head_kv: Int32, row_block: Int32):
        """The producer looks up what consumers would have to wait for between tiles."""
        scaling, last = problem.scaling, problem.scaling.q.shape[2] - 1
        scale = problem.softcap[0] if self.cfg.softcap else problem.scale_log2
        of_scores = scale * scaling.q[batch, tile.head, minimum(row_block, last)]
        of_output = scaling.v[batch, head_kv, 0]
        if scaling.out != 0:
            of_output = of_output / read(Float32, scaling.out, Int32(0))
        return of_scores, of_output

    def scales(self, tiles: Tiles, problem: Problem, work: Work) -> Scales:
        return Scales(work.factors[0], tiles.scales)

    def read_scales(self, scales: Scales, stage: Int32, n_block: Int32) -> cute.Tensor:
        """(2, blocks of 64 keys in the tile) in registers."""
        values = cute.make_rmem_tensor((2, self.cfg.tile_n // BLOCK), Float32)
        first = 0 if self.cfg.tile_n == 2 * BLOCK else n_block % 2 * 2
        source = (scales.keys[None, stage].iterator + first).align(self.cfg.tile_n // 8)
        cute.autovec_copy(cute.make_tensor(source, values.layout), values)
        return values

    def scale_groups(
        self, problem: Problem, scales: Scales, of_block: cute.Tensor
    ) -> tuple[ScaleGroup, ...]:
        pin(of_block)  # else ptxas multiplies them, and waits for them, between the WGMMAs of P V
        columns, found = BLOCK // 4, []
        for i in range(cute.size(of_block, mode=[1])):
            factor, shift = scales.q * of_block[0, i], of_block[1, i]
            scale_log2, inner = (problem.scale_log2, factor) if self.cfg.softcap else (factor, None)
            own = range(i * columns, (i + 1) * columns)
            if self.cfg.codes:  # V has one scale
                found.append(ScaleGroup(own, scale_log2, HEADROOM, inner=inner))
            else:
                weight = cute.math.exp2(-shift, fastmath=True)
                found.append(ScaleGroup(own, scale_log2, HEADROOM + shift, weight, inner))
        return tuple(found)

    @cute.jit
    def descale_output(self, factors: cute.Tensor, problem: Problem, work: Work):
        for i in cutlass.range_constexpr(cute.size(factors)):
            factors[i] = factors[i] * work.factors[1]

    @cute.jit
    def issue_pv(
        self, fragments: Fragments, v_block: wgmma.Operand, problem: Problem, n_block: Int32
    ):
        if const_expr(self.cfg.two_level):
            # Of the block after, which came before; the first one finds zeros.
            begun = not self.sums_end(problem, n_block + 1)
            wgmma.issue(fragments.acc_pv, fragments.p, v_block, accumulate=begun)
        else:
            wgmma.issue(fragments.acc_pv, fragments.p, v_block, accumulate=True)

    @cute.jit
    def wait_pv(self, fragments: Fragments, problem: Problem, n_block: Int32):
        """Waits for the last group, P V of `n_block`; O has it then, or when the sums end."""
        warpgroup.wait_group(0)
        pin(fragments.acc_pv)
        if const_expr(self.cfg.two_level):
            if self.sums_end(problem, n_block):
                for i in cutlass.range_constexpr(cute.size(fragments.acc_pv)):
                    fragments.acc_total[i] = fragments.acc_total[i] + fragments.acc_pv[i]

    @cute.jit
    def rescale(self, fragments: Fragments, factors: cute.Tensor):
        accumulators = (fragments.acc_total, fragments.acc_pv)
        for acc in accumulators if self.cfg.two_level else accumulators[:1]:
            for i in cutlass.range_constexpr(cute.size(acc)):
                acc[i] = acc[i] * factors[i // 2 % 2]

    def sums_end(self, problem: Problem, n_block: Int32) -> Boolean:
        """True if P V of this key block is the last of those that are summed together."""
        return n_block & (problem.scaling.accumulate_every - 1) == 0
