"""Configurations of the sm_90a kernels and the tiles chosen for them.

Free of imports from the CuTe DSL; see `cute_kernels/instance.py`.
"""

from dataclasses import dataclass

SHARED_MEMORY_CAPACITY = 232448
"""Bytes of shared memory one block may have on sm_90."""

DTYPES = ("bf16", "fp16")
HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True)
class Registers:
    """Registers a thread after `setmaxnreg`: the block's 64 Ki are split between the roles."""

    consumer: int
    producer: int


REGISTERS = {2: Registers(240, 24), 3: Registers(160, 32)}
"""By number of consumer warpgroups; the producer is one warpgroup more."""


@dataclass(frozen=True)
class ForwardConfig:
    """One forward kernel: `tile_m` query rows, 64 a consumer warpgroup, by `tile_n` keys."""

    dtype: str
    head_dim: int
    causal: bool
    tile_m: int
    tile_n: int
    stages: int = 2

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES, self.dtype
        assert self.head_dim in HEAD_DIMS, self.head_dim
        assert self.tile_m % 64 == 0 and self.warpgroups in REGISTERS, self.tile_m
        assert self.tile_n % 16 == 0 and self.tile_n <= 256, "P is the A operand of k16 WGMMAs"
        assert self.shared_memory_bytes <= SHARED_MEMORY_CAPACITY, self.shared_memory_bytes

    @property
    def warpgroups(self) -> int:
        """Consumer warpgroups."""
        return self.tile_m // 64

    @property
    def registers(self) -> Registers:
        return REGISTERS[self.warpgroups]

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def shared_memory_bytes(self) -> int:
        """Barriers (padded to the 1024 bytes that a 128-byte swizzle wants), Q, K and V stages.

        O is staged where Q was.
        """
        rows = self.tile_m + 2 * self.stages * self.tile_n
        return 1024 + 2 * self.head_dim * rows


FORWARD_TILES = {
    # Model of a tile's clocks and the peers' choices: docs/tuning.md.
    # d64: 192 rows amortise each K/V byte best; 192x192 would force P into shared memory.
    (64, False): (192, 128),
    (64, True): (192, 128),
    # d128: 176 keys fill shared memory; a causal diagonal wastes least with square tiles.
    (128, False): (128, 176),
    (128, True): (128, 128),
    # d256: O takes 128 registers a thread, so S must stay small.
    (256, False): (128, 80),
    (256, True): (128, 80),
}
"""(head_dim, causal) -> (tile_m, tile_n)."""
