"""Exact attention for NVIDIA Hopper and Ampere GPUs, with flash-attn's call signatures.

Tensors on such a GPU go to the compiled kernels; tensors on the CPU go to the reference
implementation, or, inside `simulator.enabled()`, to the same kernels on a functional simulator.
Which kernels: selection.

The way of a call: functional (signatures, arguments), ops (operator, or past it: watched), plan
(what is checked and kept for all calls of one kind; dispatch names the instance), forward and
backward (results, workspace, launches; or reference), runtime (the extension).  Of FP8 it is fp8,
ops_fp8, quantize, forward_fp8.
"""

from importlib.metadata import version

from hopper_attention import ops_fp8 as ops_fp8  # registers the operators
from hopper_attention import simulator
from hopper_attention.fp8 import attention_fp8
from hopper_attention.functional import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from hopper_attention.integrations.sdpa import disable_sdpa, enable_sdpa
from hopper_attention.selection import backend

__version__ = version("hopper-attention")

__all__ = [
    "__version__",
    "attention_fp8",
    "backend",
    "disable_sdpa",
    "enable_sdpa",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "simulator",
]
