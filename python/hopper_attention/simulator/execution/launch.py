"""The arguments of a launch, checked: what all its blocks share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hopper_attention.simulator.errors import LaunchError
from hopper_attention.simulator.execution.program import Program, program_of
from hopper_attention.simulator.hardware.memory import SHARED_BASE, SHARED_LIMIT, GlobalMemory
from hopper_attention.simulator.hazards.checks import Reports
from hopper_attention.simulator.options import Options
from hopper_attention.simulator.ptx.parser import Kernel, Module

_MAX_THREADS = 1024
_MAX_CLUSTER = 16


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of a kernel.

    grid: in blocks; block: in threads; cluster: in blocks.  params: the parameter space's bytes.
    dynamic_shared: bytes of shared memory beside the kernel's own variables.
    """

    kernel: Kernel
    program: Program
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    params: np.ndarray
    memory: GlobalMemory
    dynamic_shared: int
    options: Options
    reports: Reports

    @staticmethod
    def of(
        module: Module,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        cluster: Sequence[int],
        params: Sequence[bytes],
        memory: GlobalMemory,
        dynamic_shared: int,
        options: Options,
    ) -> "Launch":
        """Check the arguments.  Raises LaunchError for what a device would refuse."""
        if name not in module.kernels:
            raise LaunchError(f"no kernel {name}; {module.path} has {sorted(module.kernels)}")
        kernel = module.kernels[name]
        grid, block, cluster = _three(grid), _three(block), _three(cluster)
        cluster = kernel.required_cluster or cluster
        if (
            min(cluster) < 1
            or np.prod(cluster) > _MAX_CLUSTER
            or any(g % c for g, c in zip(grid, cluster, strict=True))
        ):
            raise LaunchError(f"grid {grid} in clusters of {cluster}: must divide, at most "
                              f"{_MAX_CLUSTER} blocks")  # fmt: skip
        if kernel.required_block and block != kernel.required_block:
            raise LaunchError(f"block {block}, the kernel requires {kernel.required_block}")
        if min(grid) < 1 or min(block) < 1 or np.prod(block) > _MAX_THREADS:
            raise LaunchError(f"grid {grid}, block {block}: 1 to {_MAX_THREADS} threads a block")
        image = np.frombuffer(_parameter_space(kernel, params), np.uint8)
        program, reports = program_of(kernel), Reports(options.hazards)
        nbytes = program.static_end + dynamic_shared - SHARED_BASE
        if nbytes > SHARED_LIMIT - SHARED_BASE:
            raise LaunchError(
                f"{nbytes} bytes of shared memory; a block has at most {SHARED_LIMIT - SHARED_BASE}"
            )
        return Launch(
            kernel, program, grid, block, cluster, image, memory, dynamic_shared, options, reports
        )

    @property
    def threads(self) -> int:
        """The number of threads of a block."""
        return self.block[0] * self.block[1] * self.block[2]

    @property
    def warps(self) -> int:
        """The number of warps of a block."""
        return -(-self.threads // 32)

    @property
    def shared_bytes(self) -> int:
        """The bytes of a block's shared memory."""
        return self.program.static_end + self.dynamic_shared - SHARED_BASE


def _three(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*(int(n) for n in sizes), 1, 1)[:3]
    return x, y, z


def _parameter_space(kernel: Kernel, params: Sequence[bytes]) -> bytes:
    if len(params) != len(kernel.params):
        raise LaunchError(f"{len(params)} parameters, the kernel has {len(kernel.params)}")
    image = bytearray()
    for number, (given, param) in enumerate(zip(params, kernel.params, strict=True)):
        if len(given) != param.size:
            raise LaunchError(f"parameter {number} has {len(given)} bytes, not {param.size}")
        image += bytes(param.offset - len(image)) + bytes(given)
    return bytes(image)
