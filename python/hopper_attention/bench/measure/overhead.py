"""Time from the Python call of a function to the kernel's launch, without a GPU.

The call takes a GPU call's path with CPU tensors: argument checks, dispatch, allocation of the
results, marshalling, and the instance's exported host code with its tensor maps and launch
configuration.  The launch itself ends in an empty handler.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from hopper_attention import _simulator, flash_attn_func
from hopper_attention.bench.data.statistics import Summary
from hopper_attention.dispatch import plan, target
from hopper_attention.launch import runtime

CALLS = 1000
"""A sample is the mean of that many calls."""

SHAPES = {
    "batch 2, 128 tokens, 32/8 heads, d128": (2, 128, 32, 8, 128),
    "batch 1, 128 tokens, 16/16 heads, d64": (1, 128, 16, 16, 64),
}
"""(batch, seqlen, heads, heads_kv, head_dim): small, because the CPU's allocator asks the operating
system for large tensors, which a GPU's caching allocator does not."""

INCLUDED = (
    "argument checks and normalisation",
    "dispatch to an instance",
    "allocation of out and lse (the CPU's allocator)",
    "packing of addresses, shapes and strides",
    "the instance's host code: tensor maps, launch configuration",
)
NOT_INCLUDED = (
    "the driver's launch (cudaLaunchKernelExC)",
    "looking up the current stream, device and tile counter",
    "the GPU's caching allocator in place of the CPU's",
)


@contextmanager
def null_launches() -> Iterator[None]:
    """Inside, calls on CPU tensors go where calls on GPU tensors go, up to the launch."""
    launch, counter = _simulator.launch, torch.zeros(2, dtype=torch.int32)

    def launch_on_device_0(name: str, _device: int, stream: int, *arguments: Any) -> None:
        launch(name, 0, stream, *arguments)  # a CPU tensor's index is -1

    _simulator.set_launch_handler(lambda *_: None)
    try:
        with (
            mock.patch.multiple(plan, executor_for=lambda _tensor: target.Executor.CUDA),
            mock.patch.multiple(
                runtime,
                current_stream=lambda _device: 0,
                multiprocessors=lambda _device: target.SIMULATED_SMS,
                tile_counter=lambda *_: counter,
                _cuda=SimpleNamespace(launch=launch_on_device_0),
            ),
        ):
            yield
    finally:
        _simulator.set_launch_handler(None)


def measure(repeats: int = 30) -> dict[str, Any]:
    """Calls in this process, imports and first calls in fresh ones; what `--json` prints.

    Times are in microseconds a call and in milliseconds for `import` and `first_call`.
    """
    return {
        "call_us": {name: _summary(call_samples(shape, repeats)) for name, shape in SHAPES.items()},
        "start_ms": _start_times(max(repeats // 10, 3)),
        "included": INCLUDED,
        "not_included": NOT_INCLUDED,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }


def call_samples(shape: tuple[int, int, int, int, int], repeats: int) -> list[float]:
    """Microseconds a call of causal `flash_attn_func`, `repeats` times the mean of CALLS."""
    batch, seqlen, heads, heads_kv, head_dim = shape
    q, k, v = (
        torch.empty(batch, seqlen, n, head_dim, dtype=torch.bfloat16)
        for n in (heads, heads_kv, heads_kv)
    )
    samples = []
    with null_launches(), torch.no_grad():
        for repeat in range(repeats + 1):
            started = time.perf_counter()
            for _ in range(CALLS):
                flash_attn_func(q, k, v, causal=True)
            if repeat > 0:  # the first warms up
                samples.append((time.perf_counter() - started) / CALLS * 1e6)
    return samples


FRESH_PROCESS = """
import json, time
import torch
times = [time.perf_counter()]
import hopper_attention
times.append(time.perf_counter())
from hopper_attention.bench.measure import overhead
times.append(time.perf_counter())
q = torch.empty(1, 128, 8, 128, dtype=torch.bfloat16)
with overhead.null_launches():
    times.append(time.perf_counter())
    hopper_attention.flash_attn_func(q, q, q, causal=True)
    times.append(time.perf_counter())
print(json.dumps({"import": times[1] - times[0], "first_call": times[4] - times[3]}))
"""


def _start_times(repeats: int) -> dict[str, dict[str, float]]:
    """Time `import hopper_attention` after torch's, and the first call, with a null launch."""
    runs = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", FRESH_PROCESS], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(repeats)
    ]
    return {name: _summary([1e3 * run[name] for run in runs]) for name in runs[0]}


def _summary(samples: list[float]) -> dict[str, float]:
    summary = Summary.of(samples)
    return {"median": summary.median, "spread": summary.spread, "minimum": summary.minimum}
