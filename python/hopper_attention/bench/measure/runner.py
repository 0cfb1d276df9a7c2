"""One run: prepare, check, time.  A peer that fails before it is timed costs its own rows only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Protocol as Interface

import torch
from torch import Tensor

from hopper_attention.bench.data.results import MODES, Row
from hopper_attention.bench.data.workloads import Problem
from hopper_attention.bench.measure.correctness import judge
from hopper_attention.bench.measure.inputs import Inputs
from hopper_attention.bench.measure.protocol import Call, Protocol, Timer, measure

KERNEL_RUNS = 5


class Unsupported(Exception):
    """Why a peer does not run a problem: its package is missing, or the shape is not for it."""


@dataclass(frozen=True)
class Prepared:
    call: Callable[[], Tensor | tuple[Tensor, ...]]
    """Returns (out,) or (dq, dk, dv), in the layouts of the inputs; what is timed."""
    instance: str = ""
    """The compiled instance that does the most of it, of our own calls."""


class Peer(Interface):
    name: str

    def prepare(self, inputs: Inputs) -> Prepared:
        """Raises Unsupported with a reason; whatever is not the attention itself is done here."""
        ...


def run_problem(
    problem: Problem,
    peers: Sequence[Peer],
    protocol: Protocol,
    timer: Timer,
    device: torch.device,
) -> Iterator[Row]:
    """The rows of every peer in every mode of the protocol."""
    try:
        inputs = Inputs.make(problem, device)
    except Exception as fault:  # out of memory, for one
        reason = one_line(fault)
        yield from (_row(p, problem, "failed", reason, m) for p in peers for m in protocol.modes)
        return
    calls: dict[str, Call] = {}
    checked: dict[str, Row] = {}
    for peer in peers:
        row, call = _prepare(peer, inputs, timer)
        if call is None:
            yield from (replace(row, mode=mode) for mode in protocol.modes)
        else:
            calls[peer.name], checked[peer.name] = call, row
    for mode in protocol.modes:
        yield from _time(calls, checked, mode, protocol, timer)


def _prepare(peer: Peer, inputs: Inputs, timer: Timer) -> tuple[Row, Call | None]:
    """A row without samples, and the call if it may be timed."""
    problem = inputs.problem
    try:
        prepared = peer.prepare(inputs)
        results = prepared.call()
        verdict = judge(inputs, results if isinstance(results, tuple) else (results,))
        kernels = _kernels(prepared, timer)
    except Unsupported as refusal:
        return _row(peer, problem, "skipped", str(refusal)), None
    except Exception as fault:
        return _row(peer, problem, "failed", one_line(fault)), None
    error = verdict.as_dict()
    if not verdict.passed:
        reason = (
            f"rms error {verdict.ours.rms:.2e} against FP64, PyTorch's {verdict.pytorch.rms:.2e}"
        )
        return replace(_row(peer, problem, "wrong", reason), error=error), None
    complete = replace(
        _row(peer, problem, "failed", "not timed"),
        error=error,
        instance=prepared.instance,
        kernels=kernels,
        flop=problem.flop,
        bytes=problem.bytes,
    )
    return complete, prepared.call


def _kernels(prepared: Prepared, timer: Timer) -> dict[str, float]:
    """Median milliseconds of each instance of ours."""
    if not prepared.instance:
        return {}
    runs = [timer.kernels(prepared.call) for _ in range(KERNEL_RUNS)]
    return {name: median(run[name] for run in runs) for name in runs[0]}


def _row(peer: Peer, problem: Problem, status: str, reason: str, mode: str = MODES[0]) -> Row:
    return Row(problem.name, problem.workload, peer.name, mode, status, reason)


def _time(
    calls: Mapping[str, Call],
    checked: Mapping[str, Row],
    mode: str,
    protocol: Protocol,
    timer: Timer,
) -> Iterator[Row]:
    if not calls:
        return
    try:
        samples = measure(calls, mode, protocol, timer)
    except Exception as fault:
        yield from (replace(r, mode=mode, reason=one_line(fault)) for r in checked.values())
        return
    for name, row in checked.items():
        taken = samples[name]
        yield replace(
            row, mode=mode, status="ok", reason="", samples_ms=taken.milliseconds,
            sm_mhz=taken.sm_mhz, power_w=taken.power_w,
        )  # fmt: skip


def one_line(fault: Exception) -> str:
    lines = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {lines[0] if lines else ''}"
