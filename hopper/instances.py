"""The list of sm_90a kernels that are compiled: the build and the dispatcher have no other."""

from itertools import product

from hopper_attention.cute_kernels.instance import Instance
from hopper_attention.hopper.config import (
    BACKWARD_TILES,
    DTYPES,
    FORWARD_TILES,
    FP8_TILES,
    FP8_TWO_LEVEL_TILES,
    QUANTIZE_COLUMNS,
    AbsMaxConfig,
    ArrangeConfig,
    BackwardConfig,
    ColumnMeansConfig,
    ColumnSumsConfig,
    ForwardConfig,
    ForwardFp8Config,
    NarrowConfig,
    PostprocessConfig,
    PreprocessConfig,
    QuantizeConfig,
    WideBackwardConfig,
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
        kernel="hopper_attention.hopper.forward:Forward",
        config=ForwardConfig(dtype, *dims, mask, softcap, varlen, tile_m, tile_n),
    )


def _backward(
    dtype: str, dims: tuple[int, int], mask: str, softcap: bool, varlen: bool
) -> Instance:
    return Instance(
        name=_name("bwd", dtype, dims, mask, softcap, varlen),
        family="backward",
        kernel="hopper_attention.hopper.backward:Backward",
        config=BackwardConfig(dtype, *dims, mask, softcap, varlen, BACKWARD_TILES[dims]),
        claims=("HGMMA", "UTMALDG", "REDG"),
    )


def _wide_backward(
    dtype: str, dims: tuple[int, int], mask: str, softcap: bool, varlen: bool
) -> Instance:
    return Instance(
        name=_name("bwd", dtype, dims, mask, softcap, varlen),
        family="backward",
        kernel="hopper_attention.hopper.backward_wide:BackwardWide",
        config=WideBackwardConfig(dtype, *dims, mask, softcap, varlen),
        claims=("HGMMA", "UTMALDG", "REDG"),
    )


def _preprocess(dtype: str) -> Instance:
    return Instance(
        name=f"bwd_pre_{dtype}",
        family="backward_preprocess",
        kernel="hopper_attention.hopper.preprocess:Preprocess",
        config=PreprocessConfig(dtype),
        claims=("LDG",),
    )


def _postprocess(dtype: str, head_dim: int, tile_m: int) -> Instance:
    return Instance(
        name=f"bwd_post_{dtype}_d{head_dim}",
        family="backward_postprocess",
        kernel="hopper_attention.hopper.postprocess:Postprocess",
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
        kernel="hopper_attention.hopper.forward_fp8:ForwardFp8",
        config=ForwardFp8Config("e4m3", *dims, mask, softcap, varlen, *tile, two_level=two_level),
        claims=("QGMMA", "UTMALDG"),
        group="fp8",
    )


def _quantize(dtype: str, columns: int, arranged: bool) -> Instance:
    return Instance(
        name=f"quantize_{dtype}_d{columns}" + ("_arranged" if arranged else ""),
        family="quantize",
        kernel="hopper_attention.cute_kernels.quantize:Quantize",
        config=QuantizeConfig(dtype, columns, arranged),
        claims=("LDG", "F2FP", "REDUX"),
        group="fp8",
    )


def _abs_max(dtype: str, columns: int) -> Instance:
    return Instance(
        name=f"quantize_absmax_{dtype}_d{columns}",
        family="quantize_absmax",
        kernel="hopper_attention.cute_kernels.quantize:AbsMax",
        config=AbsMaxConfig(dtype, columns),
        claims=("LDG", "REDUX", "REDG"),
        group="fp8",
    )


def _column_sums(dtype: str) -> Instance:
    return Instance(
        name=f"quantize_sums_{dtype}",
        family="quantize_sums",
        kernel="hopper_attention.cute_kernels.column_means:ColumnSums",
        config=ColumnSumsConfig(dtype),
        claims=("LDG",),
        group="fp8",
    )


def _column_means() -> Instance:
    return Instance(
        name="quantize_means",
        family="quantize_means",
        kernel="hopper_attention.cute_kernels.column_means:ColumnMeans",
        config=ColumnMeansConfig(),
        claims=("LDG",),
        group="fp8",
    )


def _narrow(columns: int, arranged: bool) -> Instance:
    return Instance(
        name=f"narrow_d{columns}" + ("_arranged" if arranged else ""),
        family="narrow",
        kernel="hopper_attention.cute_kernels.narrow:Narrow",
        config=NarrowConfig(columns, arranged),
        claims=("LDG", "F2FP", "REDUX"),
        group="fp8",
    )


def _arrange(by_columns: bool) -> Instance:
    kind = "Columns" if by_columns else "Rows"
    return Instance(
        name=f"arrange_{kind.lower()}",
        family="arrange",
        kernel=f"hopper_attention.cute_kernels.arrange:Arrange{kind}",
        config=ArrangeConfig(by_columns),
        claims=("LDG", "PRMT", "STG"),
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
# Recipe, rotation, centring and lengths are arguments.
QUANTIZE = (
    *(_quantize(*which) for which in product(DTYPES, QUANTIZE_COLUMNS, (False, True))),
    *(_abs_max(*which) for which in product(DTYPES, QUANTIZE_COLUMNS)),
    *(_column_sums(dtype) for dtype in DTYPES),
    _column_means(),
    # Heads of 64 take the next tile, at about 0.6 of a copy's speed.
    *(_narrow(*which) for which in product((128, 256), (False, True))),
    *(_arrange(by_columns) for by_columns in (False, True)),
)
INSTANCES = (
    *FORWARD,
    *FP8,
    *BACKWARD,
    *WIDE,
    *(_preprocess(dtype) for dtype in DTYPES),
    *(_postprocess(dtype, *tile) for dtype in DTYPES for tile in DQ_TILES.items()),
    *QUANTIZE,
)
