"""NVTX ranges around the library's operations, for Nsight Systems and Nsight Compute.

On with `HOPPER_ATTENTION_NVTX=1` in the environment before the import; without it functions stay as
they are, so that it costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

VARIABLE = "HOPPER_ATTENTION_NVTX"
DOMAIN = "hopper_attention"
Function = TypeVar("Function", bound=Callable)


def annotated(name: str) -> Callable[[Function], Function]:
    """A decorator: calls become ranges of that name in the domain `hopper_attention`.

    Raises ImportError if ranges are asked for and the package `nvtx` is missing.
    """
    if os.environ.get(VARIABLE, "0") in ("", "0"):
        return lambda function: function
    try:
        import nvtx
    except ImportError:
        raise ImportError(f"{VARIABLE} is set: pip install 'hopper-attention[tools]'") from None
    return nvtx.annotate(name, domain=DOMAIN)
