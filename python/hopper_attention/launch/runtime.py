"""Launches: by the CUDA extension for GPU tensors, by the simulator's for CPU tensors."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from hopper_attention import _cuda, _simulator, simulator
from hopper_attention.dispatch import manifest, target
from hopper_attention.dispatch.manifest import is_persistent, takes_limit
from hopper_attention.dispatch.target import Executor, multiprocessors
from hopper_attention.problem.memory import Description

NO_MORE_TILES = 1 << 30
"""A first entry of a tile counter with which blocks end after the tile they start with."""
NO_LIMIT = 1 << 30
REGISTERS = 1 << 16
"""Registers of a multiprocessor."""
_intercept: Callable[..., None] | None = None
_simulating = threading.Lock()
"""The extension has one launch handler."""


def launch(
    executor: Executor,
    instance: str,
    tensors: Sequence[Tensor],
    scalars: Sequence[float | int],
    pointees: Sequence[Tensor] = (),
    sm_margin: int = 0,
    described: Sequence[Description] | None = None,
) -> None:
    """Run one kernel instance on the current stream of the tensors' device, or simulate it.

    `scalars` are in the order of `manifest.arguments`; `pointees` are the tensors whose addresses
    are among them.  A persistent kernel has a block on every SM but `sm_margin` of them; one
    without a counter has a block for every tile, or only as many as run together on that many SMs.
    `described` are the tensors' addresses, shapes and strides, where the caller knows them.
    """
    if described is None:
        described = [(t.data_ptr(), t.shape, t.stride()) for t in tensors]
    persistent = is_persistent(instance)
    if executor is Executor.CUDA and _intercept is None:
        device = tensors[0].get_device()
        stream = current_stream(device)
        if persistent:
            counter = tile_counter(device, stream)
            scalars = [*scalars, counter.data_ptr(), multiprocessors(device) - sm_margin]
        elif takes_limit(instance):
            limit = block_limit(instance, tensors[0], multiprocessors(device), sm_margin)
            scalars = [*scalars, limit]
        _cuda.launch(instance, device, stream, described, scalars)
        return
    counter = simulated_counter(tensors[0].device)
    if persistent:
        scalars = [*scalars, counter.data_ptr(), target.SIMULATED_SMS - sm_margin]
    elif takes_limit(instance):
        scalars = [*scalars, block_limit(instance, tensors[0], target.SIMULATED_SMS, sm_margin)]
    reachable = [*tensors, *pointees, counter]
    run = _Simulation(reachable).run if _intercept is None else partial(_intercept, reachable)
    with _simulating:
        _simulator.set_launch_handler(run)
        _simulator.launch(instance, 0, 0, described, scalars)


def block_limit(instance: str, tensor: Tensor, multiprocessors: int, sm_margin: int) -> int:
    """With a margin, how many blocks run together on the other multiprocessors."""
    if sm_margin == 0:
        return NO_LIMIT
    facts, shared_memory = manifest.instances()[instance], target.target_for(tensor).shared_memory
    by_registers = REGISTERS // (facts.registers * facts.threads)
    # A multiprocessor has 1 KiB more than one block may have, and takes 1 KiB a block for itself.
    by_memory = (shared_memory + 1024) // (facts.shared_memory_bytes + 1024)
    return (multiprocessors - sm_margin) * max(min(by_registers, by_memory), 1)


_counters: dict[tuple[int, int], Tensor] = {}


def tile_counter(device: int, stream: int) -> Tensor:
    """Two int32, zero: launches leave it so, and those of a stream run one after another.

    A captured graph may be replayed beside anything, so it gets one of its own.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=torch.device("cuda", device))
    counter = _counters.get((device, stream))
    if counter is None:
        counter = torch.zeros(2, dtype=torch.int32, device=torch.device("cuda", device))
        _counters[device, stream] = counter
    return counter


def simulated_counter(device: torch.device) -> Tensor:
    """A new one a launch: a kernel that failed would leave it anyhow."""
    return torch.zeros(2, dtype=torch.int32, device=device)


@contextmanager
def intercepted(handler: Callable[..., None]) -> Iterator[None]:
    """Inside, launches run the instance's host code only, for GPU tensors too.

    What it asks for goes to `handler`: the tensors in reach, the tile counter last, then kernel,
    grid, block, cluster, bytes of shared memory and the addresses of the parameters, which hold
    during the call.
    """
    global _intercept
    _intercept = handler
    try:
        yield
    finally:
        _intercept = None


def current_stream(device: int) -> int:
    """Return `torch.cuda.current_stream(device).cuda_stream` without making an object for it.

    Inductor's and Triton's launchers use it too.
    """
    return torch._C._cuda_getCurrentRawStream(device)


class _Simulation:
    """The memory of a launch's tensors, and the handler that simulates the kernel on it."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.memory = simulator.GlobalMemory()
        for index, tensor in enumerate(tensors):
            if tensor.numel() > 0:
                reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
                nbytes = (reach + 1) * tensor.element_size()
                self.memory.register(tensor.data_ptr(), nbytes, f"argument {index}")

    def run(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        cluster: tuple[int, int, int],
        shared_memory_bytes: int,
        parameter_addresses: list[int],
    ) -> None:
        module = simulator.Module.load(manifest.ptx_path(re.sub(r"_\d+$", "", kernel)))
        parameters = [
            ctypes.string_at(address, parameter.size)
            for address, parameter in zip(
                parameter_addresses, module.kernels[kernel].params, strict=True
            )
        ]
        simulator.launch(
            module,
            kernel,
            grid=grid,
            block=block,
            params=parameters,
            memory=self.memory,
            cluster=cluster,
            shared_memory_bytes=shared_memory_bytes,
        )
