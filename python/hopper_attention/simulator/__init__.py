"""A functional simulator of Hopper kernels: runs their PTX on the CPU with numpy.

    with simulator.enabled(seed=1, hazards="raise"):
        ...                                     # launches go to the simulator

    module = simulator.Module.load("kernel.ptx")
    memory = simulator.GlobalMemory()
    memory.register(array.ctypes.data, array.nbytes, "array")
    simulator.launch(module, "name", grid=(1, 1, 1), block=(128, 1, 1), params=[...], memory=memory)

What it is for: the same kernel, host code and tensor maps as on a device, every asynchronous
operation completing at an adversarial time, and an error that names the PTX line for a missing
wait, fence or barrier, an access out of bounds, or a deadlock.  It says nothing about speed.
"""

from hopper_attention.simulator.errors import (
    BarrierError,
    DeadlockError,
    HazardError,
    HazardWarning,
    LaunchError,
    MisalignedAccess,
    OutOfBounds,
    PtxSyntaxError,
    SimulatorError,
    UnknownInstruction,
)
from hopper_attention.simulator.execution.machine import Statistics, launch
from hopper_attention.simulator.exported.aot import AotFunction, load_aot
from hopper_attention.simulator.hardware.memory import GlobalMemory
from hopper_attention.simulator.hardware.tensor_map import TensorMap, decode
from hopper_attention.simulator.observation.recording import Recording, Trace, record
from hopper_attention.simulator.observation.timeline import CostModel, Timeline
from hopper_attention.simulator.options import Options, current_options, enabled, is_enabled
from hopper_attention.simulator.ptx.parser import Kernel, Module, Param

__all__ = [
    "AotFunction",
    "BarrierError",
    "CostModel",
    "DeadlockError",
    "GlobalMemory",
    "HazardError",
    "HazardWarning",
    "Kernel",
    "LaunchError",
    "MisalignedAccess",
    "Module",
    "Options",
    "OutOfBounds",
    "Param",
    "PtxSyntaxError",
    "Recording",
    "SimulatorError",
    "Statistics",
    "TensorMap",
    "Timeline",
    "Trace",
    "UnknownInstruction",
    "current_options",
    "decode",
    "enabled",
    "is_enabled",
    "launch",
    "load_aot",
    "record",
]
