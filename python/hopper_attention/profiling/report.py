"""A profiler's report of one kernel launch: metrics, and stalled warps by instruction."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hopper_attention.errors import UserError
from hopper_attention.profiling import ncu

SAMPLES = "smsp__pcsamp_warps_issue_stalled_"
"""Prefix of the metrics that count sampled warps by why they could not issue, for every address."""
EVERY_INSTRUCTION = "inst_executed"
"""Has a value for every address of the kernel, so its smallest is where the kernel starts."""


class Metric(Protocol):
    """The part of `ncu_report.IMetric` in use."""

    def has_value(self) -> bool: ...
    def value(self, instance: int = ...) -> Any: ...
    def num_instances(self) -> int: ...
    def has_correlation_ids(self) -> bool: ...
    def correlation_ids(self) -> Metric: ...


class Action(Protocol):
    """The part of `ncu_report.IAction` in use: one profiled launch."""

    def name(self) -> str: ...
    def metric_names(self) -> Iterable[str]: ...
    def metric_by_name(self, name: str) -> Metric | None: ...


@dataclass(frozen=True)
class KernelReport:
    kernel: str
    metrics: dict[str, float]
    """In base units: nanoseconds, bytes, hertz, percent."""
    stalls: dict[str, dict[int, int]] = field(default_factory=dict)
    """Reason -> byte offset in the kernel -> sampled warps.  Empty of a CSV."""

    def first(self, *names: str) -> float | None:
        """The first metric that is there: names differ between releases and GPUs."""
        return next((self.metrics[name] for name in names if name in self.metrics), None)


def load(path: Path, instance: str) -> KernelReport:
    """The launch of `instance` in a .ncu-rep file, or in a CSV of ncu's raw page.

    Raises UserError for what is neither, and for a report of another kernel.
    """
    if not path.is_file():
        raise UserError(f"{path}: No such file")
    reports = from_csv(path.read_text()) if path.suffix == ".csv" else _read_binary(path)
    for report in reports:
        if is_instance(report.kernel, instance):
            return report
    if not reports:
        raise UserError(f"{path} holds no profiled kernel")
    found = ", ".join(dict.fromkeys(report.kernel for report in reports))
    raise UserError(f"{path} is a report of {found}, not of {instance}")


def is_instance(kernel: str, instance: str) -> bool:
    """The compiler numbers an instance's kernels: fwd_bf16_d64_0."""
    stem, _, number = kernel.partition("(")[0].rpartition("_")
    return kernel == instance or (stem == instance and number.isdigit())


def _read_binary(path: Path) -> list[KernelReport]:
    try:
        ncu_report = importlib.import_module("ncu_report")
    except ImportError:
        return from_csv(ncu.raw_csv(path))  # without stalls by role
    context = ncu_report.load_report(str(path))
    ranges = [context.range_by_idx(i) for i in range(context.num_ranges())]
    return [from_action(r.action_by_idx(i)) for r in ranges for i in range(r.num_actions())]


def from_action(action: Action) -> KernelReport:
    metrics: dict[str, float] = {}
    stalls: dict[str, dict[int, int]] = {}
    start = min(_by_address(action, EVERY_INSTRUCTION), default=0)
    for name in action.metric_names():
        metric = action.metric_by_name(name)
        if metric is None or not metric.has_value():
            continue
        value = metric.value()
        if isinstance(value, (int, float)):
            metrics[name] = float(value)
        reason = name.removeprefix(SAMPLES)
        if reason != name and not reason.endswith("_not_issued"):
            samples = _by_address(action, name)
            stalls[reason] = {address - start: count for address, count in samples.items()}
    return KernelReport(action.name(), metrics, stalls)


def _by_address(action: Action, name: str) -> dict[int, int]:
    """Address of an instruction -> the metric's value there."""
    metric = action.metric_by_name(name)
    if metric is None or not metric.has_correlation_ids():
        return {}
    addresses = metric.correlation_ids()
    return {int(addresses.value(i)): int(metric.value(i)) for i in range(metric.num_instances())}


def from_csv(text: str) -> list[KernelReport]:
    """Read `ncu --page raw --csv --print-units base`: names, units, then a line for each launch."""
    lines = [line for line in text.splitlines() if line.startswith('"')]  # not ncu's remarks
    rows = list(csv.reader(io.StringIO("\n".join(lines))))
    if len(rows) < 2 or "Kernel Name" not in rows[0]:
        raise UserError("not a CSV of ncu's raw page (ncu --import FILE --page raw --csv)")
    names, _units, *launches = rows
    return [
        KernelReport(
            launch[names.index("Kernel Name")],
            {
                name: value
                for name, text in zip(names, launch)
                if (value := _number(text)) is not None
            },
        )
        for launch in launches
    ]


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
