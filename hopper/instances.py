"""The list of sm_90a kernels that are compiled: the build and the dispatcher have no other."""

from hopper_attention.cute_kernels.instance import Instance
from hopper_attention.hopper.config import DTYPES, FORWARD_TILES, ForwardConfig


def _forward(dtype: str, head_dim: int, causal: bool) -> Instance:
    tile_m, tile_n = FORWARD_TILES[head_dim, causal]
    return Instance(
        name=f"fwd_{dtype}_d{head_dim}" + ("_causal" if causal else ""),
        family="forward",
        kernel="hopper_attention.hopper.forward:Forward",
        config=ForwardConfig(dtype, head_dim, causal, tile_m, tile_n),
    )


INSTANCES = tuple(_forward(dtype, *key) for dtype in DTYPES for key in FORWARD_TILES)
