"""How much of a step is attention, without touching what a compiled model runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gpt.data import Packing
from gpt.model import Attend


class TimedAttention:
    """`attend` itself but inside `timing()`, where its time in forward and in backward is taken.

    With events on a GPU, which the stream meets on its way, so that nothing waits; with the clock
    on a CPU, where a call returns when it is done.
    """

    def __init__(self, attend: Attend, device: torch.device):
        self.attend, self.device = attend, device
        self.running = False
        self.marks: list[tuple[Any, Any]] = []
        """(start, end) of every stretch."""
        self._started: Any = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        if not self.running:
            return self.attend(q, k, v, packing)
        q, k, v = _Enter.apply(self, q, k, v)
        return _Leave.apply(self, self.attend(q, k, v, packing))

    @contextmanager
    def timing(self) -> Iterator[None]:
        self.marks, self.running = [], True
        try:
            yield
        finally:
            self.running = False

    @property
    def seconds(self) -> float:
        """All stretches together; waits for the GPU."""
        if self.device.type != "cuda":
            return sum(end - start for start, end in self.marks)
        torch.cuda.synchronize(self.device)
        return sum(start.elapsed_time(end) for start, end in self.marks) / 1e3

    def start(self) -> None:
        self._started = self._now()

    def stop(self) -> None:
        self.marks.append((self._started, self._now()))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Enter(torch.autograd.Function):
    """Before attention: forward starts here; backward is done when q, k and v have gradients."""

    @staticmethod
    def forward(ctx: Any, watch: TimedAttention, *operands: Tensor) -> tuple[Tensor, ...]:
        ctx.watch = watch
        watch.start()
        return tuple(x.view_as(x) for x in operands)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.watch.stop()
        return None, *gradients


class _Leave(torch.autograd.Function):
    """After attention: forward is done; backward starts here."""

    @staticmethod
    def forward(ctx: Any, watch: TimedAttention, out: Tensor) -> Tensor:
        ctx.watch = watch
        watch.stop()
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        ctx.watch.start()
        return None, gradient
