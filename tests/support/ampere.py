"""Ampere's instances, and calls that lead to them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hopper_attention import backend
from hopper_attention.dispatch import manifest, target
from hopper_attention.launch import runtime
from support.problems import Arguments

VARIANTS = ("full", "causal", "local", "softcap")
"""Ways through one instance."""


def instances(family: str, architecture: str = "sm_80", dtype: str = "") -> list[str]:
    return [
        name
        for name, i in manifest.instances().items()
        if i.family == family and i.architecture == architecture and dtype in i.config["dtype"]
    ]


def arguments_for(variant: str, window: Arguments) -> Arguments:
    """Arguments of the public function for a variant; the window is for "local" and "softcap"."""
    return {
        "full": {},
        "causal": {"causal": True},
        "local": window,
        "softcap": window | {"softcap": 15.0},
    }[variant]


@contextlib.contextmanager
def device_of(monkeypatch: pytest.MonkeyPatch, instance: str) -> Iterator[None]:
    """Calls inside run on the GPU that the instance is for."""
    sm90 = manifest.instances()[instance].architecture == "sm_90"
    capability = (9, 0) if sm90 else (8, 6) if "_small" in instance else (8, 0)
    monkeypatch.setitem(target.SIMULATED, "ampere", capability)
    with backend("ampere"):
        yield


def launched(call: Callable[[], Any]) -> list[str]:
    """The instances that a call launches."""
    kernels: list[str] = []
    with runtime.intercepted(lambda _tensors, kernel, *_: kernels.append(kernel)):
        call()
    return [kernel.removesuffix("_0") for kernel in kernels]
