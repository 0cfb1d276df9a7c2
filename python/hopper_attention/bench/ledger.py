"""What is known of every compiled instance: `benchmarks/ledger.json`.

Every instance has "seen": "simulator only", or "hardware" and then date, commit, device, problem,
mode, error and milliseconds of its fastest problem in the newest run; and, if it does most of the
problem's work, tflops and terabytes_per_second.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hopper_attention.bench.results import Row, Run

SIMULATOR_ONLY = {"seen": "simulator only"}

Ledger = dict[str, dict[str, Any]]


def update(ledger: Ledger, runs: Iterable[Run], instances: Sequence[str]) -> Ledger:
    """One entry for each of `instances`, from the newest run that timed it, else as it was."""
    updated = {name: ledger.get(name, SIMULATOR_ONLY) for name in instances}
    for run in sorted(runs, key=lambda run: run.date):
        best: dict[str, Row] = {}
        for row in run.rows:
            for name in {row.instance, *row.kernels} & updated.keys() if row.status == "ok" else ():
                best[name] = max(best.get(name, row), row, key=partial(_rank, name))
        for name, row in best.items():
            if run.date >= updated[name].get("date", ""):
                updated[name] = _entry(run, row, name)
    return updated


def _rank(name: str, row: Row) -> tuple[bool, float]:
    """Problems that are the instance's own before those that it helps with, then by rate."""
    return name == row.instance, max(row.tflops, row.terabytes_per_second)


def _entry(run: Run, row: Row, name: str) -> dict[str, Any]:
    entry = {
        "seen": "hardware",
        "date": run.date,
        "commit": run.commit,
        "device": run.device.get("name", "unknown"),
        "problem": row.problem,
        "mode": row.mode,
        "error": row.error,
    }
    if name in row.kernels:
        entry["milliseconds"] = round(row.kernels[name], 4)
    if name == row.instance:
        entry["tflops"] = round(row.tflops, 1)
        entry["terabytes_per_second"] = round(row.terabytes_per_second, 3)
    return entry


def read(path: Path) -> Ledger:
    """Empty where there is none yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, ledger: Ledger) -> None:
    path.write_text(json.dumps(ledger, indent=1) + "\n")
