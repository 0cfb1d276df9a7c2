"""The list of attention kernels for sm_90a that a build can compile."""

from itertools import product

from hopper_attention.cute_kernels.backward.config import PreprocessConfig
from hopper_attention.cute_kernels.conventions import DTYPES
from hopper_attention.cute_kernels.instance import Instance
from hopper_attention.hopper.backward.config import (
    BACKWARD_TILES,
    BackwardConfig,
    PostprocessConfig,
    WideBackwardConfig,
)
from hopper_attention.hopper.forward.config import (
    FORWARD_TILES,
    FP8_TILES,
    FP8_TWO_LEVEL_TILES,
    ForwardConfig,
    ForwardFp8Config,
)

# What changes the inner loop is an instance; scale, window, chunk, softcap's value, sinks, lengths
# and strides are arguments.  Softcap costs two more MUFU an element and is therefore apart; models
# that use it (Gemma 2) have windows, and a window can be causal or full as well.
WIDE_BACKWARD = ((192, 128), (192, 192), (256, 256))
"""(head_dim, head_dim_v) whose dK and dV do not fit into the registers of one warpgroup."""
VARIANTS = (("full", False), ("causal", False), ("local", False), ("local", True))
"""(mask, softcap)"""


def _name(kind: str, dtype: str, dims: tuple[int, int], mask: str, softcap: bool, varlen: bool):
    head_dim, head_dim_v = dims
    name = f"{kind}_{dtype}_d{head_dim}"
    name += f"x{head_dim_v}" if head_dim_v != head_dim else ""
    name += f"_{mask}" if mask != "full" else ""
    name += "_softcap" if softcap else ""
    return name + ("_varlen" if varlen else "")


def _forward(dtype: str, dims: tuple[int, int], mask: str, softcap: bool, varlen: bool) -> Instance:
    tiles = FORWARD_TILES[dims]
    tile_m, tile_n = tiles["softcap"] if softcap and "softcap" in tiles else tiles[mask]
    return Instance(
        name=_name("fwd", dtype, dims, mask, softcap, varlen),
        family="forward",
        kernel="hopper_attention.hopper.forward.kernel:Forward",
        config=ForwardConfig(dtype, *dims, mask, softcap, varlen, tile_m, tile_n),
    )


def _backward(
    dtype: str, dims: tuple[int, int], mask: str, softcap: bool, varlen: bool
) -> Instance:
    return Instance(
        name=_name("bwd", dtype, dims, mask, softcap, varlen),
        family="backward",
        kernel="hopper_attention.hopper.backward.kernel:Backward",
        config=BackwardConfig(dtype, *dims, mask, softcap, varlen, BACKWARD_TILES[dims]),
        claims=("HGMMA", "UTMALDG", "REDG"),
    )


def _wide_backward(
    dtype: str, dims: tuple[int, int], mask: str, softcap: bool, varlen: bool
) -> Instance:
    return Instance(
        name=_name("bwd", dtype, dims, mask, softcap, varlen),
        family="backward",
        kernel="hopper_attention.hopper.backward.kernel_wide:BackwardWide",
        config=WideBackwardConfig(dtype, *dims, mask, softcap, varlen),
        claims=("HGMMA", "UTMALDG", "REDG"),
    )


def _preprocess(dtype: str) -> Instance:
    return Instance(
        name=f"bwd_pre_{dtype}",
        family="backward_preprocess",
        kernel="hopper_attention.cute_kernels.backward.preprocess:Preprocess",
        config=PreprocessConfig(dtype),
        claims=("LDG",),
    )


def _postprocess(dtype: str, head_dim: int, tile_m: int) -> Instance:
    return Instance(
        name=f"bwd_post_{dtype}_d{head_dim}",
        family="backward_postprocess",
        kernel="hopper_attention.hopper.backward.postprocess:Postprocess",
        config=PostprocessConfig(dtype, head_dim, tile_m),
        claims=("LDG",),
    )


def _forward_fp8(
    dims: tuple[int, int], mask: str, softcap: bool, varlen: bool, two_level: bool
) -> Instance:
    tiles = (FP8_TWO_LEVEL_TILES if two_level else FP8_TILES)[dims]
    kinds = ("full", "causal", "local", "softcap")
    upto = kinds.index("softcap" if softcap else mask) + 1
    keys = product(kinds[:upto], ("", "_varlen") if varlen else ("",))
    tile = [tiles["".join(key)] for key in keys if "".join(key) in tiles][-1]
    return Instance(
        name=_name("fwd", "e4m3", dims, mask, softcap, varlen)
        + ("_two_level" if two_level else ""),
        family="forward_fp8",
        kernel="hopper_attention.hopper.forward.kernel_fp8:ForwardFp8",
        config=ForwardFp8Config("e4m3", *dims, mask, softcap, varlen, *tile, two_level=two_level),
        claims=("QGMMA", "UTMALDG"),
        group="fp8",
    )


FORWARD = tuple(
    _forward(dtype, dims, mask, softcap, varlen)
    for dtype in DTYPES
    for dims in FORWARD_TILES
    for mask, softcap in VARIANTS
    for varlen in (False, True)
)
BACKWARD = tuple(
    _backward(dtype, dims, mask, softcap, varlen)
    for dtype in DTYPES
    for dims in BACKWARD_TILES
    for mask, softcap in VARIANTS
    for varlen in (False, True)
)
WIDE = tuple(
    _wide_backward(dtype, dims, mask, softcap, varlen)
    for dtype in DTYPES
    for dims in WIDE_BACKWARD
    for mask, softcap in VARIANTS
    for varlen in (False, True)
)
FP8 = tuple(
    _forward_fp8(dims, mask, softcap, varlen, two_level)
    for two_level, tiles in ((False, FP8_TILES), (True, FP8_TWO_LEVEL_TILES))
    for dims in tiles
    for mask, softcap in VARIANTS
    for varlen in (False, True)
)
# One postprocessing kernel serves all backward kernels with the same dQ: by head dim.
DQ_TILES = {dims[0]: tile_m for dims, tile_m in BACKWARD_TILES.items()}
DQ_TILES |= {i.config.head_dim: i.config.tile_m for i in WIDE}
INSTANCES = (
    *FORWARD,
    *FP8,
    *BACKWARD,
    *WIDE,
    *(_preprocess(dtype) for dtype in DTYPES),
    *(_postprocess(dtype, *tile) for dtype in DTYPES for tile in DQ_TILES.items()),
)
