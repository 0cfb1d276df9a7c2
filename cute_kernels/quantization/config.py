"""Configurations of the quantisation kernels.

Free of imports from the CuTe DSL; see `cute_kernels/instance.py`.
"""

from dataclasses import dataclass

from hopper_attention.cute_kernels.conventions import DTYPES

QUANTIZE_COLUMNS = (64, 128, 256)
"""Tiles of the quantisation kernels; smaller heads leave lanes idle, which memory hides."""


@dataclass(frozen=True)
class AbsMaxConfig:
    """Greatest magnitudes of heads of at most `columns` columns."""

    dtype: str
    columns: int

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES, self.dtype
        assert self.columns in QUANTIZE_COLUMNS, self.columns

    threads: int = 256
    shared_memory_bytes: int = 32


@dataclass(frozen=True)
class QuantizeConfig:
    """FP8 from heads of at most `columns` columns."""

    dtype: str
    columns: int
    transposed: bool
    """True: in the layout of V that the FP8 forward kernel reads; false: as the rows lie."""

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES, self.dtype
        assert self.columns in QUANTIZE_COLUMNS, self.columns

    @property
    def threads(self) -> int:
        return 256

    @property
    def shared_memory_bytes(self) -> int:
        return 32 + (128 * self.columns if self.transposed else 0)


@dataclass(frozen=True)
class E5m2ToE4m3Config:
    """e4m3 from e5m2, of heads of at most `columns` columns."""

    columns: int
    transposed: bool
    """Like `QuantizeConfig`'s."""

    def __post_init__(self) -> None:
        assert self.columns in QUANTIZE_COLUMNS, self.columns

    @property
    def threads(self) -> int:
        return 256

    @property
    def shared_memory_bytes(self) -> int:
        return 32 + (128 * self.columns if self.transposed else 0)


@dataclass(frozen=True)
class ColumnSumsConfig:
    """Sums of 256 rows, any head dim."""

    dtype: str

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES, self.dtype

    threads: int = 256
    shared_memory_bytes: int = 8192


@dataclass(frozen=True)
class ColumnMeansConfig:
    """Means from those sums."""

    threads: int = 256
    shared_memory_bytes: int = 8192


@dataclass(frozen=True)
class TransposeVConfig:
    """V^T from V in e4m3, any head dim."""

    by_columns: bool
    """True if V's columns lie together; false: its rows."""

    threads: int = 256

    @property
    def shared_memory_bytes(self) -> int:
        return 0 if self.by_columns else 128 * 64
