"""Configurations of the forward kernels for sm_90a and the tiles chosen for them.

Free of imports from the CuTe DSL; see `cute_kernels/instance.py`.
"""

from dataclasses import dataclass
from typing import ClassVar

from hopper_attention.cute_kernels.conventions import DTYPES, MASKS
from hopper_attention.cute_kernels.hardware import (
    BUSY_PRODUCER,
    REGISTERS,
    SHARED_MEMORY_CAPACITY,
    Registers,
)


@dataclass(frozen=True)
class ForwardConfig:
    """One forward kernel: `tile_m` query rows, 64 a consumer warpgroup, by `tile_n` keys."""

    dtype: str
    head_dim: int
    """Columns of the tiles of Q and K; smaller heads are filled up with zeros."""
    head_dim_v: int
    """Columns of the tiles of V and O."""
    mask: str
    """"full"; "causal"; "local": windows and chunks given at run time, which may be causal too."""
    softcap: bool
    varlen: bool
    """Sequences of their own lengths: packed, or the used part of dense ones."""
    tile_m: int
    tile_n: int
    stages: int = 2

    dtypes: ClassVar[tuple[str, ...]] = DTYPES
    element_bytes: ClassVar[int] = 2
    """Bytes of an element of Q, K, V; O has two."""
    scale_bytes: ClassVar[int] = 0
    """Beside each block of K."""
    factors: ClassVar[int] = 0
    """float32 numbers that the producer looks up for a tile, for each consumer (FP8)."""
    ping_pong: ClassVar[bool] = True
    """True if consumers issue their GEMMs in ping-pong order."""
    l2_hints: ClassVar[bool] = False
    """True if L2 is told to keep K and V rather than Q.  No hardware has compared the two."""
    sums_in_mma: ClassVar[bool] = False
    """True if V has columns of ones, so that the second GEMM sums the rows of P as well."""

    def __post_init__(self) -> None:
        assert self.dtype in self.dtypes, self.dtype
        assert self.mask in MASKS, self.mask
        assert self.head_dim % 32 == 0 and self.head_dim_v % 32 == 0, "whole swizzle spans"
        assert self.head_dim <= 256 and self.head_dim_v <= 256, "N of one WGMMA"
        assert self.tile_m % 64 == 0 and self.warpgroups in REGISTERS, self.tile_m
        assert self.tile_n * self.element_bytes % 32 == 0, (
            "P is the A operand of WGMMAs of 32 bytes"
        )
        assert self.tile_n <= 256, "N of one WGMMA"
        assert self.shared_memory_bytes <= SHARED_MEMORY_CAPACITY, self.shared_memory_bytes

    @property
    def warpgroups(self) -> int:
        """Consumer warpgroups."""
        return self.tile_m // 64

    @property
    def own_words(self) -> int:
        """Words of a tile that one consumer is told, not all: a range of blocks, factors."""
        return 4 + self.factors

    @property
    def registers(self) -> Registers:
        # What the producer looks up for a tile, of three: two are too much for its registers.
        lookups = (self.varlen, self.mask == "local", self.factors > 0)
        busy = sum(lookups) > 1 or (self.varlen and self.warpgroups == 2)
        return (BUSY_PRODUCER if busy else REGISTERS)[self.warpgroups]

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def packs_heads(self) -> bool:
        """True if heads of a group may share tiles (`sequence.TileRows`)."""
        return self.varlen

    @property
    def sum_columns(self) -> int:
        """Columns of ones behind V's: the least by which N of a WGMMA grows."""
        return 8 if self.sums_in_mma else 0

    @property
    def output_over_q(self) -> bool:
        """True if O is staged where Q was; false: in a buffer of its own.

        Both are stored swizzle span by swizzle span: a row of O lies in the same row of Q if the
        spans are as wide.
        """
        if self.element_bytes != 2:
            return False
        same_span = (self.head_dim % 64 == 0) == (self.head_dim_v % 64 == 0)
        return same_span and self.head_dim_v <= self.head_dim

    @property
    def q_stages(self) -> int:
        """Two where they fit: the next tile's Q is loaded while this one is computed and stored."""
        return 2 if self._shared_memory_bytes(2) <= SHARED_MEMORY_CAPACITY else 1

    @property
    def releases_late(self) -> bool:
        """True if Q, where O is staged, is released during the next tile, not at the end of its.

        The store has read O by then, so nothing waits for it; the next tile has Q's other stage.
        """
        return self.output_over_q and self.q_stages == 2

    @property
    def shared_memory_bytes(self) -> int:
        return self._shared_memory_bytes(self.q_stages)

    def _shared_memory_bytes(self, q_stages: int) -> int:
        """Barriers, tiles, scales (padded to the 1024 bytes of a swizzle), Q, K, V stages, O."""
        row, row_v = self.element_bytes * self.head_dim, self.element_bytes * self.head_dim_v
        output = 0 if self.output_over_q else self.tile_m * 2 * self.head_dim_v
        keys = self.stages * self.tile_n * (row + row_v + self.element_bytes * self.sum_columns)
        return 1024 + q_stages * self.tile_m * row + keys + output


