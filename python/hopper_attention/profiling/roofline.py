"""Achieved TFLOP/s over FLOP per byte, under the roofs of tensor cores and HBM."""

from __future__ import annotations

from pathlib import Path

from hopper_attention.bench.data.workloads import Problem
from hopper_attention.errors import UserError
from hopper_attention.profiling.summary import Summary


def write_roofline(summary: Summary, problem: Problem, path: Path) -> None:
    """A PNG.  Raises UserError if the report lacks what it needs."""
    from matplotlib.figure import Figure

    used = summary.utilisation["HBM"]
    if not (summary.peak_fraction and summary.dram_bytes and used):
        raise UserError(
            "the report lacks clock, SM count or DRAM metrics; profile with `--set full`"
        )
    compute_roof = summary.tflops / summary.peak_fraction
    bandwidth = summary.dram_bytes / summary.microseconds / 1e6  # TB/s
    memory_roof = bandwidth / (used / 100)
    intensity = problem.flop / summary.dram_bytes
    ridge = compute_roof / memory_roof
    span = [min(intensity, ridge) / 10, max(intensity, ridge) * 10]

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    axis.loglog([span[0], ridge], [span[0] * memory_roof, compute_roof], color="grey")
    axis.loglog([ridge, span[1]], [compute_roof, compute_roof], color="grey")
    axis.plot(intensity, summary.tflops, "o", label=f"{summary.kernel}: {summary.tflops:.0f}")
    clock = f" at {summary.clock_ghz:.2f} GHz" if summary.clock_ghz else ""
    axis.set_title(
        f"tensor cores {compute_roof:.0f} TFLOP/s{clock}, HBM {memory_roof:.2f} TB/s",
        fontsize="small",
    )
    axis.set_xlabel("FLOP per byte of HBM traffic")
    axis.set_ylabel("TFLOP/s")
    axis.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
