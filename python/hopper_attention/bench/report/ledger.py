"""The ledger of what hardware has seen of every instance: `benchmarks/ledger.json`.

    numerics  date, commit, device, by: it was right; "by" a committed result, or tests on a GPU
    speed     date, commit, device, problem, mode, error, milliseconds of the fastest problem that
              it ran; and, where it does most of the problem's work, tflops and
              terabytes_per_second

What is missing was seen on the simulator only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hopper_attention import files
from hopper_attention.bench.data.results import Row, Run
from hopper_attention.errors import UserError

Entry = dict[str, dict[str, Any]]
Ledger = dict[str, Entry]


@dataclass(frozen=True)
class Check:
    """Instances that tests on a GPU found right: a file of `benchmarks/results/checks/`."""

    date: str
    commit: str
    device: str
    by: str
    instances: list[str]


def load_checks(folder: Path) -> list[Check]:
    """Raises UserError for what is not such a file."""
    checks = []
    for path in sorted(folder.glob("*.json")):
        try:
            checks.append(Check(**json.loads(path.read_text())))
        except (ValueError, TypeError) as fault:
            raise UserError(f"{path} is damaged: {fault}") from None
    return checks


def update(
    ledger: Ledger, runs: Iterable[Run], checks: Iterable[Check], instances: Iterable[str]
) -> Ledger:
    """An entry by name for each of `instances`, from the newest that saw it, else as it was.

    What the ledger has of others remains: whoever takes an instance off the lists takes its entry
    out by hand.
    """
    updated: Ledger = {name: dict(ledger.get(name, {})) for name in sorted({*ledger, *instances})}
    for check in checks:
        for name in set(check.instances) & updated.keys():
            seen = {"date": check.date, "commit": check.commit, "device": check.device}
            _keep_newer(updated[name], "numerics", {**seen, "by": check.by})
    for run in sorted(runs, key=lambda run: run.date):
        best: dict[str, Row] = {}
        for row in run.rows:
            for name in {row.instance, *row.kernels} & updated.keys() if row.status == "ok" else ():
                best[name] = max(best.get(name, row), row, key=partial(_rank, name))
        for name, row in best.items():
            speed = _speed(run, row, name)
            _keep_newer(updated[name], "speed", speed)
            if row.error:  # it was checked before it was timed
                seen = {key: speed[key] for key in ("date", "commit", "device")}
                _keep_newer(updated[name], "numerics", {**seen, "by": row.problem})
    return updated


def _keep_newer(entry: Entry, what: str, seen: dict[str, Any]) -> None:
    if seen["date"] >= entry.get(what, {}).get("date", ""):
        entry[what] = seen


def _rank(name: str, row: Row) -> tuple[bool, float]:
    """Problems that are the instance's own before those that it helps with, then by rate."""
    return name == row.instance, max(row.tflops, row.terabytes_per_second)


def _speed(run: Run, row: Row, name: str) -> dict[str, Any]:
    speed = {
        "date": run.date,
        "commit": run.commit,
        "device": run.device.get("name", "unknown"),
        "problem": row.problem,
        "mode": row.mode,
        "error": row.error,
    }
    if name in row.kernels:
        speed["milliseconds"] = round(row.kernels[name], 4)
    if name == row.instance:
        speed["tflops"] = round(row.tflops, 1)
        speed["terabytes_per_second"] = round(row.terabytes_per_second, 3)
    return speed


def read(path: Path) -> Ledger:
    """Empty where there is none yet.  Raises UserError for what is not a ledger."""
    if not path.exists():
        return {}
    try:
        ledger = json.loads(path.read_text())
    except ValueError as fault:
        raise UserError(f"{path} is damaged: {fault}") from None
    if not isinstance(ledger, dict) or not all(isinstance(e, dict) for e in ledger.values()):
        raise UserError(f"{path} is not a ledger: {{instance: {{numerics, speed}}}}")
    return ledger


def write(path: Path, ledger: Ledger) -> None:
    files.replace(path, json.dumps(ledger, indent=1) + "\n")
