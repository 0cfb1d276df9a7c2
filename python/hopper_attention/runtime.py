"""Where kernels run: the CUDA extension for GPU tensors, the simulator's for CPU tensors."""

from __future__ import annotations

import ctypes
import enum
import functools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from hopper_attention import _cuda, _simulator, manifest, selection, simulator
from hopper_attention.arguments import Description

SIMULATED_SMS = 132
"""Of an H200."""
NO_MORE_TILES = 1 << 30
"""As a tile counter's first entry: blocks end after the tile they start with."""

COUNTER, MAX_BLOCKS = "tile_counter", "max_blocks"
"""Last arguments of kernels whose blocks do tile after tile: from a counter, or every n-th."""
NO_LIMIT = 1 << 30
REGISTERS = 1 << 16
"""Of a multiprocessor."""

_intercept: Callable[..., None] | None = None

_simulating = threading.Lock()
"""The extension has one launch handler."""


class Backend(enum.Enum):
    CUDA = "CUDA"
    SIMULATOR = "simulator"
    REFERENCE = "reference"


def backend_for(tensor: Tensor, name: str = "q") -> Backend:
    """Raises NotImplementedError for a device without kernels, or without those that are forced."""
    if selection.forced() == selection.REFERENCE:
        return Backend.REFERENCE
    if tensor.is_cuda:
        check_gpu(tensor.device)
        return Backend.CUDA
    if tensor.is_cpu:
        return Backend.SIMULATOR if simulator.is_enabled() else Backend.REFERENCE
    raise NotImplementedError(
        f"{name} is on {tensor.device}; supported: a Hopper or Ampere GPU (cuda), or the CPU for "
        "reference and simulator"
    )


def check_gpu(device: torch.device) -> None:
    """Raises NotImplementedError for one without kernels."""
    selection.of_device(device.index, selection.forced())


def launch(
    backend: Backend,
    instance: str,
    tensors: Sequence[Tensor],
    scalars: Sequence[float | int],
    pointees: Sequence[Tensor] = (),
    sm_margin: int = 0,
    described: Sequence[Description] | None = None,
) -> None:
    """Run one kernel instance on the current stream of the tensors' device, or simulate it.

    `scalars` are in the order of `scalar_names`; `pointees` are the tensors whose addresses are
    among them.  A persistent kernel has a block on every SM but `sm_margin` of them; one without a
    counter has a block for every tile, or only as many as run together on that many SMs.
    `described` are the tensors' addresses, shapes and strides, where the caller knows them.
    """
    if described is None:
        described = [(t.data_ptr(), t.shape, t.stride()) for t in tensors]
    persistent = is_persistent(instance)
    if backend is Backend.CUDA and _intercept is None:
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
        scalars = [*scalars, counter.data_ptr(), SIMULATED_SMS - sm_margin]
    elif takes_limit(instance):
        scalars = [*scalars, block_limit(instance, tensors[0], SIMULATED_SMS, sm_margin)]
    reachable = [*tensors, *pointees, counter]
    run = _Simulation(reachable).run if _intercept is None else partial(_intercept, reachable)
    with _simulating:
        _simulator.set_launch_handler(run)
        _simulator.launch(instance, 0, 0, described, scalars)


@functools.cache
def scalar_names(instance: str) -> list[str]:
    """Of the instance's arguments that are not tensors, addresses included.

    Without those that `launch` adds.
    """
    return [name for name in _all_scalar_names(instance) if name not in (COUNTER, MAX_BLOCKS)]


@functools.cache
def is_persistent(instance: str) -> bool:
    """Whether blocks take tile after tile from a counter."""
    return COUNTER in _all_scalar_names(instance)


@functools.cache
def takes_limit(instance: str) -> bool:
    """Whether there may be fewer blocks than tiles."""
    return MAX_BLOCKS in _all_scalar_names(instance)


def block_limit(instance: str, tensor: Tensor, multiprocessors: int, sm_margin: int) -> int:
    """With a margin, how many blocks run together on the other multiprocessors."""
    if sm_margin == 0:
        return NO_LIMIT
    facts, target = manifest.instances()[instance], selection.target_for(tensor)
    by_registers = REGISTERS // (facts.registers * facts.threads)
    # A multiprocessor has 1 KiB more than one block may have, and takes 1 KiB a block for itself.
    by_memory = (target.shared_memory + 1024) // (facts.shared_memory_bytes + 1024)
    return (multiprocessors - sm_margin) * max(min(by_registers, by_memory), 1)


def check_margin(tensor: Tensor, sm_margin: int) -> None:
    """Raises ValueError where no multiprocessor would be left: small GPUs, slices of a GPU."""
    device = tensor.get_device()
    count = multiprocessors(device) if tensor.is_cuda else SIMULATED_SMS
    if sm_margin >= count:
        raise ValueError(
            f"sm_margin must be below {count}, the multiprocessors of {tensor.device}; got "
            f"{sm_margin}"
        )


def _all_scalar_names(instance: str) -> list[str]:
    arguments = manifest.instances()[instance].arguments
    return [argument["name"] for argument in arguments if argument["kind"] != "tensor"]


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


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


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
    """What `torch.cuda.current_stream(device).cuda_stream` is, without making an object for it.

    Inductor's and Triton's launchers use it too.
    """
    return torch._C._cuda_getCurrentRawStream(device)


class _Simulation:
    """What the host code's launches need to become simulations: the memory of their tensors."""

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
