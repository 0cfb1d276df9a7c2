"""docs/results.md: the newest committed run, its baselines, and the ledger of instances."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hopper_attention.bench.ledger import Ledger
from hopper_attention.bench.results import BASELINE, BASELINES, MODES, Row, Run, is_decode

HEADER = """\
# Results

Written by `hopper-attention bench report` from `benchmarks/results/` and `benchmarks/ledger.json`;
edits are lost.  How it was measured: [profiling.md](profiling.md#measure).
"""


def markdown(runs: Sequence[Run], ledger: Ledger) -> str:
    """`runs` oldest first: the newest of every device is shown."""
    newest = {run.device.get("name", "unknown"): run for run in runs}
    parts = [HEADER]
    if not newest:
        parts.append("No run on a GPU has been committed yet.\n")
    parts += [_run(name, run) for name, run in newest.items()]
    parts.append(_ledger(ledger))
    return "\n".join(parts)


def _run(name: str, run: Run) -> str:
    facts = [f"{key} {value}" for key, value in run.device.items() if key != "name"]
    used = [f"{package} {version}" for package, version in run.versions.items()]
    lines = [f"## {name}, {run.date[:10]}", ""]
    lines += [f"Commit {run.commit}. {'; '.join(facts)}. {'; '.join(used)}.", ""]
    baselines = [
        [peer, *(_baseline(run.baseline(peer, mode)) for mode in MODES)] for peer in BASELINES
    ]
    lines += [*_table(["", *MODES], baselines), ""]
    for workload in dict.fromkeys(row.workload for row in run.rows if row.workload != BASELINE):
        lines += [f"### {workload}", "", *_workload(run, workload), ""]
    return "\n".join(lines)


def _baseline(row: Row | None) -> str:
    if row is None:
        return "not measured"
    return f"{row.tflops:.0f} TFLOP/s" if row.flop else f"{row.terabytes_per_second:.2f} TB/s"


def _workload(run: Run, workload: str) -> list[str]:
    """A table for each mode: a row a problem, a column a peer; then why cells are empty."""
    rows = [row for row in run.rows if row.workload == workload]
    peers = [p for p in dict.fromkeys(r.peer for r in rows) if _has_figures(rows, p)]
    lines: list[str] = []
    for mode in MODES:
        cells = {(r.problem, r.peer): r for r in rows if r.mode == mode}
        problems = dict.fromkeys(problem for problem, _ in cells)
        if not problems or not peers:
            continue
        body = [
            [f"`{problem.partition('/')[2]}`"]
            + [_cell(run, cells.get((problem, peer))) for peer in peers]
            for problem in problems
        ]
        lines += [f"{mode.capitalize()}:", "", *_table([workload, *peers], body), ""]
    idle = [row for row in rows if row.status in ("skipped", "failed")]
    skipped = dict.fromkeys((row.peer, row.status, row.reason) for row in idle)
    return lines + [f"- {peer}: {status}, {reason}" for peer, status, reason in skipped]


def _has_figures(rows: Iterable[Row], peer: str) -> bool:
    return any(row.peer == peer and row.status in ("ok", "wrong") for row in rows)


def _cell(run: Run, row: Row | None) -> str:
    """TFLOP/s or TB/s, as a fraction of the run's own baseline, with the spread."""
    if row is None or row.status in ("skipped", "failed"):
        return ""
    if row.status == "wrong":
        return "**wrong**"
    text = f"{row.terabytes_per_second:.2f} TB/s" if row.memory_bound else f"{row.tflops:.0f}"
    fraction = run.fraction(row)
    if fraction is not None:
        text += f" ({fraction:.2f})"
    return f"{text} ±{row.milliseconds.spread:.1%}"


def _ledger(ledger: Ledger) -> str:
    rows = []
    for name, entry in ledger.items():
        if entry["seen"] != "hardware":
            rows.append([f"`{name}`", entry["seen"], "", "", ""])
            continue
        if not entry.get("tflops"):  # a helper, or what only moves data
            moved = entry.get("terabytes_per_second")
            rate = f"{moved} TB/s" if moved else f"{entry['milliseconds']} ms"
        elif is_decode(entry["problem"]):
            rate = f"{entry['terabytes_per_second']} TB/s"
        else:
            rate = f"{entry['tflops']} TFLOP/s"
        error = f"{entry['error'].get('rms', float('nan')):.1e}"
        where = f"{entry['device']}, {entry['date'][:10]}"
        rows.append([f"`{name}`", where, entry["commit"][:12], error, rate])
    lines = ["## Instances", "", *_table(["instance", "seen", "commit", "rms error", "rate"], rows)]
    return "\n".join([*lines, ""])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
