"""Configurations of the backward kernels for sm_90a and the tiles chosen for them.

Free of imports from the CuTe DSL; see `cute_kernels/instance.py`.
"""

from dataclasses import dataclass
from typing import ClassVar

from hopper_attention.cute_kernels.conventions import DTYPES, MASKS
from hopper_attention.cute_kernels.hardware import REGISTERS, SHARED_MEMORY_CAPACITY, Registers

BACKWARD_STAGES = 2
"""Stages of dO and dS in the backward kernels, and of Q where there is no room for more."""


@dataclass(frozen=True)
class BackwardConfig:
    """One backward kernel: `tile_n` keys, 64 a consumer warpgroup, by `tile_m` query rows."""

    dtype: str
    head_dim: int
    head_dim_v: int
    mask: str
    softcap: bool
    varlen: bool
    tile_m: int
    tile_n: int = 128
    late_dq: bool = False
    """True if dQ has registers of its own, which are added to global memory under dV and dP of the
    next row block (the head of hopper/backward/kernel.py)."""

    q_stages: ClassVar[int] = 4
    """Why not two: the head of hopper/backward/kernel.py."""

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES, self.dtype
        assert self.mask in MASKS, self.mask
        assert self.head_dim % 32 == 0 and self.head_dim_v % 32 == 0, "whole swizzle spans"
        assert self.tile_m in (64, 128), "dQ is split by rows or by columns between 2 warpgroups"
        assert self.tile_n == 64 * self.warpgroups, self.tile_n
        assert not (self.late_dq and self.softcap), "dS has a slope, which rounded P has not"
        assert self.shared_memory_bytes <= SHARED_MEMORY_CAPACITY, self.shared_memory_bytes

    @property
    def warpgroups(self) -> int:
        return 2

    @property
    def dp_rows(self) -> int:
        """Rows for which dP is in registers at a time."""
        return self.tile_m if self.late_dq else 64

    @property
    def rounded_p(self) -> bool:
        """True if dS is computed from P as dV has it: dP then has the registers of S."""
        return self.late_dq and (self.head_dim > 96 or self.tile_m > 64)

    @property
    def holds_dq_address(self) -> bool:
        """True if no one else has the registers of dQ's address while reductions may read them.

        With 128 rows that spills.
        """
        return self.late_dq and self.tile_m == 64

    @property
    def parts(self) -> int:
        """The number of times that dP comes, `dp_rows` each."""
        return self.tile_m // self.dp_rows

    @property
    def registers(self) -> Registers:
        return REGISTERS[2]

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def shared_memory_bytes(self) -> int:
        """Barriers and row statistics (padded), Q, dO, K, V, dS."""
        dims, dims_v = 2 * self.head_dim, 2 * self.head_dim_v
        queries = self.tile_m * (self.q_stages * dims + BACKWARD_STAGES * dims_v)
        keys = self.tile_n * (dims + dims_v)
        ds = BACKWARD_STAGES * self.tile_m * 2 * self.tile_n
        statistics = (self.q_stages + BACKWARD_STAGES) * 4 * self.tile_m
        return -(-(256 + statistics) // 1024) * 1024 + queries + keys + ds


@dataclass(frozen=True)
class WideBackwardConfig:
    """One backward kernel for wide heads: 64 keys by 64 query rows, dK and dV a warpgroup each."""

    dtype: str
    head_dim: int
    head_dim_v: int
    mask: str
    softcap: bool
    varlen: bool
    tile_m: int = 64
    tile_n: int = 64

    q_stages: ClassVar[int] = BACKWARD_STAGES

    @property
    def gradient_stays_under_way(self) -> bool:
        """True if dK of a row block runs while the next one begins: 208 registers too many."""
        return self.head_dim <= 192

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES, self.dtype
        assert self.mask in MASKS, self.mask
        assert self.head_dim % 64 == 0 and self.head_dim_v % 64 == 0, "half of dQ's columns"
        assert self.head_dim <= 256 and self.head_dim_v <= 256, "N of one WGMMA"
        assert (self.tile_m, self.tile_n) == (64, 64), "M of one WGMMA, on either side"
        assert self.shared_memory_bytes <= SHARED_MEMORY_CAPACITY, self.shared_memory_bytes

    @property
    def registers(self) -> Registers:
        return REGISTERS[2]

    @property
    def threads(self) -> int:
        return 384

    @property
    def shared_memory_bytes(self) -> int:
        """Barriers and row statistics (padded), Q, dO, K, V, dS, and P in float32."""
        inputs = (
            (BACKWARD_STAGES * self.tile_m + self.tile_n) * 2 * (self.head_dim + self.head_dim_v)
        )
        scores = self.tile_m * self.tile_n * (BACKWARD_STAGES * 2 + 4)
        statistics = BACKWARD_STAGES * 2 * 4 * self.tile_m
        return -(-(256 + statistics) // 1024) * 1024 + inputs + scores


BACKWARD_TILES = {
    (64, 64): 128,
    (96, 96): 64,
    (128, 128): 64,
}
"""(head_dim, head_dim_v) -> tile_m."""

LATE_DQ = ((96, 96),)
"""(head_dim, head_dim_v) with `late_dq` where there is no softcap; the others have the other order.

No GPU has compared the two.  (64, 64) and (128, 128) compile as well, but have `rounded_p`: one in
twenty small causal problems has an error of dQ above twice PyTorch's (docs/lab)."""


@dataclass(frozen=True)
class PostprocessConfig:
    """dQ from the workspace, `tile_m` rows of the backward kernel's block."""

    dtype: str
    head_dim: int
    tile_m: int

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES, self.dtype

    @property
    def threads(self) -> int:
        return 256

    @property
    def shared_memory_bytes(self) -> int:
        return self.tile_m * 2 * self.head_dim
