"""The list of Ampere kernels that are compiled: the build and the dispatcher have no other."""

from hopper_attention.cute_kernels.ampere.config import (
    BACKWARD_TILES,
    DTYPES,
    FORWARD_TILES,
    AmpereBackwardConfig,
    AmpereForwardConfig,
    AmperePostprocessConfig,
)
from hopper_attention.cute_kernels.instance import Instance
from hopper_attention.hopper.config import PreprocessConfig

# Masks, softcap, lengths, sinks and the type of the result are arguments, for few instances serve
# everything: blocks that no mask touches go through a loop of their own whatever the mask is.
GROUPS = {"sm_80": "ampere", "sm_90": "ampere_sm90"}
"""Architecture -> group; for sm_90 only what a Hopper GPU would run, as a second opinion."""
SUFFIXES = {"sm_80": "", "sm_90": "_sm90"}

SPILLS_ON_HOPPER = "48 bytes, of a kernel that is there to compare results with"


def _name(kind: str, dtype: str, dims: tuple[int, int], tile: int, architecture: str) -> str:
    head_dim, head_dim_v = dims
    name = f"ampere_{kind}_{dtype}_d{head_dim}"
    name += f"x{head_dim_v}" if head_dim_v != head_dim else ""
    name += "_small" if tile > 0 else ""
    return name + SUFFIXES[architecture]


def _forward(dtype: str, dims: tuple[int, int], tile: int, architecture: str) -> Instance:
    return Instance(
        name=_name("fwd", dtype, dims, tile, architecture),
        family="ampere_forward",
        kernel="hopper_attention.cute_kernels.ampere.forward:AmpereForward",
        config=AmpereForwardConfig(dtype, *dims, *FORWARD_TILES[dims][tile]),
        architecture=architecture,
        group=GROUPS[architecture],
        claims=("HMMA", "LDSM", "LDGSTS"),
        spills_because=SPILLS_ON_HOPPER if (architecture, dims) == ("sm_90", (192, 128)) else "",
    )


def _backward(dtype: str, dims: tuple[int, int], tile: int, architecture: str) -> Instance:
    return Instance(
        name=_name("bwd", dtype, dims, tile, architecture),
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


FORWARD = tuple(
    _forward(dtype, dims, tile, architecture)
    for architecture in GROUPS
    for dtype in DTYPES
    for dims, tiles in FORWARD_TILES.items()
    for tile in range(len(tiles))
    if tile == 0 or architecture == "sm_80"
)
BACKWARD = tuple(
    _backward(dtype, dims, tile, architecture)
    for architecture in GROUPS
    for dtype in DTYPES
    for dims, tiles in BACKWARD_TILES.items()
    for tile in range(len(tiles))
    if tile == 0 or architecture == "sm_80"
)
HELPERS = tuple(
    helper(dtype, architecture)
    for architecture in GROUPS
    for helper in (_preprocess, _postprocess)
    for dtype in DTYPES
)
INSTANCES = (*FORWARD, *BACKWARD, *HELPERS)
