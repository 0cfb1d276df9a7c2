"""The list of Ampere kernels that a build can compile."""

from hopper_attention.cute_kernels.ampere.config import (
    BACKWARD_TILES,
    DTYPES,
    FORWARD_TILES,
    HOPPER_BACKWARD_TILES,
    HOPPER_FORWARD_TILES,
    AmpereBackwardConfig,
    AmpereForwardConfig,
    AmperePostprocessConfig,
)
from hopper_attention.cute_kernels.backward.config import PreprocessConfig
from hopper_attention.cute_kernels.instance import Instance

# Masks, softcap, lengths, sinks and the type of the result are arguments, so few instances serve
# everything: blocks that no mask touches go through a loop of their own whatever the mask is.
GROUPS = {"sm_80": "ampere", "sm_90": "ampere_sm90"}
"""Architecture -> group.  On Hopper GPUs, where cubins for sm_80 do not run, they are a second
opinion on results."""
SUFFIXES = {"sm_80": "", "sm_90": "_sm90"}
FORWARD = {"sm_80": FORWARD_TILES, "sm_90": HOPPER_FORWARD_TILES}
BACKWARD = {"sm_80": BACKWARD_TILES, "sm_90": HOPPER_BACKWARD_TILES}


def _name(kind: str, dtype: str, dims: tuple[int, int], small: bool, architecture: str) -> str:
    head_dim, head_dim_v = dims
    name = f"ampere_{kind}_{dtype}_d{head_dim}"
    name += f"x{head_dim_v}" if head_dim_v != head_dim else ""
    return name + ("_small" if small else "") + SUFFIXES[architecture]


def _forward(dtype: str, dims: tuple[int, int], tile: int, architecture: str) -> Instance:
    return Instance(
        name=_name("fwd", dtype, dims, tile > 0, architecture),
        family="ampere_forward",
        kernel="hopper_attention.cute_kernels.ampere.forward:AmpereForward",
        config=AmpereForwardConfig(dtype, *dims, *FORWARD[architecture][dims][tile]),
        architecture=architecture,
        group=GROUPS[architecture],
        claims=("HMMA", "LDSM", "LDGSTS"),
    )


def _backward(dtype: str, dims: tuple[int, int], tile: int, architecture: str) -> Instance:
    return Instance(
        name=_name("bwd", dtype, dims, tile > 0, architecture),
        family="ampere_backward",
        kernel="hopper_attention.cute_kernels.ampere.backward:AmpereBackward",
        config=AmpereBackwardConfig(dtype, *dims, *BACKWARD[architecture][dims][tile]),
        architecture=architecture,
        group=GROUPS[architecture],
        claims=("HMMA", "LDSM", "LDGSTS", "RED" if architecture == "sm_80" else "REDG"),
    )


def _preprocess(dtype: str, architecture: str) -> Instance:
    return Instance(
        name=f"ampere_bwd_pre_{dtype}" + SUFFIXES[architecture],
        family="ampere_backward_preprocess",
        kernel="hopper_attention.cute_kernels.backward.preprocess:Preprocess",
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
    """(dtype, head dims, number of the tile, architecture)."""
    return [
        (dtype, dims, tile, architecture)
        for architecture, of_architecture in tiles.items()
        for dtype in DTYPES
        for dims, of_dims in of_architecture.items()
        for tile in range(len(of_dims))
    ]


INSTANCES = (
    *(_forward(*place) for place in _places(FORWARD)),
    *(_backward(*place) for place in _places(BACKWARD)),
    *(
        helper(dtype, architecture)
        for architecture in GROUPS
        for helper in (_preprocess, _postprocess)
        for dtype in DTYPES
    ),
)
