"""The list of sm_90a kernels that are compiled: the build and the dispatcher have no other."""

from hopper_attention.cute_kernels.instance import Instance
from hopper_attention.hopper.config import DTYPES, FORWARD_TILES, ForwardConfig

# What changes the inner loop is an instance; scale, window, chunk, softcap's value, sinks, lengths
# and strides are arguments.  Softcap costs two more MUFU an element and is therefore apart; models
# that use it (Gemma 2) have windows, and a window can be causal or full as well.
VARIANTS = (("full", False), ("causal", False), ("local", False), ("local", True))
"""(mask, softcap)"""


def _forward(dtype: str, dims: tuple[int, int], mask: str, softcap: bool, varlen: bool) -> Instance:
    head_dim, head_dim_v = dims
    name = f"fwd_{dtype}_d{head_dim}"
    name += f"x{head_dim_v}" if head_dim_v != head_dim else ""
    name += f"_{mask}" if mask != "full" else ""
    name += "_softcap" if softcap else ""
    name += "_varlen" if varlen else ""
    tiles = FORWARD_TILES[dims]
    tile_m, tile_n = tiles["softcap"] if softcap and "softcap" in tiles else tiles[mask]
    return Instance(
        name=name,
        family="forward",
        kernel="hopper_attention.hopper.forward:Forward",
        config=ForwardConfig(dtype, head_dim, head_dim_v, mask, softcap, varlen, tile_m, tile_n),
    )


INSTANCES = tuple(
    _forward(dtype, dims, mask, softcap, varlen)
    for dtype in DTYPES
    for dims in FORWARD_TILES
    for mask, softcap in VARIANTS
    for varlen in (False, True)
)
