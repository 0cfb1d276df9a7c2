"""Time variants in turns: the shipped instance's call, the variant's kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from hopper_attention.bench.data.statistics import Summary
from hopper_attention.bench.data.workloads import Problem
from hopper_attention.bench.measure.correctness import judge
from hopper_attention.bench.measure.inputs import Inputs
from hopper_attention.bench.measure.protocol import Call, Timer
from hopper_attention.bench.measure.runner import Peer, Unsupported, one_line
from hopper_attention.dispatch import manifest
from hopper_attention.errors import UserError
from hopper_attention.launch import runtime

from . import table
from .build import FAMILY
from .table import SEPARATOR

SHIPPED = ""
"""The variant that is none."""


@dataclass
class Candidate:
    peer: str
    variant: str
    call: Call
    passed: bool | None
    """None: not judged, since it is wrong on purpose."""
    error: dict[str, float]
    samples_ms: list[float] = field(default_factory=list)

    @property
    def milliseconds(self) -> Summary:
        return Summary.of(self.samples_ms)


def variants_of(instance: str) -> list[str]:
    """Return the build's variants by name.  Raises UserError for one that takes other arguments."""
    known, found = manifest.instances(), []
    for name, record in known.items():
        base, _, variant = name.partition(SEPARATOR)
        if record.family == FAMILY and base == instance:
            if record.config.get("tile_m") != known[base].config.get("tile_m") and "bwd" in base:
                raise UserError(f"{name}: dQ's workspace is laid out by the shipped tile_m")
            if _arguments(record) != _arguments(known[base]):
                raise UserError(f"{name} takes other arguments than the shipped instance")
            found.append(variant)
    return found


def _arguments(record: manifest.CompiledInstance) -> list[tuple[str, str]]:
    """Names and kinds: whoever launches a variant passes the shipped instance's."""
    return [(argument["name"], argument["kind"]) for argument in record.arguments]


@contextmanager
def using(variant: str) -> Iterator[None]:
    """Inside, launches of instances that the variant has run it."""
    launch, known = runtime._cuda.launch, manifest.instances()

    def launch_variant(instance: str, *arguments: Any) -> None:
        other = f"{instance}{SEPARATOR}{variant}"
        launch(other if other in known else instance, *arguments)

    if variant == SHIPPED:
        yield
        return
    with mock.patch.object(runtime, "_cuda", SimpleNamespace(launch=launch_variant)):
        yield


def candidates(problem: Problem, peers: Sequence[Peer], device: torch.device) -> list[Candidate]:
    """Every peer, ours in every variant of its instance; each run once and judged."""
    inputs, found = Inputs.make(problem, device), []
    timing_only = {name for name, variant in table.variants().items() if variant.timing_only}
    for peer in peers:
        try:
            prepared = peer.prepare(inputs)
        except Unsupported:
            continue
        others = variants_of(prepared.instance) if prepared.instance else ()
        for variant in [SHIPPED, *others]:
            with using(variant):
                results = prepared.call()
            passed, error = None, {}
            if variant not in timing_only:
                verdict = judge(inputs, results if isinstance(results, tuple) else (results,))
                passed, error = verdict.passed, verdict.as_dict()
            found.append(Candidate(peer.name, variant, prepared.call, passed, error))
    return found


def time(found: Sequence[Candidate], rounds: int, timer: Timer) -> None:
    """Time them in turns, after a round that does not count."""
    for round_ in range(-1, rounds):
        for candidate in found:
            with using(candidate.variant):
                duration = timer.milliseconds(candidate.call)
            if round_ >= 0:
                candidate.samples_ms.append(duration)


def rows(problem: Problem, found: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Return the rows of the JSON, fastest first."""
    return [
        {
            "problem": problem.name,
            "peer": c.peer,
            "variant": c.variant,
            "tflops": round(problem.flop / c.milliseconds.median / 1e9, 1),
            "passed": c.passed,
            "error": c.error,
            "samples_ms": c.samples_ms,
        }
        for c in sorted(found, key=lambda c: c.milliseconds.median)
    ]


def measure(
    problem: Problem, peers: Sequence[Peer], rounds: int, timer: Timer, device: torch.device
) -> list[dict[str, Any]]:
    """A problem that fails is a row that says why."""
    try:
        found = candidates(problem, peers, device)
        time(found, rounds, timer)
        return rows(problem, found)
    except UserError:
        raise
    except Exception as fault:
        return [{"problem": problem.name, "failed": one_line(fault)}]
