"""docs/results.md: the newest committed figures, their baselines, and the ledger of instances."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hopper_attention.bench.data.results import (
    BASELINE,
    BASELINES,
    MODES,
    OURS,
    Row,
    Run,
    is_decode,
)
from hopper_attention.bench.report.ledger import Entry, Ledger

HEADER = """\
# Results

Written by `hopper-attention bench report` from `benchmarks/results/` and `benchmarks/ledger.json`;
edits are lost.  How it was measured: [profiling.md](profiling.md#measure).
"""


@dataclass(frozen=True)
class Shown:
    """A row with the run that it is of."""

    row: Row
    run: Run


def markdown(runs: Sequence[Run], ledger: Ledger) -> str:
    """`runs` oldest first: of every device, problem, peer and mode the newest row is shown."""
    by_device: dict[str, list[Run]] = {}
    for run in runs:
        by_device.setdefault(run.device.get("name", "unknown"), []).append(run)
    parts = [HEADER]
    if not runs:
        parts.append("No run on a GPU has been committed yet.\n")
    parts += [_device(name, own) for name, own in by_device.items()]
    parts.append(_ledger(ledger))
    return "\n".join(parts)


def _device(name: str, runs: Sequence[Run]) -> str:
    lines = [f"## {name}", ""]
    for run in runs:
        facts = [f"{key} {value}" for key, value in run.device.items() if key != "name"]
        used = [f"{package} {version}" for package, version in run.versions.items()]
        protocol = [f"{key} {value}" for key, value in run.protocol.items() if key != "modes"]
        about = "; ".join([*facts, *used, *protocol])
        lines += [f"- {run.date[:16]}, commit {run.commit[:12]}: {about}."]
    baselines = [
        [run.commit[:12], peer, *(_baseline(run.baseline(peer, mode)) for mode in MODES)]
        for run in runs
        for peer in BASELINES
    ]
    lines += ["", *_table(["run", "", *MODES], baselines), ""]
    newest: dict[tuple[str, str, str], Shown] = {}
    for run in runs:
        newest |= {row.key: Shown(row, run) for row in run.rows if row.workload != BASELINE}
    for workload in dict.fromkeys(shown.row.workload for shown in newest.values()):
        own = [shown for shown in newest.values() if shown.row.workload == workload]
        lines += [f"### {workload}", "", *_workload(own, workload), ""]
    return "\n".join(lines)


def _baseline(row: Row | None) -> str:
    if row is None:
        return "not measured"
    return f"{row.tflops:.0f} TFLOP/s" if row.flop else f"{row.terabytes_per_second:.2f} TB/s"


def _workload(own: Sequence[Shown], workload: str) -> list[str]:
    """A table for each mode: a row a problem, a column a peer; then why cells are empty."""
    rows = [shown.row for shown in own]
    peers = [p for p in dict.fromkeys(r.peer for r in rows) if _has_figures(rows, p)]
    lines: list[str] = []
    for mode in MODES:
        cells = {(s.row.problem, s.row.peer): s for s in own if s.row.mode == mode}
        problems = sorted({problem for problem, _ in cells}, key=_natural)
        if not problems or not peers:
            continue
        body = [
            [f"`{problem.partition('/')[2]}`"]
            + [_cell(cells.get((problem, peer))) for peer in peers]
            + [_beside_cudnn(cells.get((problem, OURS)))]
            + [_commit_of_ours([cells.get((problem, peer)) for peer in peers])]
            for problem in problems
        ]
        header = [workload, *peers, "ours / cuDNN", "run"]
        lines += [f"{mode.capitalize()}:", "", *_table(header, body), ""]
    idle = [row for row in rows if row.status in ("skipped", "failed")]
    skipped = dict.fromkeys((row.peer, row.status, row.reason) for row in idle)
    return lines + [f"- {peer}: {status}, {reason}" for peer, status, reason in skipped]


def _natural(problem: str) -> list[tuple[int, str]]:
    """d64 before d128: numbers in names by value."""
    return [
        (int(part or -1), "") if i % 2 else (0, part)
        for i, part in enumerate(re.split(r"(\d+)", problem))
    ]


def _has_figures(rows: Iterable[Row], peer: str) -> bool:
    return any(row.peer == peer and row.status in ("ok", "wrong") for row in rows)


def _commit_of_ours(cells: Sequence[Shown | None]) -> str:
    ours = [cell for cell in cells if cell is not None and cell.row.instance]
    return ours[0].run.commit[:12] if ours else ""


def _beside_cudnn(ours: Shown | None) -> str:
    speedup = None if ours is None else ours.run.beside_cudnn(ours.row)
    return "" if speedup is None else f"{speedup:.2f}"


def _cell(shown: Shown | None) -> str:
    """TFLOP/s or TB/s, as a fraction of the run's own baseline, with the spread."""
    if shown is None or shown.row.status in ("skipped", "failed"):
        return ""
    row = shown.row
    if row.status == "wrong":
        return "**wrong**"
    text = f"{row.terabytes_per_second:.2f} TB/s" if row.memory_bound else f"{row.tflops:.0f}"
    fraction = shown.run.fraction(row)
    if fraction is not None:
        text += f" ({fraction:.2f})"
    return f"{text} ±{row.milliseconds.spread:.1%}"


def _ledger(ledger: Ledger) -> str:
    rows = [[f"`{name}`", *_seen(entry)] for name, entry in ledger.items()]
    header = ["instance", "numerics seen", "commit", "speed seen", "commit", "rms error", "rate"]
    return "\n".join(["## Instances", "", *_table(header, rows), ""])


def _seen(entry: Entry) -> list[str]:
    cells: list[str] = []
    for what in ("numerics", "speed"):
        seen = entry.get(what)
        where = f"{seen['device']}, {seen['date'][:10]}" if seen else "simulator only"
        cells += [where, seen["commit"][:12]] if seen else [where, ""]
    speed = entry.get("speed")
    return [*cells, *(("", "") if speed is None else (_error(speed), _rate(speed)))]


def _error(speed: dict[str, Any]) -> str:
    return f"{speed['error']['rms']:.1e}" if speed["error"] else ""


def _rate(speed: dict[str, Any]) -> str:
    if speed.get("tflops") and not is_decode(speed["problem"]):
        return f"{speed['tflops']} TFLOP/s"
    if speed.get("terabytes_per_second"):
        return f"{speed['terabytes_per_second']} TB/s"
    return f"{speed['milliseconds']} ms"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
