"""Configurations of the Ampere kernels and the tiles chosen for them.

Free of imports from the CuTe DSL; see `cute_kernels/instance.py`.
"""

from dataclasses import dataclass

from hopper_attention.cute_kernels.conventions import DTYPES
from hopper_attention.cute_kernels.hardware import SHARED_MEMORY

MATRIX = 16
"""Rows, and columns, of what one ldmatrix.x4 loads; rows of one mma.sync."""


@dataclass(frozen=True)
class AmpereForwardConfig:
    """One forward kernel: `tile_m` query rows, shared by `warps`, by `tile_n` keys."""

    dtype: str
    head_dim: int
    """Columns of the tiles of Q and K; smaller heads are filled up with zeros."""
    head_dim_v: int
    """Columns of the tiles of V and O."""
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


@dataclass(frozen=True)
class AmpereBackwardConfig:
    """One backward kernel: `tile_n` keys, whose gradients are in registers, by `tile_m` rows.

    Of every GEMM each warp computes 32 rows, or 16 where there are not as many, by some columns.
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    tile_m: int
    tile_n: int
    stages: int
    """Blocks of Q and dO in shared memory: one is loaded while the other is used, or not."""
    warps: int

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES, self.dtype
        assert self.head_dim % 32 == 0 and self.head_dim_v % 32 == 0, "whole swizzle spans"
        assert (self.head_dim % 64 == 0) == (self.head_dim_v % 64 == 0), "spans of one width"
        assert self.tile_m in (32, 64, 128), "divides the workspace's rows; whole swizzle spans"
        assert self.tile_n <= self.threads, "a thread finds who sees a key"
        assert self.tile_m // 2 <= self.threads, "a thread loads 4 rows' LSE or delta"
        for rows, (groups, _) in (
            (self.tile_n, self.score_warps),
            (self.tile_n, self.key_warps),
            (self.tile_m, self.query_warps),
        ):
            assert rows % (MATRIX * groups) == 0, "whole matrices a warp"
        assert self.shared_memory_bytes <= max(SHARED_MEMORY.values()), self.shared_memory_bytes

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def span(self) -> int:
        """Columns of a swizzle span of the tiles of Q, dO, K and V; see shared_tile.py."""
        return 64 if self.head_dim % 64 == 0 else 32

    @property
    def score_warps(self) -> tuple[int, int]:
        """Warps along keys and queries of S and dP."""
        return self._arranged(self.tile_n, self.tile_m // MATRIX)

    @property
    def key_warps(self) -> tuple[int, int]:
        """Warps along keys and columns of dK and dV."""
        return self._arranged(self.tile_n, self.span // MATRIX)

    @property
    def query_warps(self) -> tuple[int, int]:
        """Warps along queries and columns of dQ."""
        return self._arranged(self.tile_m, self.span // MATRIX)

    def _arranged(self, rows: int, most: int) -> tuple[int, int]:
        """32 rows a warp, unless more than `most` warps had to share the columns."""
        columns = min(max(32 * self.warps // rows, 1), most)
        return self.warps // columns, columns

    @property
    def stage_bytes(self) -> int:
        """Q and dO."""
        return 2 * self.tile_m * (self.head_dim + self.head_dim_v)

    @property
    def shared_memory_bytes(self) -> int:
        """Q, dO, K, V, P and dS, LSE and delta, two limits a key, and what the block's work is."""
        keys = 2 * self.tile_n * (self.head_dim + self.head_dim_v)
        scores = 2 * 2 * self.tile_m * self.tile_n
        statistics = self.stages * 8 * self.tile_m
        return self.stages * self.stage_bytes + keys + scores + statistics + 8 * self.tile_n + 64


@dataclass(frozen=True)
class AmperePostprocessConfig:
    """dQ from the workspace, any head dim."""

    dtype: str

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES, self.dtype

    tile_m: int = MATRIX
    """Rows whose elements are together in the workspace (dq_bands.py)."""
    threads: int = 256
    shared_memory_bytes: int = 0


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
HOPPER_FORWARD_TILES = {dims: tiles[:1] for dims, tiles in FORWARD_TILES.items()} | {
    (192, 128): ((128, 48, 4),),  # 64 keys spill when compiled for sm_90
    (256, 256): ((64, 64, 4),),  # two blocks fit: 300 TFLOP/s at 16k keys where 128 rows have 280
}
"""Tiles on sm_90, which has more memory."""

BACKWARD_TILES = {
    (64, 64): ((128, 128, 1, 8), (64, 128, 2, 8)),
    (96, 96): ((64, 128, 2, 8), (64, 64, 2, 8)),
    (128, 128): ((64, 128, 2, 8), (64, 64, 1, 8)),
    (192, 128): ((64, 64, 2, 8), (32, 64, 2, 8)),
    (192, 192): ((64, 64, 2, 8), (32, 64, 1, 8)),
    (256, 256): ((64, 64, 1, 8), (32, 32, 1, 4)),
}
"""(head_dim, head_dim_v) -> (tile_m, tile_n, stages, warps), the best first."""
HOPPER_BACKWARD_TILES = {dims: tiles[:1] for dims, tiles in BACKWARD_TILES.items()} | {
    # TFLOP/s on an H100 at 16k keys:
    (64, 64): ((128, 128, 2, 8),),  # 275; with one stage 269; 64 rows, two stages 232
    (256, 256): ((64, 64, 2, 8),),  # 244; with one stage 237
}
"""Tiles on sm_90, which has more memory."""
