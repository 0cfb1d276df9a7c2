"""Clocks and power of a GPU while kernels run: nobody can tell from a rate alone what set it."""

from __future__ import annotations

import threading
from typing import NamedTuple

INTERVAL_SECONDS = 0.005
"""Each sample costs tens of microseconds of one core; a call with its flush takes about 2 ms."""


class State(NamedTuple):
    """Samples of the GPU's state, one number of each kind at a time."""

    sm_mhz: list[int]
    power_w: list[float]


class Sampler:
    """A thread that asks NVML every INTERVAL_SECONDS, as long as this object is open.

    Without NVML's bindings (nvidia-ml-py, of the extra `tools`) or its library there are no
    samples, and `reason` says why.
    """

    def __init__(self, uuid: str):
        self.reason = ""
        self._taken: list[tuple[int, float]] = []
        self._closed = threading.Event()
        try:
            import pynvml

            pynvml.nvmlInit()
            device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except Exception as fault:  # the package, the library, the device: all are optional
            self.reason = f"{type(fault).__name__}: {fault}"
            return
        self._nvml, self._device = pynvml, device
        threading.Thread(target=self._run, name="clocks and power", daemon=True).start()

    def taken(self) -> State:
        """Return the samples since the last call."""
        taken, self._taken = self._taken, []
        return State([mhz for mhz, _ in taken], [watts for _, watts in taken])

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        nvml, device = self._nvml, self._device
        while not self._closed.wait(INTERVAL_SECONDS):
            mhz = nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)
            milliwatts = nvml.nvmlDeviceGetPowerUsage(device)
            self._taken.append((mhz, milliwatts / 1000))
