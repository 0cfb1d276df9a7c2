"""Facts about devices, and how a Hopper kernel's registers are divided.

Free of imports from the CuTe DSL; see `cute_kernels/instance.py`.
"""

from dataclasses import dataclass

SHARED_MEMORY = {
    (8, 0): 163 << 10,
    (8, 6): 99 << 10,
    (8, 7): 163 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
}
"""Compute capability -> bytes of shared memory that one block may have."""

ARCHITECTURES = {
    (8, 0): "sm_80",
    (8, 6): "sm_80",
    (8, 7): "sm_80",
    (8, 9): "sm_80",
    (9, 0): "sm_90",
}
"""Compute capability -> architecture of the instances: machine code serves one major version."""

SHARED_MEMORY_CAPACITY = SHARED_MEMORY[9, 0]
"""Bytes of shared memory one block may have on sm_90."""


@dataclass(frozen=True)
class Registers:
    """Registers a thread after `setmaxnreg`: the block's 64 Ki are split between the roles."""

    consumer: int
    producer: int


REGISTERS = {2: Registers(240, 24), 3: Registers(160, 32)}
"""Registers by number of consumer warpgroups; the producer is one warpgroup more."""
BUSY_PRODUCER = {2: Registers(232, 40), 3: Registers(152, 56)}
"""Registers where the producer looks up lengths, windows, FP8's factors: 24 and 32 spill."""
