"""Nsight Compute on one launch of one kernel."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from hopper_attention.bench.data.workloads import Problem
from hopper_attention.errors import UserError

WARMUP_LAUNCHES = 5

FAULTS = {
    "ERR_NVGPUCTRPERM": "no permission to read the GPU's counters (ERR_NVGPUCTRPERM): run as root, "
    "or load the driver with NVreg_RestrictProfilingToAdminUsers=0",
    "No kernels were profiled": "the program launched no kernel of that name",
    "ERR_NVGPUUNAVAILABLE": "the GPU's counters are in use, or not available here",
}
"""Messages of ncu -> what the user is told."""


def find_ncu() -> str:
    """On the path, or in the newest toolkit.  Raises UserError without it."""
    found = shutil.which("ncu")
    toolkits = sorted(Path("/usr/local").glob("cuda*/bin/ncu"))
    if found or toolkits:
        return found or str(toolkits[-1])
    raise UserError(
        "no Nsight Compute: install it (`ncu` of the CUDA toolkit) and put it on the path"
    )


def command(ncu: str, instance: str, problem: Problem, out: Path) -> list[str]:
    """One launch after the warm-up, every section, sources inside, clocks as they are."""
    options = [
        *("--force-overwrite", "--export", str(out)),
        *("--target-processes", "all"),
        *("--kernel-name-base", "demangled", "--kernel-name", f"regex:^{instance}_[0-9]+"),
        *("--launch-skip", str(WARMUP_LAUNCHES), "--launch-count", "1"),
        *("--set", "full", "--import-source", "yes"),
        *("--clock-control", "none"),
    ]
    program = ["-m", "hopper_attention.profiling.target", problem.name, str(WARMUP_LAUNCHES + 1)]
    return [ncu, *options, sys.executable, *program]


def run(instance: str, problem: Problem, out: Path) -> Path:
    """Profile; the report's path.  Raises UserError with the reason if there is none."""
    if out.suffix != ".ncu-rep":
        out = out.with_name(out.name + ".ncu-rep")  # ncu would append it
    out.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        command(find_ncu(), instance, problem, out), capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    for mark, reason in FAULTS.items():
        if mark in output:
            raise UserError(reason)
    if done.returncode != 0 or not out.exists():
        lines = [line for line in output.splitlines() if line.strip()]
        errors = [line for line in lines if "==ERROR==" in line] or lines[-1:] or ["no output"]
        raise UserError(f"ncu failed: {errors[0].removeprefix('==ERROR== ')}")
    return out


def raw_csv(report: Path) -> str:
    """Every metric of the report, in base units, as ncu itself reads it."""
    page = [find_ncu(), "--import", str(report), "--page", "raw", "--csv", "--print-units", "base"]
    done = subprocess.run(page, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"ncu cannot read {report}")
    return done.stdout
