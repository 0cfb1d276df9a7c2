"""Timelines of a block's warps: by stamps on a GPU, by the simulator's model without one."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hopper_attention
from hopper_attention import simulator
from hopper_attention.bench.measure.inputs import Inputs
from hopper_attention.benchmarks.peers import flash_attn_api
from hopper_attention.benchmarks.peers.common import with_backward
from hopper_attention.dispatch import manifest
from hopper_attention.launch import runtime
from hopper_attention.profiling import driver, stamps
from hopper_attention.profiling.spans import Span

GPU_UNIT = "clocks of the SM"
SIMULATOR_UNIT = "warp instructions of the block (simulator: order, not time)"

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """A launch that an instance's host code asked for, with its parameters' addresses."""

    kernel: str
    grid: Triple
    block: Triple
    cluster: Triple
    shared_memory_bytes: int
    parameters: Sequence[int]


def record(inputs: Inputs, instance: str, blocks: int) -> tuple[list[Span], str]:
    """The ranges of the first `blocks` blocks of the instance, and the unit of their time.

    On the CPU the simulator runs the stamped kernel, those blocks alone: for the stamps' own sake.
    """
    ptx = manifest.ptx_path(instance).read_text()
    spans: list[Span] = []

    def launch(ask: Launch, tensors: Sequence[Tensor]) -> None:
        stamped = stamps.instrument(ptx, ask.kernel, min(blocks, math.prod(ask.grid)))
        run = _stamps_of_gpu if inputs.q.is_cuda else _stamps_of_simulator
        spans.extend(stamps.decode(run(stamped, ask, tensors), stamped))

    _host_code(inputs, instance, launch)
    return spans, GPU_UNIT if inputs.q.is_cuda else SIMULATOR_UNIT


def model(inputs: Inputs, instance: str) -> simulator.Timeline:
    """The first block of the instance as the simulator's cost model times it."""
    module = simulator.Module.load(manifest.ptx_path(instance))
    timelines: list[simulator.Timeline] = []

    def launch(ask: Launch, tensors: Sequence[Tensor]) -> None:
        with simulator.record(blocks=1) as recording:
            _simulate(module, ask, tensors, blocks=1)
        timelines.append(simulator.Timeline(recording.traces[0]))

    _host_code(inputs, instance, launch)
    return timelines[0]


def _host_code(
    inputs: Inputs, instance: str, launch: Callable[[Launch, Sequence[Tensor]], None]
) -> None:
    """The public function up to the launch: tensor maps and parameters are made without a GPU.

    Backward gets what lies in the memory of forward's results: its time hardly depends on it.
    """

    def handler(tensors: Sequence[Tensor], *asked: Any) -> None:
        ask = Launch(*asked)
        if re.sub(r"_\d+$", "", ask.kernel) == instance:
            launch(ask, tensors)

    with simulator.enabled(), runtime.intercepted(handler):
        with_backward(inputs, flash_attn_api.forward(hopper_attention, inputs))()


def _stamps_of_gpu(stamped: stamps.Stamped, ask: Launch, tensors: Sequence[Tensor]) -> np.ndarray:
    """Once to warm up, once for the stamps."""
    buffer = torch.zeros(stamped.slots, dtype=torch.int64, device=tensors[0].device)
    function = driver.load(stamped.ptx, stamped.kernel, ask.shared_memory_bytes)
    stream = torch.cuda.current_stream().cuda_stream
    address = ctypes.c_uint64(buffer.data_ptr())
    parameters = [*ask.parameters, ctypes.addressof(address)]
    for _ in range(2):
        buffer.zero_()
        driver.launch(function, ask.grid, ask.block, ask.shared_memory_bytes, stream, parameters)
    torch.cuda.synchronize()
    return buffer.cpu().numpy().view(np.uint64)


def _stamps_of_simulator(
    stamped: stamps.Stamped, ask: Launch, tensors: Sequence[Tensor]
) -> np.ndarray:
    buffer = np.zeros(stamped.slots, dtype=np.uint64)
    module = simulator.Module.parse(stamped.ptx, f"{stamped.kernel}, stamped")
    _simulate(module, ask, tensors, stamped.blocks, buffer)
    return buffer


def _simulate(
    module: simulator.Module,
    ask: Launch,
    tensors: Sequence[Tensor],
    blocks: int,
    *buffers: np.ndarray,
) -> None:
    """The first tile of the first blocks of the launch's own grid.

    A block of a persistent kernel would take more tiles from the counter; one of Ampere's goes on
    to the tile that is a grid further, so that in a smaller grid it would have more of them.  The
    addresses of `buffers` are the last parameters.
    """
    tensors[-1][0] = runtime.NO_MORE_TILES
    memory = simulator.GlobalMemory()
    for index, tensor in enumerate(tensors):
        nbytes = tensor.numel() * tensor.element_size()
        memory.register(tensor.data_ptr(), nbytes, f"argument {index}")
    for buffer in buffers:
        memory.register(buffer.ctypes.data, buffer.nbytes, "stamps")
    parameters = [
        ctypes.string_at(address, parameter.size)
        for address, parameter in zip(ask.parameters, module.kernels[ask.kernel].params)
    ]
    parameters += [buffer.ctypes.data.to_bytes(8, "little") for buffer in buffers]
    with simulator.enabled(seed=0, hazards="off"):  # a picture, not a test
        simulator.launch(
            module,
            ask.kernel,
            grid=ask.grid,
            block=ask.block,
            params=parameters,
            memory=memory,
            cluster=ask.cluster,
            shared_memory_bytes=ask.shared_memory_bytes,
            clusters=-(-blocks // math.prod(ask.cluster)),
        )
