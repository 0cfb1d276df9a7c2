"""Values that forward's roles pass to each other; how consumers keep their registers free."""

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync
from hopper_attention.cute_kernels.masks.visible_range import BlockRange
from hopper_attention.cute_kernels.primitives.fragments import opaque, rows_and_columns
from hopper_attention.cute_kernels.scheduling.sequence import Sequence, TileRows
from hopper_attention.cute_kernels.scheduling.tile_queue import TileQueue
from hopper_attention.cute_kernels.scheduling.tile_scheduler import Tile
from hopper_attention.hopper.primitives import wgmma


@dataclass(frozen=True)
class Problem:
    """Everything that all roles know of the launch."""

    queries: Any
    """EqualLengths or Lengths, by `ForwardConfig.varlen`."""
    keys: Any
    group: Any
    """Query heads whose rows share a tile (`TileRows`): 1, or all of a key head."""
    tiles_per_kvhead: Int32
    """Tiles of the same positions that read the same keys: the others of the group."""
    scale_log2: Float32
    """The factor of the scores that softmax sees: after softcap if there is one."""
    softcap: Any
    """(inner, outer) of `softmax.online.cap`, or None."""
    window: Any
    """(left, right, chunk) of `MaskRange`, or None where the mask is not local."""
    sink: Int64
    """Address of a float32 score for each head, or 0."""
    scaling: Any
    """Factors that only kernel_fp8.py has, or None."""
    output_type: Int32
    """Number among `Output.types`; O's tensor is passed as if it was of the first."""


@dataclass(frozen=True)
class Tensors:
    """Tensors that are not accessed by TMA: (row, column, head, entry), LSE as passed."""

    q: Any
    """None where tiles are never packed."""
    o: cute.Tensor
    lse: cute.Tensor


@dataclass(frozen=True)
class Tma:
    """Descriptors with their atoms: loads of Q, K, V, the store of O."""

    q: cpasync.TmaInfo
    k: cpasync.TmaInfo
    v: cpasync.TmaInfo
    o: cpasync.TmaInfo


@dataclass(frozen=True)
class Mmas:
    """S = Q K^T from shared memory; O = P V with P from registers."""

    qk: cute.TiledMma
    pv: cute.TiledMma


@dataclass(frozen=True)
class Work:
    """One tile: its place, its sequences, its key blocks, and its rows."""

    tile: Tile
    queries: Sequence
    keys: Sequence
    head_kv: Int32
    first: Int32
    """The first key block that is loaded, for what any consumer's rows see."""
    end: Int32
    blocks: BlockRange
    """Of these, what a consumer attends to; in the producer, lane w's are consumer w's."""
    factors: tuple[Float32, ...]
    """FP8: of the scores of a consumer's rows, and of O.  By lane, like `blocks`."""
    rows: TileRows

    def words(self) -> list[Int32]:
        """Return what all consumers have to know, `m_block` first."""
        parts = (self.tile, self.queries, self.keys)
        values = [value for part in parts for value in vars(part).values()]
        return [Int32(value) for value in (*values, self.head_kv, self.first, self.end)]

    def own_words(self) -> list[Int32]:
        """Return what one of them has to know."""
        integers = [Int32(value) for value in vars(self.blocks).values()]
        return integers + [factor.bitcast(Int32) for factor in self.factors]

    @staticmethod
    def from_words(words: list[Int32], own: list[Int32], group: Int32, tile_m: int) -> "Work":
        tile = Tile(*words[:3])
        return Work(
            tile,
            Sequence(*words[3:6]),
            Sequence(*words[6:9]),
            *words[9:WORDS],  # head_kv, first, end
            BlockRange(*own[:4]),
            tuple(word.bitcast(Float32) for word in own[4:]),
            TileRows(group, tile.head * group, tile.m_block * tile_m),
        )


WORDS = 12
NO_MORE = -1
"""The m_block that says that the block is done."""


@dataclass(frozen=True)
class Tiles:
    """Shared memory, with stages: Q (tile_m, d), K (tile_n, d), V (dv, tile_n), O (tile_m, dv)."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    o: cute.Tensor
    scales: Any
    """Scales of FP8: (4, stages of K) float32; or None."""


@dataclass(frozen=True)
class Pipelines:
    q: pipeline.PipelineTmaAsync
    k: pipeline.PipelineTmaAsync
    v: pipeline.PipelineTmaAsync
    tiles: TileQueue


@dataclass(frozen=True)
class Accumulators:
    """Registers of O."""

    o: cute.Tensor
    total: cute.Tensor
    """O, and behind it the sums of rows, if the tensor cores make them."""
    pv: cute.Tensor
    """What WGMMA adds to: `total`, or a part of it that is added later."""


@dataclass(frozen=True)
class Fragments:
    """Operands of one consumer thread: descriptors of Q, K, V; registers of P, S, O."""

    q: wgmma.Operand
    k: wgmma.Operand
    v: wgmma.Operand
    p: Any
    """PackedFragment, Fp8Fragment or CodedFragment."""
    acc_s: cute.Tensor
    acc_o: cute.Tensor
    acc_total: cute.Tensor
    acc_pv: cute.Tensor


def consumer_thread() -> Int32:
    """Index among the consumers' threads.

    Opaque, or else all that follows from it would be computed before the first tile and kept in
    registers that the main loop needs.
    """
    return opaque(cute.arch.thread_idx()[0] - 128)


def coordinates_of(mma: cute.TiledMma, tile: tuple[int, int]) -> cute.Tensor:
    """(rows, columns) -> (row, column) in the tile, of this thread's accumulators."""
    identity = cute.make_identity_tensor(tile)
    return rows_and_columns(mma.get_slice(consumer_thread()).partition_C(identity))


def state_after(count: Int32, stages: int) -> pipeline.PipelineState:
    """A consumer's, after so many tiles: only the count has to be kept in a register."""
    count = opaque(count)
    return pipeline.PipelineState(stages, count, count % stages, count // stages % 2)
