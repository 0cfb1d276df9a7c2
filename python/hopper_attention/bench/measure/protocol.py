"""How times are taken: peers in turn, cold caches, cold and warm clocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from typing import Protocol as Interface
from unittest import mock

import torch

from hopper_attention.bench.data.results import MODES
from hopper_attention.bench.measure.sampling import Sampler, State
from hopper_attention.launch import runtime

Call = Callable[[], Any]


@dataclass(frozen=True)
class Protocol:
    """One process; in every round each implementation once, in turn; events around the call."""

    repeats: int = 20
    """Rounds that count."""
    warmup: int = 3
    """Rounds that do not."""
    flush_mib: int = 4096
    """Written before every call: empties L2, and takes longer than any peer's Python, so that the
    GPU never waits for the call.  1 ms on an H200; 0.25 ms may have been too few for FP8 tensors
    that have to be arranged: 305 and 555 TFLOP/s at 1k keys in two runs of the same kernels."""
    load_seconds: float = 5.0
    """Seconds of matrix products before "sustained": power sets the pace from then on."""
    idle_seconds: float = 0.5
    """Before every round of "burst"."""
    modes: tuple[str, ...] = MODES
    """Which of them are measured."""


class Timer(Interface):
    def idle(self, seconds: float) -> None: ...

    def load(self, seconds: float) -> None: ...

    def milliseconds(self, call: Call) -> float:
        """Milliseconds of one call with cold caches, its launch hidden behind other work."""
        ...

    def kernels(self, call: Call) -> dict[str, float]:
        """Milliseconds of each instance of ours that the call launches."""
        ...

    def state(self) -> State:
        """Clocks and power since the last time it was asked."""
        ...


class CudaTimer:
    """On the current device and stream."""

    def __init__(self, flush_mib: int):
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.sampler = Sampler(f"GPU-{properties.uuid}")
        self.flush = torch.empty(flush_mib << 20, dtype=torch.uint8, device="cuda")
        self.matrices = [
            torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2)
        ]

    def idle(self, seconds: float) -> None:
        torch.cuda.synchronize()
        time.sleep(seconds)

    def load(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(20):
                self.matrices[0] @ self.matrices[1]
            torch.cuda.synchronize()

    def milliseconds(self, call: Call) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def state(self) -> State:
        return self.sampler.taken()

    def kernels(self, call: Call) -> dict[str, float]:
        launches: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        launch = runtime._cuda.launch

        def timed(instance: str, *arguments: Any) -> None:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            launch(instance, *arguments)
            stop.record()
            launches.append((instance, start, stop))

        self.flush.zero_()
        with mock.patch.object(runtime, "_cuda", SimpleNamespace(launch=timed)):
            call()
        torch.cuda.synchronize()
        times: dict[str, float] = {}
        for instance, start, stop in launches:
            times[instance] = times.get(instance, 0.0) + start.elapsed_time(stop)
        return times


@dataclass(frozen=True)
class Samples:
    """Everything that was taken of one call, round after round."""

    milliseconds: list[float] = field(default_factory=list)
    sm_mhz: list[int] = field(default_factory=list)
    power_w: list[float] = field(default_factory=list)


def measure(
    calls: Mapping[str, Call], mode: str, protocol: Protocol, timer: Timer
) -> dict[str, Samples]:
    """Time every call `protocol.repeats` times, in turn; clocks and power while it is timed."""
    assert mode in MODES, mode
    samples = {name: Samples() for name in calls}
    if mode == "sustained":
        timer.load(protocol.load_seconds)
    for round_ in range(-protocol.warmup, protocol.repeats):
        if mode == "burst" and round_ >= 0:
            timer.idle(protocol.idle_seconds)
        for name, call in calls.items():
            timer.state()  # of what was before
            duration = timer.milliseconds(call)
            state = timer.state()
            if round_ >= 0:
                samples[name].milliseconds.append(duration)
                samples[name].sm_mhz.extend(state.sm_mhz)
                samples[name].power_w.extend(state.power_w)
    return samples
