"""Configurations of the Ampere kernels, the tiles chosen for them, and what devices have room for.

Free of imports from the CuTe DSL; see `cute_kernels/instance.py`.
"""

from dataclasses import dataclass

DTYPES = ("bf16", "fp16")

SHARED_MEMORY = {
    (8, 0): 163 << 10,
    (8, 6): 99 << 10,
    (8, 7): 163 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
}
"""Compute capability -> bytes of shared memory that one block may have."""

ARCHITECTURES = {
    (8, 0): "sm_80",
    (8, 6): "sm_80",
    (8, 7): "sm_80",
    (8, 9): "sm_80",
    (9, 0): "sm_90",
}
"""Compute capability -> architecture of the instances: machine code serves one major version."""

MATRIX = 16
"""Rows, and columns, of what one ldmatrix.x4 loads; rows of one mma.sync."""


@dataclass(frozen=True)
class AmpereForwardConfig:
    """One forward kernel: `tile_m` query rows, shared by `warps`, by `tile_n` keys."""

    dtype: str
    head_dim: int
    """Columns of the tiles of Q and K; smaller heads are filled up with zeros."""
    head_dim_v: int
    """The same of V and O."""
    tile_m: int
    tile_n: int
    warps: int

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES, self.dtype
        assert self.head_dim % 32 == 0 and self.head_dim_v % 32 == 0, "whole swizzle spans"
        assert (self.head_dim % 64 == 0) == (self.head_dim_v % 64 == 0), "spans of one width"
        assert self.tile_m % (MATRIX * self.warps) == 0, "whole matrices a warp"
        assert self.tile_n % MATRIX == 0, self.tile_n
        assert self.tile_m <= self.threads, "a thread finds what a row sees"
        assert self.shared_memory_bytes <= max(SHARED_MEMORY.values()), self.shared_memory_bytes

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def warp_rows(self) -> int:
        """Query rows of one warp."""
        return self.tile_m // self.warps

    @property
    def shared_memory_bytes(self) -> int:
        """Q, K, V, two limits a row, and what the tile is."""
        keys = self.tile_n * (self.head_dim + self.head_dim_v)
        return 2 * (self.tile_m * self.head_dim + keys) + 8 * self.tile_m + 64


FORWARD_TILES = {
    # 32 rows a warp halve what it reads of K and V: with 16, shared memory would be slower than the
    # tensor cores.  Wider heads leave registers for 16.
    (64, 64): ((128, 96, 4),),
    (96, 96): ((128, 64, 4),),
    (128, 128): ((128, 64, 4),),
    (192, 128): ((128, 64, 4),),
    (192, 192): ((128, 64, 8),),
    (256, 256): ((128, 64, 8), (64, 64, 4)),
    (64, 256): ((128, 64, 8),),
}
"""(head_dim, head_dim_v) -> (tile_m, tile_n, warps), the best first; others need less memory."""
HOPPER_TILES = {dims: tiles[:1] for dims, tiles in FORWARD_TILES.items()} | {
    (192, 128): ((128, 48, 4),),  # 64 keys spill when compiled for sm_90
}
"""The same on sm_90, which has memory for the best."""
