"""Grouped bars by sequence length, a panel for each head dim and mask, as the papers draw them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hopper_attention.bench.data.results import BASELINE, OURS, QUANTISATION, Row, Run
from hopper_attention.bench.data.workloads import INSTANCES
from hopper_attention.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_INCHES = (5.0, 3.2)


def write_plots(run: Run, folder: Path) -> list[Path]:
    """One PNG for each workload, direction and mode that has figures; returns their paths.

    Raises UserError if the run holds no figures.
    """
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in run.rows:
        if row.status == "ok" and row.workload not in (BASELINE, INSTANCES, QUANTISATION):
            groups.setdefault((row.workload, _direction(row), row.mode), []).append(row)
    if not groups:
        raise UserError("the result holds no timed attention to plot")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for (workload, direction, mode), rows in groups.items():
        panels: dict[str, list[Row]] = {}
        for row in rows:
            panels.setdefault(_panel(row), []).append(row)
        columns = min(len(panels), 2)
        lines = -(-len(panels) // columns)
        size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * lines)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for axis, (title, members) in zip(axes, panels.items()):
            _draw(axis, title, members, run)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        axes[0].legend(fontsize="x-small")
        figure.suptitle(f"{workload}, {direction}, {mode}: {run.device.get('name', '')}")
        paths.append(folder / f"{workload}_{direction}_{mode}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def _direction(row: Row) -> str:
    return row.problem.partition("/")[2].partition("_")[0]


def _panel(row: Row) -> str:
    """The problem's name between direction and size: bf16 d128 causal."""
    middle = re.sub(r"_b\d+.*$", "", row.problem.partition("/")[2])
    return middle.partition("_")[2].replace("_", " ")


def _size(row: Row) -> str:
    """The length, 4k; of decode with the batch, b8 4k."""
    size = re.search(r"_b(\d+)_(?:varlen_)?s(\d+)$", row.problem)
    assert size is not None, row.problem
    batch, seqlen = size.groups()
    length = f"{int(seqlen) // 1024}k" if int(seqlen) >= 1024 else seqlen
    return f"b{batch} {length}" if row.is_decode else length


def _draw(axis: Axes, title: str, rows: Sequence[Row], run: Run) -> None:
    sizes = list(dict.fromkeys(_size(row) for row in rows))
    peers = sorted({row.peer for row in rows}, key=lambda peer: (peer != OURS, peer))
    memory_bound = rows[0].memory_bound
    width = 0.8 / len(peers)
    for index, peer in enumerate(peers):
        figures = {
            _size(row): row.terabytes_per_second if memory_bound else row.tflops
            for row in rows
            if row.peer == peer
        }
        places = [i for i, size in enumerate(sizes) if size in figures]
        offset = (index - (len(peers) - 1) / 2) * width
        bars = axis.bar(
            [place + offset for place in places],
            [figures[sizes[place]] for place in places],
            width,
            label=peer,
        )
        axis.bar_label(bars, fmt="%.2f" if memory_bound else "%.0f", fontsize=5)
    baseline = run.cublas(rows[0])
    if baseline is not None and not memory_bound:
        axis.axhline(baseline.tflops, color="grey", linewidth=0.8, linestyle="--")
    axis.set_title(title, fontsize="small")
    axis.set_xticks(range(len(sizes)), sizes, fontsize="x-small")
    axis.set_ylabel("TB/s" if memory_bound else "TFLOP/s", fontsize="small")
