"""The list of Ampere kernels that are compiled: the build and the dispatcher have no other."""

from hopper_attention.cute_kernels.ampere.config import (
    DTYPES,
    FORWARD_TILES,
    AmpereForwardConfig,
)
from hopper_attention.cute_kernels.instance import Instance

# Masks, softcap, lengths, sinks and the type of the result are arguments, for few instances serve
# everything: blocks that no mask touches go through a loop of their own whatever the mask is.
GROUPS = {"sm_80": "ampere", "sm_90": "ampere_sm90"}
"""Architecture -> group; for sm_90 only what a Hopper GPU would run, as a second opinion."""

SPILLS_ON_HOPPER = "48 bytes, of a kernel that is there to compare results with"


def _forward(dtype: str, dims: tuple[int, int], tile: int, architecture: str) -> Instance:
    config = AmpereForwardConfig(dtype, *dims, *FORWARD_TILES[dims][tile])
    head_dim, head_dim_v = dims
    name = f"ampere_fwd_{dtype}_d{head_dim}"
    name += f"x{head_dim_v}" if head_dim_v != head_dim else ""
    name += "_small" if tile > 0 else ""
    return Instance(
        name=name + ("_sm90" if architecture == "sm_90" else ""),
        family="ampere_forward",
        kernel="hopper_attention.cute_kernels.ampere.forward:AmpereForward",
        config=config,
        architecture=architecture,
        group=GROUPS[architecture],
        claims=("HMMA", "LDSM", "LDGSTS"),
        spills_because=SPILLS_ON_HOPPER if (architecture, dims) == ("sm_90", (192, 128)) else "",
    )


INSTANCES = tuple(
    _forward(dtype, dims, tile, architecture)
    for architecture in GROUPS
    for dtype in DTYPES
    for dims, tiles in FORWARD_TILES.items()
    for tile in range(len(tiles))
    if tile == 0 or architecture == "sm_80"
)
