"""Loss curves: each step lightly, smoothed on top; validation as points; differences below."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpt.report import Record
from hopper_attention.errors import UserError

SMOOTHED = 9
"""Steps in a mean.  Centred: a running mean would lag behind a falling loss."""


@dataclass(frozen=True)
class Curve:
    label: str
    steps: np.ndarray
    losses: np.ndarray
    validation: np.ndarray
    """(points, 2): step and loss."""
    what: str = ""
    """The model's size and the device."""

    @staticmethod
    def of(records: Sequence[Record]) -> Curve:
        """Make the curve of one run; of steps that were done again after a resume the last ones."""
        starts = [record for record in records if record["event"] == "start"]
        losses = {r["step"]: r["loss"] for r in records if r["event"] == "step"}
        validation = {r["step"]: r["loss"] for r in records if r["event"] == "validation"}
        points = np.array(sorted(validation.items()), dtype=float).reshape(-1, 2)
        return Curve(
            _label(starts[-1]) if starts else "run",
            np.array(list(losses), dtype=int),
            np.array(list(losses.values())),
            points,
            _what(starts[-1]) if starts else "",
        )

    @staticmethod
    def read(path: Path) -> Curve:
        """Raises UserError if it is not the metrics of a run."""
        try:
            records = [json.loads(line) for line in path.read_text().splitlines()]
            curve = Curve.of(records)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not what --json writes: {error}") from None
        if not len(curve.steps):
            raise UserError(f"{path} holds no steps")
        return curve

    @property
    def smooth(self) -> np.ndarray:
        """Mean of the steps around each; of fewer at the ends."""
        window = np.ones(min(SMOOTHED, len(self.losses)))
        counts = np.convolve(np.ones_like(self.losses), window, mode="same")
        return np.convolve(self.losses, window, mode="same") / counts


def _label(start: Record) -> str:
    """The attention, and the backend where one was asked for."""
    backend = start.get("settings", {}).get("sdpa_backend", "").rpartition(".")[2].lower()
    named = backend and start["attention"] == "sdpa" and backend != "auto"
    return f"sdpa ({backend})" if named else str(start["attention"])


def _what(start: Record) -> str:
    return f"{start['parameters'] / 1e6:.1f} M parameters, {start['device']}"


def write(path: Path, curves: Sequence[Curve]) -> None:
    """With two or more curves a second panel has how far they are from the first.

    The title says what they are of; of runs that differ, all.
    """
    runs = dict.fromkeys(curve.what for curve in curves if curve.what)
    title = f"byte-level GPT, bf16: {'; '.join(runs)}"
    panels = 2 if len(curves) > 1 else 1
    figure = Figure(figsize=(8, 4.2 + 1.8 * (panels - 1)), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=[3, 1][:panels])
    _draw_losses(axes[0, 0], curves)
    if panels == 2:
        _draw_differences(axes[1, 0], curves)
    axes[-1, 0].set_xlabel("step")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_losses(axes: Axes, curves: Sequence[Curve]) -> None:
    styles = ("-", (0, (4, 3)), (0, (1, 2)))  # curves that agree must not hide one another
    for index, curve in enumerate(curves):
        color, style = f"C{index}", styles[index % len(styles)]
        axes.plot(curve.steps, curve.losses, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(
            curve.steps, curve.smooth, color=color, linestyle=style, linewidth=2,
            label=f"{curve.label}, training (smoothed)",
        )  # fmt: skip
        if len(curve.validation):
            axes.plot(
                *curve.validation.T, color=color, linestyle="", marker="os^"[index % 3],
                markersize=8 - 3 * (index % 2), markeredgecolor="white",
                label=f"{curve.label}, validation",
            )  # fmt: skip
    axes.set_ylabel("cross-entropy (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _draw_differences(axes: Axes, curves: Sequence[Curve]) -> None:
    first = curves[0]
    for index, curve in enumerate(curves[1:], start=1):
        common, ours, theirs = np.intersect1d(first.steps, curve.steps, return_indices=True)
        difference = np.abs(curve.losses[theirs] - first.losses[ours])
        shown = np.where(difference > 0, difference, np.nan)
        label = f"|{curve.label} - {first.label}|"
        axes.semilogy(common, shown, color=f"C{index}", linewidth=0.9, label=label)
    axes.set_ylabel("difference")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")


def max_difference(a: Curve, b: Curve) -> float:
    """Return the greatest difference of losses at steps that both have; NaN without any."""
    _, of_a, of_b = np.intersect1d(a.steps, b.steps, return_indices=True)
    return float(np.abs(a.losses[of_a] - b.losses[of_b]).max()) if len(of_a) else float("nan")
