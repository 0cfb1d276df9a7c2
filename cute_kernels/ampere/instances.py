"""The list of Ampere kernels that are compiled: the build and the dispatcher have no other."""

from hopper_attention.cute_kernels.ampere.config import (
    BACKWARD_TILES,
    DTYPES,
    FORWARD_TILES,
    HOPPER_TILES,
    AmpereBackwardConfig,
    AmpereForwardConfig,
    AmperePostprocessConfig,
)
from hopper_attention.cute_kernels.instance import Instance
from hopper_attention.hopper.config import PreprocessConfig

# Masks, softcap, lengths, sinks and the type of the result are arguments, so few instances serve
# everything: blocks that no mask touches go through a loop of their own whatever the mask is.
GROUPS = {"sm_80": "ampere", "sm_90": "ampere_sm90"}
"""Architecture -> group.  On Hopper GPUs, where cubins for sm_80 do not run, they are a second
opinion on results."""
SUFFIXES = {"sm_80": "", "sm_90": "_sm90"}


def _name(kind: str, dtype: str, dims: tuple[int, int], small: bool, architecture: str) -> str:
    head_dim, head_dim_v = dims
    name = f"ampere_{kind}_{dtype}_d{head_dim}"
    name += f"x{head_dim_v}" if head_dim_v != head_dim else ""
    return name + ("_small" if small else "") + SUFFIXES[architecture]


def _forward(dtype: str, dims: tuple[int, int], tile: int, architecture: str) -> Instance:
    tiles = FORWARD_TILES if architecture == "sm_80" else HOPPER_TILES
    return Instance(
        name=_name("fwd", dtype, dims, tile > 0, architecture),
        family="ampere_forward",
        kernel="hopper_attention.cute_kernels.ampere.forward:AmpereForward",
        config=AmpereForwardConfig(dtype, *dims, *tiles[dims][tile]),
        architecture=architecture,
        group=GROUPS[architecture],
        claims=("HMMA", "LDSM", "LDGSTS"),
    )


def _backward(dtype: str, dims: tuple[int, int], tile: int, architecture: str) -> Instance:
    return Instance(
        name=_name("bwd", dtype, dims, tile > 0, architecture),
        family="ampere_backward",
        kernel="hopper_attention.cute_kernels.ampere.backward:AmpereBackward",
        config=AmpereBackwardConfig(dtype, *dims, *BACKWARD_TILES[dims][tile]),
        architecture=architecture,
        group=GROUPS[architecture],
        claims=("HMMA", "LDSM", "LDGSTS", "RED" if architecture == "sm_80" else "REDG"),
    )


def _preprocess(dtype: str, architecture: str) -> Instance:
    return Instance(
        name=f"ampere_bwd_pre_{dtype}" + SUFFIXES[architecture],
        family="ampere_backward_preprocess",
        kernel="hopper_attention.hopper.preprocess:Preprocess",
        config=PreprocessConfig(dtype),
        architecture=architecture,
        group=GROUPS[architecture],
        claims=("LDG",),
    )


def _postprocess(dtype: str, architecture: str) -> Instance:
    return Instance(
        name=f"ampere_bwd_post_{dtype}" + SUFFIXES[architecture],
        family="ampere_backward_postprocess",
        kernel="hopper_attention.cute_kernels.ampere.postprocess:AmperePostprocess",
        config=AmperePostprocessConfig(dtype),
        architecture=architecture,
        group=GROUPS[architecture],
        claims=("LDG",),
    )


def _places(tiles: dict) -> list[tuple]:
    """(dtype, head dims, number of the tile, architecture): the smaller ones only for sm_80."""
    return [
        (dtype, dims, tile, architecture)
        for architecture in GROUPS
        for dtype in DTYPES
        for dims, of_dims in tiles.items()
        for tile in range(len(of_dims) if architecture == "sm_80" else 1)
    ]


INSTANCES = (
    *(_forward(*place) for place in _places(FORWARD_TILES)),
    *(_backward(*place) for place in _places(BACKWARD_TILES)),
    *(
        helper(dtype, architecture)
        for architecture in GROUPS
        for helper in (_preprocess, _postprocess)
        for dtype in DTYPES
    ),
)
