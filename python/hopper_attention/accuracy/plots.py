"""The lab's pictures: RMSE by recipe, the paper's comparison over context, accumulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hopper_attention.accuracy.measure import PAPER, Accumulated, Accumulation, Row, gain, pooled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BF16 = "PyTorch SDPA, bf16"
COLOURS = {"none": "#7f8c9b", "smooth_k": "#e0a030", "hadamard": "#3b7dd8", "both": "#1d3f72"}
"""Colours, by what is done before quantising."""


def write_recipes(path: Path, rows: Sequence[Row], caption: str) -> None:
    """A panel for each distribution: a group of bars for each recipe, on a log scale.

    bf16 is a dashed line, the error of V alone a dotted one.  Two-level where it was measured.
    """
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(row.distribution for row in rows))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.3 * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, name in zip(axes, panels):
        _draw_recipes(axis, [row for row in rows if row.distribution == name])
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize="small")
    _save(figure, path, "FP8 attention: error against FP64", caption)


def _draw_recipes(axis: Axes, rows: Sequence[Row]) -> None:
    bars = [row for row in rows if row.accumulation == _shown(rows)]
    recipes = list(dict.fromkeys(row.method.partition("+")[0] for row in bars))
    kinds = [kind for kind in COLOURS if any(_kind(row) == kind for row in bars)]
    width = 0.84 / max(1, len(kinds))
    for index, kind in enumerate(kinds):
        figures = {row.method.partition("+")[0]: row.rmse for row in bars if _kind(row) == kind}
        offset = (index - (len(kinds) - 1) / 2) * width
        places = [recipes.index(recipe) + offset for recipe in figures]
        label = "hadamard and smooth_k" if kind == "both" else kind.replace("none", "as is")
        axis.bar(places, list(figures.values()), width * 0.94, color=COLOURS[kind], label=label)
    lines = {BF16: ("--", "PyTorch, bf16"), "only V in e4m3 (block64)": (":", "V alone in e4m3")}
    for row in rows:
        if row.method in lines:
            style, label = lines[row.method]
            axis.axhline(row.rmse, color="black", linestyle=style, linewidth=1, label=label)
    axis.set_yscale("log")
    axis.set_ylim(min(row.rmse for row in rows if row.method in lines or row in bars) / 1.6)
    axis.set_xticks(range(len(recipes)), recipes)
    axis.set_ylabel("RMSE")
    axis.set_title(f"{rows[0].distribution}: {rows[0].shape}", fontsize="small")
    axis.grid(axis="y", which="both", alpha=0.2)
    axis.set_axisbelow(True)


def _shown(rows: Sequence[Row]) -> str:
    """The accumulation whose rows are drawn."""
    given = [row.accumulation for row in rows if row.accumulation]
    return Accumulation.TWO_LEVEL.value if Accumulation.TWO_LEVEL.value in given else given[0]


def _kind(row: Row) -> str:
    flags = row.method.split("+")[1:]
    return "both" if len(flags) == 2 else (flags or ["none"])[0]


def write_paper(path: Path, runs: Mapping[int, list[dict[str, float]]], caption: str) -> None:
    """RMSE over the context, with the paper's figures as lines; and the gain, of each seed, too."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    figures = {n: pooled(seeds) for n, seeds in runs.items()}
    lengths = list(figures)
    styles = {
        "per_tensor": ("o-", "#7f8c9b"), "block64": ("s-", "#e0a030"),
        "block64+hadamard": ("D-", "#1d3f72"), "fp16": ("^-", "#2e8b57"),
    }  # fmt: skip
    for name, (style, colour) in styles.items():
        left.plot(lengths, [figures[n][name] for n in lengths], style, color=colour, label=name)
        if name in PAPER:
            left.axhline(PAPER[name], color=colour, linestyle="--", linewidth=1)
    left.plot([], [], "k--", linewidth=1, label="FlashAttention-3's paper")
    left.set_yscale("log")
    left.set_ylabel("RMSE")
    left.legend(fontsize="small", ncols=2, loc="center", bbox_to_anchor=(0.5, 0.42))
    for n in lengths:
        right.plot([n] * len(runs[n]), [gain(seed) for seed in runs[n]], ".", color="#9db7d9")
    right.plot(lengths, [gain(figures[n]) for n in lengths], "D-", color="#1d3f72", label="pooled")
    right.plot([], [], ".", color="#9db7d9", label="each seed")
    right.axhline(gain(PAPER), color="black", linestyle="--", linewidth=1, label="paper")
    right.legend(fontsize="small", loc="upper left")
    right.set_ylabel("per_tensor / block64+hadamard")
    _contexts(left, lengths)
    _contexts(right, lengths)
    _save(figure, path, "Outliers as in FlashAttention-3's paper", caption)


def write_accumulation(path: Path, rows: Sequence[Accumulated], caption: str) -> None:
    """Error against FP64, and the part of it that is the accumulator's, over the context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = list(dict.fromkeys(row.keys for row in rows))
    for index, label in enumerate(dict.fromkeys(row.label for row in rows)):
        mine = [row for row in rows if row.label == label]
        colour = "black" if label == "exact" else "#c0392b" if label == "plain" else f"C{index - 2}"
        style = "--" if label == "exact" else "-"
        left.plot(lengths, [row.rmse for row in mine], style, marker="o", color=colour, label=label)
        if label != "exact":
            differences = [row.from_exact for row in mine]
            right.plot(lengths, differences, style, marker="o", color=colour, label=label)
    left.set_ylabel("RMSE against FP64")
    right.set_ylabel("RMS difference to exact sums")
    for axis in (left, right):
        axis.set_yscale("log")
        _contexts(axis, lengths)
    left.legend(fontsize="small")
    _save(figure, path, "Accumulating PV with 14 bits", caption)


def _contexts(axis: Axes, lengths: Sequence[int]) -> None:
    labels = [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths]
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, labels)
    axis.minorticks_off()
    axis.set_xlabel("keys")
    axis.grid(alpha=0.25)


def _save(figure: Figure, path: Path, title: str, caption: str) -> None:
    figure.suptitle(f"{title}\n{caption}", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