@dataclass(frozen=True)
class ForwardFp8Config(ForwardConfig):
    """One forward kernel for e4m3 Q, K and V; V transposed, its keys interleaved."""

    two_level: bool = False
    """True if P V of some key blocks is added up by itself, and to O in float32."""
    codes: bool = False
    """True if P is rounded from its logarithm, without exponentials (`CodedSoftmax`)."""

    dtypes: ClassVar[tuple[str, ...]] = ("e4m3",)
    element_bytes: ClassVar[int] = 1
    scale_bytes: ClassVar[int] = 16
    factors: ClassVar[int] = 2
    ping_pong: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.tile_n in (64, 128), "keys that share a scale, or two of them"

    @property
    def sums_in_mma(self) -> bool:  # type: ignore[override]
        """There is no P in float32 that could be summed."""
        return self.codes

    @property
    def packs_heads(self) -> bool:
        """Q's scales are of the rows of one head."""
        return False

    @property
    def f16x2_groups(self) -> tuple[int, ...]:
        """Groups of four of a thread's columns with exponentials in half precision: each second.

        None with wide heads, of which the GEMMs take longer than all that MUFU has to do.
        """
        return tuple(range(1, self.tile_n // 16, 2)) if self.head_dim <= 128 else ()


FORWARD_TILES = {
    # Model of a tile's clocks and the peers' choices: docs/kernels/forward.md.
    # d64: 192 rows amortise each K/V byte best; 192x192 would force P into shared memory.
    # Windows and softcap need more registers: 128 and 96 keys would spill.
    (64, 64): {"full": (192, 128), "causal": (192, 128), "local": (192, 112), "softcap": (192, 96)},
    # d96: with three warpgroups S, P and O of 144 keys exceed their 160 registers.
    (96, 96): {"full": (128, 160), "causal": (128, 128), "local": (128, 128)},
    # d128: with 128 keys Q has two stages, so that the next one is loaded early; 176 keys would
    # fill shared memory: as fast at 16k keys, 6 % slower at 1k (H100).
    (128, 128): {"full": (128, 128), "causal": (128, 128), "local": (128, 128)},
    (192, 128): {"full": (128, 128), "causal": (128, 128), "local": (128, 96)},
    (192, 192): {"full": (128, 112), "causal": (128, 96), "local": (128, 96)},
    # d256: O takes 128 registers a thread, so S must stay small.
    (256, 256): {"full": (128, 80), "causal": (128, 80), "local": (128, 64)},
    (64, 256): {"full": (128, 96), "causal": (128, 96), "local": (128, 64)},
}
"""(head_dim, head_dim_v) -> mask -> (tile_m, tile_n); "softcap" if it differs from "local"."""

FP8_TILES = {
    # Keys in whole spans of 128 bytes, for V, of which they are the columns; 64 where masks or
    # softcap need the registers.
    (64, 64): {"full": (192, 128), "softcap": (192, 64)},
    (96, 96): {"full": (128, 128)},
    (128, 128): {"full": (128, 128)},
    (192, 192): {"full": (128, 128)},
    (256, 256): {"full": (128, 128), "full_varlen": (128, 64), "local": (128, 64)},
}
"""(head_dim, head_dim_v) -> mask -> (tile_m, tile_n); what is missing is as the one before, in the
order full, causal, local, softcap.  "_varlen": a busier producer takes eight of the registers."""
FP8_TWO_LEVEL_TILES = {
    # Two warpgroups: three have 160 registers a thread, which spill.
    (64, 64): {"full": (128, 128)},
    (96, 96): {"full": (128, 128)},
    (128, 128): {"full": (128, 128), "causal_varlen": (128, 64), "local": (128, 64)},
}
"""Tiles where O is in registers twice: no room for that with wider heads."""
