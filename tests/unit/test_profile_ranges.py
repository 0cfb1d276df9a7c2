"""NVTX ranges: nothing by default, ranges around operations when asked for."""

import os
import subprocess
import sys

import pytest

from hopper_attention import nvtx

PROGRAM = """
import sys, types

class annotate:
    def __init__(self, name, domain):
        self.name, self.domain = name, domain
    def __call__(self, function):
        def inside(*arguments):
            print("push", self.domain, self.name)
            result = function(*arguments)
            print("pop", self.name)
            return result
        return inside

sys.modules["nvtx"] = types.SimpleNamespace(annotate=annotate)
import torch, hopper_attention
q = torch.randn(1, 16, 2, 64, dtype=torch.bfloat16)
print(hopper_attention.flash_attn_func(q, q, q).shape)
"""


def run(value):
    environment = {**os.environ, nvtx.VARIABLE: value}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_ranges_around_forward():
    shape = "torch.Size([1, 16, 2, 64])"
    assert run("1") == ["push hopper_attention forward", "pop forward", shape]
    assert run("0") == [shape]


def test_off_is_the_function_itself(monkeypatch):
    monkeypatch.delenv(nvtx.VARIABLE, raising=False)
    function = object()
    assert nvtx.annotated("forward")(function) is function


def test_the_real_package(monkeypatch):
    pytest.importorskip("nvtx")
    monkeypatch.setenv(nvtx.VARIABLE, "1")

    @nvtx.annotated("test")
    def double(x):
        return 2 * x

    assert double(3) == 6


def test_asked_for_but_missing(monkeypatch):
    monkeypatch.setenv(nvtx.VARIABLE, "1")
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(ImportError, match="HOPPER_ATTENTION_NVTX is set: pip install"):
        nvtx.annotated("forward")
