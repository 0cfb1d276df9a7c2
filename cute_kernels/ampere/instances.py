"""The list of Ampere kernels that are compiled: the build and the dispatcher have no other."""

from hopper_attention.cute_kernels.ampere.config import (
    DTYPES,
    FORWARD_TILES,
    HOPPER_TILES,
    AmpereForwardConfig,
)
from hopper_attention.cute_kernels.instance import Instance

# Masks, softcap, lengths, sinks and the type of the result are arguments, so few instances serve
# everything: blocks that no mask touches go through a loop of their own whatever the mask is.


def _forward(
    dtype: str, dims: tuple[int, int], tile: tuple[int, int, int], architecture: str, suffix: str
) -> Instance:
    head_dim, head_dim_v = dims
    name = f"ampere_fwd_{dtype}_d{head_dim}"
    name += f"x{head_dim_v}" if head_dim_v != head_dim else ""
    return Instance(
        name=name + suffix,
        family="ampere_forward",
        kernel="hopper_attention.cute_kernels.ampere.forward:AmpereForward",
        config=AmpereForwardConfig(dtype, *dims, *tile),
        architecture=architecture,
        group="ampere" if architecture == "sm_80" else "ampere_sm90",
        claims=("HMMA", "LDSM", "LDGSTS"),
    )


FORWARD = tuple(
    _forward(dtype, dims, tile, "sm_80", suffix)
    for dtype in DTYPES
    for dims, tiles in FORWARD_TILES.items()
    for tile, suffix in zip(tiles, ("", "_small"))
)
# On Hopper GPUs they are a second opinion on results; cubins for sm_80 do not run there.
FORWARD_ON_HOPPER = tuple(
    _forward(dtype, dims, tiles[0], "sm_90", "_sm90")
    for dtype in DTYPES
    for dims, tiles in HOPPER_TILES.items()
)
INSTANCES = (*FORWARD, *FORWARD_ON_HOPPER)
