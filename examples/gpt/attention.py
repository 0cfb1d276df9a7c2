"""The implementations of attention that a model can be trained with."""

from __future__ import annotations

import enum
import inspect
import math
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from gpt.data import Packing
from gpt.model import Attend
from hopper_attention import flash_attn_func, flash_attn_varlen_func, reference
from hopper_attention.dispatch import target
from hopper_attention.problem.values import CAUSAL, Lengths

# torch 2.11 takes grouped heads without being told.
GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


class Kind(str, enum.Enum):
    HOPPER = "hopper"
    SDPA = "sdpa"
    REFERENCE = "reference"


class SdpaBackend(str, enum.Enum):
    AUTO = "auto"
    FLASH = "flash"
    CUDNN = "cudnn"


BACKENDS = {
    SdpaBackend.FLASH: SDPBackend.FLASH_ATTENTION,
    SdpaBackend.CUDNN: SDPBackend.CUDNN_ATTENTION,
}


def choose(kind: Kind, backend: SdpaBackend) -> Attend:
    if kind is Kind.HOPPER:
        return hopper
    return plain if kind is Kind.REFERENCE else Sdpa(backend)


def describe(kind: Kind, backend: SdpaBackend, device: torch.device, full: bool) -> str:
    """Say in words what will run."""
    if kind is Kind.HOPPER:
        return {
            target.Executor.CUDA: "hopper_attention's kernels on the GPU",
            target.Executor.SIMULATOR: "hopper_attention's kernels on the simulator (very slow)",
            target.Executor.REFERENCE: "flash_attn_varlen_func, which on a CPU is the reference "
            "(HOPPER_ATTENTION_SIMULATOR=1: the kernels on the simulator)",
        }[target.executor_for(torch.empty(0, device=device))]
    if kind is Kind.REFERENCE:
        return f"hopper_attention.reference, plain PyTorch in float32, on {device}"
    if packs(backend, device, full):
        return "torch.nn.attention.varlen (FlashAttention) on packed documents"
    rows = "documents of the context's length" if full else "documents padded to the context"
    chosen = "" if backend is SdpaBackend.AUTO else f", {backend.value} only"
    return f"torch's scaled_dot_product_attention on {rows}{chosen}"


def hopper(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    if packing.full:
        q, k, v = (x.unflatten(0, (-1, packing.context)) for x in (q, k, v))
        return cast(Tensor, flash_attn_func(q, k, v, causal=True)).flatten(0, 1)
    offsets, longest = packing.cu_seqlens, packing.context
    out = flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest, causal=True)
    return cast(Tensor, out)


@torch.compiler.disable  # it reads offsets on the host
def plain(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    return Plain.apply(q, k, v, packing.cu_seqlens)


class Plain(torch.autograd.Function):
    """The library's reference by name: on a GPU too, and whether or not the simulator is on."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        out, lse = reference.attention(q, k, v, **Plain.options(q, cu_seqlens))
        ctx.save_for_backward(q, k, v, cu_seqlens, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
        options = Plain.options(q, cu_seqlens)
        dq, dk, dv, _ = reference.gradients(q, k, v, dout, out=out, lse=lse, **options)
        return dq, dk, dv, None

    @staticmethod
    def options(q: Tensor, cu_seqlens: Tensor) -> dict[str, Any]:
        lengths = Lengths(cu_seqlens)
        scale = 1 / math.sqrt(q.shape[-1])
        return {"softmax_scale": scale, "mask": CAUSAL, "queries": lengths, "keys": lengths}


def packs(backend: SdpaBackend, device: torch.device, full: bool) -> bool:
    """Say whether torch's own packed attention serves: FlashAttention's, which needs a GPU."""
    return device.type == "cuda" and backend is not SdpaBackend.CUDNN and not full


class Sdpa:
    """torch's attention: packed where it can be, otherwise with every document padded.

    Padding lies behind a document, and no query looks ahead: so causal masking alone keeps it out.
    """

    def __init__(self, backend: SdpaBackend):
        self.backend = backend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        if packs(self.backend, q.device, packing.full):
            offsets, longest = packing.cu_seqlens, packing.context
            out = varlen_attn(
                q, k, v, offsets, offsets, longest, longest, window_size=(-1, 0), **GROUPED
            )
            return cast(Tensor, out)
        q, k, v = (pad(x, packing).transpose(1, 2) for x in (q, k, v))
        out = self.dense(q, k, v).transpose(1, 2).flatten(0, 1)
        return out if packing.full else out.index_select(0, packing.slots)

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(sequences, heads, context, head_dim)."""
        chosen = BACKENDS.get(self.backend)
        with nullcontext() if chosen is None else sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def pad(x: Tensor, packing: Packing) -> Tensor:
    """(tokens, heads, head_dim) to (sequences, context, heads, head_dim), behind each zeros."""
    if not packing.full:
        rows = x.new_zeros((packing.sequences * packing.context, *x.shape[1:]))
        x = rows.index_copy(0, packing.slots, x)
    return x.unflatten(0, (-1, packing.context))
