"""Exact attention for NVIDIA Hopper and Ampere GPUs, with flash-attn's call signatures.

Tensors on such a GPU go to the compiled kernels; tensors on the CPU go to the reference
implementation, or, inside `simulator.enabled()`, to the same kernels on a functional simulator.
Which kernels: dispatch/target.py.

A call passes through functional or fp8 (signatures), torch_ops (the operator, or past it), dispatch
(the plan of all calls of one kind: what problem checks, and the kernel's instance) and launch
(results, workspaces, the extension), or reference.  Files and layers: docs/architecture.md.
"""

from importlib.metadata import version

from hopper_attention import arguments as arguments  # for one version: see CHANGELOG.md
from hopper_attention import backward as backward
from hopper_attention import quantize as quantize
from hopper_attention import simulator
from hopper_attention.dispatch.target import backend
from hopper_attention.fp8 import attention_fp8
from hopper_attention.functional import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from hopper_attention.integrations.sdpa import disable_sdpa, enable_sdpa
from hopper_attention.launch.backward import workspace_bytes

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
    "workspace_bytes",
]
