"""What is known of every compiled instance: `benchmarks/ledger.json`.

Every instance has "seen": "simulator only", or "hardware" and then date, commit, device, problem,
mode, error, tflops and terabytes_per_second of its fastest problem in the newest run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hopper_attention.bench.results import OURS, Row, Run

SIMULATOR_ONLY = {"seen": "simulator only"}

Ledger = dict[str, dict[str, Any]]


def update(ledger: Ledger, runs: Iterable[Run], instances: Sequence[str]) -> Ledger:
    """One entry for each of `instances`, from the newest run that timed it, else as it was."""
    updated = {name: ledger.get(name, SIMULATOR_ONLY) for name in instances}
    for run in sorted(runs, key=lambda run: run.date):
        best: dict[str, Row] = {}
        for row in run.rows:
            if row.peer == OURS and row.status == "ok" and row.instance in updated:
                known = best.setdefault(row.instance, row)
                best[row.instance] = max(known, row, key=_rate)
        for name, row in best.items():
            if run.date >= updated[name].get("date", ""):
                updated[name] = _entry(run, row)
    return updated


def _rate(row: Row) -> float:
    return max(row.tflops, row.terabytes_per_second)


def _entry(run: Run, row: Row) -> dict[str, Any]:
    return {
        "seen": "hardware",
        "date": run.date,
        "commit": run.commit,
        "device": run.device.get("name", "unknown"),
        "problem": row.problem,
        "mode": row.mode,
        "error": row.error,
        "tflops": round(row.tflops, 1),
        "terabytes_per_second": round(row.terabytes_per_second, 3),
    }


def read(path: Path) -> Ledger:
    """Empty where there is none yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, ledger: Ledger) -> None:
    path.write_text(json.dumps(ledger, indent=1) + "\n")
