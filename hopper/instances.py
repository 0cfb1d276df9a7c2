"""The list of attention kernels for sm_90a that a build can compile."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

from hopper_attention.cute_kernels.backward.config import PreprocessConfig
from hopper_attention.cute_kernels.conventions import DTYPES
from hopper_attention.cute_kernels.instance import Instance
from hopper_attention.hopper.backward.config import (
    BACKWARD_TILES,
    LATE_DQ,
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
CODES = ((64, 64), (128, 128))
"""(head_dim, head_dim_v) that have kernels without exponentials."""
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
    problem = (dtype, *dims, mask, softcap, varlen)
    if dims in WIDE_BACKWARD:
        kernel, config = "kernel_wide:BackwardWide", WideBackwardConfig(*problem)
    else:
        late_dq = dims in LATE_DQ and not softcap
        kernel = "kernel:Backward"
        config = BackwardConfig(*problem, BACKWARD_TILES[dims], late_dq=late_dq)
    return Instance(
        name=_name("bwd", dtype, dims, mask, softcap, varlen),
        family="backward",
        kernel=f"hopper_attention.hopper.backward.{kernel}",
        config=config,
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
    dims: tuple[int, int],
    mask: str,
    softcap: bool,
    varlen: bool,
    two_level: bool,
    codes: bool = False,
) -> Instance:
    tiles = (FP8_TWO_LEVEL_TILES if two_level else FP8_TILES)[dims]
    kinds = ("full", "causal", "local", "softcap")
    upto = kinds.index("softcap" if softcap else mask) + 1
    keys = product(kinds[:upto], ("", "_varlen") if varlen else ("",))
    tile = [tiles["".join(key)] for key in keys if "".join(key) in tiles][-1]
    problem = ("e4m3", *dims, mask, softcap, varlen, *tile)
    return Instance(
        name=_name("fwd", "e4m3", dims, mask, softcap, varlen)
        + ("_codes" if codes else "")
        + ("_two_level" if two_level else ""),
        family="forward_fp8",
        kernel="hopper_attention.hopper.forward.kernel_fp8:ForwardFp8",
        config=ForwardFp8Config(*problem, two_level=two_level, codes=codes),
        claims=("QGMMA", "UTMALDG"),
        group="fp8",
    )


def _each(make: Callable[..., Instance], *axes: Iterable[Any]) -> tuple[Instance, ...]:
    """Return `make` of every combination of `axes`, of VARIANTS, and of dense and packed ones."""
    return tuple(
        make(*which, mask, softcap, varlen)
        for which in product(*axes)
        for mask, softcap in VARIANTS
        for varlen in (False, True)
    )


FORWARD = _each(_forward, DTYPES, FORWARD_TILES)
FP8 = (
    *_each(partial(_forward_fp8, two_level=False), FP8_TILES),
    *_each(partial(_forward_fp8, two_level=True), FP8_TWO_LEVEL_TILES),
)
FP8_CODES = tuple(
    _forward_fp8(dims, mask, False, varlen, two_level, codes=True)
    for dims, mask, varlen, two_level in product(
        CODES, ("full", "causal"), (False, True), (False, True)
    )
)
BACKWARD = _each(_backward, DTYPES, BACKWARD_TILES)
WIDE = _each(_backward, DTYPES, WIDE_BACKWARD)
# One postprocessing kernel serves all backward kernels with the same dQ: by head dim.
DQ_TILES = {dims[0]: tile_m for dims, tile_m in BACKWARD_TILES.items()}
DQ_TILES |= {i.config.head_dim: i.config.tile_m for i in WIDE}
INSTANCES = (
    *FORWARD,
    *FP8,
    *FP8_CODES,
    *BACKWARD,
    *WIDE,
    *(_preprocess(dtype) for dtype in DTYPES),
    *(_postprocess(dtype, *tile) for dtype in DTYPES for tile in DQ_TILES.items()),
)
