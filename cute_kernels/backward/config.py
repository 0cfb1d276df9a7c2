"""The configuration of the kernel before backward.

Free of imports from the CuTe DSL; see `cute_kernels/instance.py`.
"""

from dataclasses import dataclass

from hopper_attention.cute_kernels.conventions import DTYPES


@dataclass(frozen=True)
class PreprocessConfig:
    """Statistics of query rows, any head dim."""

    dtype: str

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES, self.dtype

    threads: int = 256
    shared_memory_bytes: int = 0
