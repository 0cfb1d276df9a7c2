"""The list of quantisation kernels that a build can compile."""

from itertools import product

from hopper_attention.cute_kernels.conventions import DTYPES
from hopper_attention.cute_kernels.instance import Instance
from hopper_attention.cute_kernels.quantization.config import (
    QUANTIZE_COLUMNS,
    AbsMaxConfig,
    ColumnMeansConfig,
    ColumnSumsConfig,
    E5m2ToE4m3Config,
    QuantizeConfig,
    TransposeVConfig,
)


def _quantize(dtype: str, columns: int, transposed: bool) -> Instance:
    return Instance(
        name=f"quantize_{dtype}_d{columns}" + ("_arranged" if transposed else ""),
        family="quantize",
        kernel="hopper_attention.cute_kernels.quantization.quantize:Quantize",
        config=QuantizeConfig(dtype, columns, transposed),
        claims=("LDG", "F2FP", "REDUX"),
        group="fp8",
    )


def _abs_max(dtype: str, columns: int) -> Instance:
    return Instance(
        name=f"quantize_absmax_{dtype}_d{columns}",
        family="quantize_absmax",
        kernel="hopper_attention.cute_kernels.quantization.quantize:AbsMax",
        config=AbsMaxConfig(dtype, columns),
        claims=("LDG", "REDUX", "REDG"),
        group="fp8",
    )


def _column_sums(dtype: str) -> Instance:
    return Instance(
        name=f"quantize_sums_{dtype}",
        family="quantize_sums",
        kernel="hopper_attention.cute_kernels.quantization.column_means:ColumnSums",
        config=ColumnSumsConfig(dtype),
        claims=("LDG",),
        group="fp8",
    )


def _column_means() -> Instance:
    return Instance(
        name="quantize_means",
        family="quantize_means",
        kernel="hopper_attention.cute_kernels.quantization.column_means:ColumnMeans",
        config=ColumnMeansConfig(),
        claims=("LDG",),
        group="fp8",
    )


def _e5m2_to_e4m3(columns: int, transposed: bool) -> Instance:
    return Instance(
        name=f"narrow_d{columns}" + ("_arranged" if transposed else ""),
        family="narrow",
        kernel="hopper_attention.cute_kernels.quantization.e5m2_to_e4m3:E5m2ToE4m3",
        config=E5m2ToE4m3Config(columns, transposed),
        claims=("LDG", "F2FP", "REDUX"),
        group="fp8",
    )


def _transpose_v(by_columns: bool) -> Instance:
    kind = "Columns" if by_columns else "Rows"
    return Instance(
        name=f"arrange_{kind.lower()}",
        family="arrange",
        kernel=f"hopper_attention.cute_kernels.quantization.transpose_v:Transpose{kind}",
        config=TransposeVConfig(by_columns),
        claims=("LDG", "PRMT", "STG"),
        group="fp8",
    )


# Recipe, rotation, centring and lengths are arguments.
INSTANCES = (
    *(_quantize(*which) for which in product(DTYPES, QUANTIZE_COLUMNS, (False, True))),
    *(_abs_max(*which) for which in product(DTYPES, QUANTIZE_COLUMNS)),
    *(_column_sums(dtype) for dtype in DTYPES),
    _column_means(),
    # Heads of 64 take the next tile, at about 0.6 of a copy's speed.
    *(_e5m2_to_e4m3(*which) for which in product((128, 256), (False, True))),
    *(_transpose_v(by_columns) for by_columns in (False, True)),
)
