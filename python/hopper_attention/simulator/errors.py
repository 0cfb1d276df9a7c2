"""The errors of the simulator.  Each message names the PTX line and the kernel's text there."""


class SimulatorError(RuntimeError):
    """Base class of all errors of the simulator."""


class PtxSyntaxError(SimulatorError):
    """The PTX text could not be parsed."""


class UnknownInstruction(SimulatorError):
    """An instruction, modifier or operand form that the simulator does not implement."""


class OutOfBounds(SimulatorError):
    """An access outside of registered global memory, shared memory or the parameters."""


class MisalignedAccess(SimulatorError):
    """An access whose address is not a multiple of what the instruction requires."""


class LaunchError(SimulatorError):
    """A launch whose configuration or parameters a device would refuse."""


class DeadlockError(SimulatorError):
    """No warp can run and nothing asynchronous is under way."""


class BarrierError(SimulatorError):
    """An mbarrier or a named barrier is misused: over-arrival, transaction count, unset barrier."""


class HazardError(SimulatorError):
    """A missing wait, fence or barrier: hardware may read or write the wrong data."""


class HazardWarning(UserWarning):
    """A hazard reported with ``hazards="warn"``."""
