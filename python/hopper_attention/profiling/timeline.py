"""Run a stamped instance: on a GPU through the driver, else on the simulator."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hopper_attention import _simulator, manifest, simulator
from hopper_attention.bench.inputs import Inputs
from hopper_attention.profiling import driver, stamps
from hopper_attention.profiling.spans import Span

GPU_UNIT = "clocks of the SM"
SIMULATOR_UNIT = "warp instructions of the block (simulator: order, not time)"

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """What the instance's host code asked for; addresses are those of the parameters' values."""

    kernel: str
    grid: Triple
    block: Triple
    cluster: Triple
    shared_memory_bytes: int
    parameters: Sequence[int]


def record(inputs: Inputs, instance: str, blocks: int) -> tuple[list[Span], str]:
    """The ranges of the first `blocks` blocks of a forward problem, and the unit of their time.

    The simulator runs those blocks alone.
    """
    problem = inputs.problem
    out = inputs.q.new_empty((*inputs.q.shape[:-1], problem.head_dim_v))
    lse = inputs.q.new_empty((problem.batch, problem.heads, problem.seqlen_q), dtype=torch.float32)
    tensors = (inputs.q, inputs.k, inputs.v, out, lse)
    ptx = manifest.ptx_path(instance).read_text()
    on_gpu = inputs.q.is_cuda
    spans: list[Span] = []

    def launch(*asked: object) -> None:
        ask = Launch(*asked)  # type: ignore[arg-type]
        stamped = stamps.instrument(ptx, ask.kernel, min(blocks, math.prod(ask.grid)))
        run = _on_gpu if on_gpu else _on_simulator
        spans.extend(stamps.decode(run(stamped, ask, tensors), stamped))

    _host_code(instance, tensors, 1 / math.sqrt(problem.head_dim), launch)
    return spans, GPU_UNIT if on_gpu else SIMULATOR_UNIT


def _host_code(
    instance: str, tensors: Sequence[Tensor], scale: float, launch: Callable[..., None]
) -> None:
    """The instance's own host code, which makes tensor maps and parameters without a GPU."""
    described = [(t.data_ptr(), t.shape, t.stride()) for t in tensors]
    _simulator.set_launch_handler(launch)
    try:
        _simulator.launch(instance, 0, 0, described, (scale,))
    finally:
        _simulator.set_launch_handler(None)


def _on_gpu(stamped: stamps.Stamped, ask: Launch, tensors: Sequence[Tensor]) -> np.ndarray:
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


def _on_simulator(stamped: stamps.Stamped, ask: Launch, tensors: Sequence[Tensor]) -> np.ndarray:
    buffer = np.zeros(stamped.slots, dtype=np.uint64)
    memory = simulator.GlobalMemory()
    for index, tensor in enumerate(tensors):
        nbytes = tensor.numel() * tensor.element_size()
        memory.register(tensor.data_ptr(), nbytes, f"argument {index}")
    memory.register(buffer.ctypes.data, buffer.nbytes, "stamps")
    module = simulator.Module.parse(stamped.ptx, f"{stamped.kernel}, stamped")
    *own, _ = module.kernels[stamped.kernel].params
    parameters = [
        ctypes.string_at(address, parameter.size)
        for address, parameter in zip(ask.parameters, own, strict=True)
    ]
    with simulator.enabled(seed=0, hazards="off"):  # a picture, not a test
        simulator.launch(
            module,
            stamped.kernel,
            grid=(stamped.blocks, 1, 1),
            block=ask.block,
            params=[*parameters, buffer.ctypes.data.to_bytes(8, "little")],
            memory=memory,
            cluster=ask.cluster,
            shared_memory_bytes=ask.shared_memory_bytes,
        )
    return buffer
