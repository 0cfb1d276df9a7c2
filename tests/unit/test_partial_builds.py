"""Builds of some kernels: CPU tensors need none; refusals name the least build that would do."""

from __future__ import annotations

import functools
from fnmatch import fnmatchcase

import pytest
import torch

from hopper_attention import (
    attention_fp8,
    backend,
    flash_attn_func,
    flash_attn_varlen_func,
    quantize,
    simulator,
)
from hopper_attention.dispatch import instances, manifest, plan, target
from hopper_attention.launch import backward

DEMO = "fwd_bf16_d128_causal"
SEQUENCES = torch.tensor([0, 3, 9], dtype=torch.int32)


@pytest.fixture
def build_of(monkeypatch):
    """Makes the library believe that only instances of these names were compiled."""
    cached = [
        f
        for module in (instances, plan, target)
        for f in vars(module).values()
        if isinstance(f, functools._lru_cache_wrapper)
    ]

    def believe(*patterns: str) -> None:
        found = {
            name: known
            for name, known in manifest.instances().items()
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        monkeypatch.setattr(manifest, "instances", lambda: found)
        for function in cached:
            function.cache_clear()

    yield believe
    monkeypatch.undo()
    for function in cached:
        function.cache_clear()


def tensors(head_dim=64, heads=2, rows=(1, 9), dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shape = (3, *rows, heads, head_dim)
    return [x.requires_grad_() for x in torch.randn(shape, generator=generator).to(dtype)]


CALLS = {
    "dense": lambda: flash_attn_func(*tensors()),
    "wide": lambda: flash_attn_func(*tensors(256), causal=True, softcap=20.0),
    "fp16": lambda: flash_attn_func(*tensors(dtype=torch.float16), window_size=(3, 2)),
    "packed": lambda: flash_attn_varlen_func(*tensors(rows=(9,)), SEQUENCES, SEQUENCES, 6, 6),
    "gqa": lambda: flash_attn_func(tensors(heads=4)[0], *tensors()[1:], pack_gqa=True),
    "fp8": lambda: attention_fp8(*tensors(), hadamard=True),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("build", [(DEMO,), ("ampere_*d64*",), ()], ids=["demo", "ampere", "none"])
def test_cpu_tensors_need_no_kernel(build_of, build, call):
    """Forward and backward are the reference's, as where everything was compiled."""
    expected = CALLS[call]()
    build_of(*build)
    out = CALLS[call]()
    assert torch.equal(out, expected)
    out.float().sum().backward()


def test_cpu_tensors_of_fp8_need_no_kernel(build_of):
    q, k, v = (x.detach().to(torch.float8_e4m3fn) for x in tensors())
    expected = flash_attn_func(q, k, v)
    build_of(DEMO)
    assert torch.equal(flash_attn_func(q, k, v), expected)


def test_workspace_bytes_need_no_kernel(build_of):
    q = tensors(256)[0]
    expected = backward.workspace_bytes(q, q, deterministic=True)
    build_of(DEMO)
    assert backward.workspace_bytes(q, q, deterministic=True) == expected


@pytest.mark.parametrize(
    ("call", "groups"),
    [
        (CALLS["dense"], "core"),
        (CALLS["fp16"], "core"),
        (CALLS["fp8"], "core,fp8"),
        (lambda: quantize.quantize(tensors()[0].detach(), "block64"), "core,fp8"),
        (lambda: flash_attn_func(*tensors(128), causal=True), "core"),
    ],
    ids=["dense", "fp16", "fp8", "quantize", "backward"],
)
def test_the_simulator_names_the_least_build(build_of, call, groups):
    build_of(DEMO)
    message = rf"this build has no .* HOPPER_ATTENTION_INSTANCES={groups}, or use CPU tensors"
    with simulator.enabled(), pytest.raises(NotImplementedError, match=message):
        call()


def test_other_groups_are_kept(build_of):
    build_of("ampere_*")
    q = tensors()[0].detach()
    refusal = pytest.raises(NotImplementedError, match="INSTANCES=fp8,ampere,")
    with backend("hopper"), simulator.enabled(), refusal:
        attention_fp8(q, q, q)
    with (
        backend("hopper"),
        simulator.enabled(),
        pytest.raises(NotImplementedError, match="INSTANCES=core,ampere,"),
    ):
        flash_attn_func(q, q, q)


def test_what_is_compiled_runs(build_of):
    """With the least tile that was compiled, though the lists have a smaller one."""
    build_of(DEMO)
    assert instances.forward_instance("bf16", 40, 64, "causal", False, False) == DEMO
    with pytest.raises(instances.NotCompiled, match="head_dim 256"):
        instances.forward_instance("bf16", 256, 256, "causal", False, False)


def test_what_no_build_has_is_refused_on_the_cpu_as_well(build_of):
    build_of(DEMO)
    with pytest.raises(NotImplementedError, match=r"no forward_fp8 kernel.*nearest: 128/128"):
        attention_fp8(*tensors(256), two_level=True)


@pytest.mark.parametrize("name", list(manifest.instances())[::7])
def test_lists_have_every_compiled_instance(name):
    compiled, listed = manifest.instances()[name], manifest.listed()[name]
    assert compiled.family == listed.family and compiled.architecture == listed.architecture
    assert compiled.shared_memory_bytes == listed.config.shared_memory_bytes
    assert compiled.config == {field: getattr(listed.config, field) for field in compiled.config}
