"""Clocks and power of a GPU while kernels run: nobody can tell from a rate alone what set it."""

from __future__ import annotations

import threading
from typing import NamedTuple

INTERVAL_SECONDS = 0.005


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
            self._nvml, self._device = pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._sample()
        except Exception as fault:  # the package, the library, what the device tells: all optional
            self.reason = f"{type(fault).__name__}: {fault}"
            return
        threading.Thread(target=self._run, name="clocks and power", daemon=True).start()

    def taken(self) -> State:
        """Return the samples since the last call."""
        taken, self._taken = self._taken, []
        return State([mhz for mhz, _ in taken], [watts for _, watts in taken])

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(INTERVAL_SECONDS):
            self._taken.append(self._sample())

    def _sample(self) -> tuple[int, float]:
        """Return MHz and watts of this moment: nvmlDeviceGetPowerUsage is a second's mean."""
        nvml = self._nvml
        mhz = nvml.nvmlDeviceGetClockInfo(self._device, nvml.NVML_CLOCK_SM)
        (power,) = nvml.nvmlDeviceGetFieldValues(self._device, [nvml.NVML_FI_DEV_POWER_INSTANT])
        if power.nvmlReturn != nvml.NVML_SUCCESS:
            raise RuntimeError(f"NVML knows no power of this moment: {power.nvmlReturn}")
        return mhz, power.value.uiVal / 1000
