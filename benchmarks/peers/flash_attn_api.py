"""Packages with flash-attn's functions: hopper-attention itself, and flash-attn-4."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from hopper_attention.benchmarks.peers.common import (
    refuse_if,
    require,
    with_backward,
    without_support,
)
from torch import Tensor

from hopper_attention import backend
from hopper_attention.bench.measure.inputs import Inputs
from hopper_attention.bench.measure.runner import Prepared
from hopper_attention.dispatch import target

REFUSALS = (ValueError, TypeError, AssertionError)
"""Errors that these packages raise for shapes and arguments that they do not have."""


@dataclass(frozen=True)
class FlashAttnApi:
    name: str
    module: str
    dtypes: tuple[str, ...]
    backend: str | None = None
    """The backend of ours that is forced."""

    def prepare(self, inputs: Inputs) -> Prepared:
        problem = inputs.problem
        refuse_if(problem.dtype not in self.dtypes, f"no {problem.dtype} on sm_90")
        attend = forward(require(self.module), inputs)
        if self.backend is not None:
            attend = _forced(self.backend, attend)
        without_support(attend, *REFUSALS)
        instance = _instance(inputs, self.backend) if self.module == "hopper_attention" else ""
        return Prepared(with_backward(inputs, attend), instance)


def forward(api: ModuleType, inputs: Inputs) -> Callable[[], Tensor]:
    """A call of the function of `api` that the problem takes."""
    problem = inputs.problem
    keywords: dict[str, Any] = {"causal": problem.causal}
    if problem.window >= 0:
        keywords["window_size"] = (problem.window, 0 if problem.causal else None)
    if problem.softcap:
        keywords["softcap"] = problem.softcap
    if inputs.sink is not None:
        keywords["learnable_sink"] = inputs.sink
    name = "flash_attn_func"
    if inputs.cu_seqlens is not None:
        name = "flash_attn_varlen_func"
        keywords |= {"cu_seqlens_q": inputs.cu_seqlens, "cu_seqlens_k": inputs.cu_seqlens}
        keywords |= {"max_seqlen_q": problem.seqlen, "max_seqlen_k": problem.seqlen}
    elif inputs.page_table is not None:
        name = "flash_attn_with_kvcache"
        lengths = torch.full((problem.batch,), problem.seqlen, dtype=torch.int32)
        keywords |= {"cache_seqlens": lengths.to(inputs.q.device)}
        keywords |= {"page_table": inputs.page_table}
    function = getattr(api, name, None)
    refuse_if(function is None, f"{api.__name__} has no {name}")
    assert function is not None

    def attend() -> Tensor:
        result = function(inputs.q, inputs.k, inputs.v, **keywords)
        return result[0] if isinstance(result, tuple) else result

    return attend


def _forced(name: str, attend: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Gradients run on what forward ran on."""

    def attend_so() -> Tensor:
        with backend(name):
            return attend()

    return attend_so


def _instance(inputs: Inputs, forced: str | None) -> str:
    """The one that dispatch takes; empty where no instance of ours would be timed."""
    with backend(forced) if forced else nullcontext():
        try:
            return inputs.problem.instance(target.target_for(inputs.q))
        except NotImplementedError:
            return ""
