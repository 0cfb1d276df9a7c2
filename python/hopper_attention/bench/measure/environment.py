"""The environment of a result: device, clocks, driver, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hopper_attention.dispatch import target
from hopper_attention.errors import UserError

PACKAGES = (
    "hopper-attention",
    "torch",
    "nvidia-cudnn-cu13",
    "nvidia-cublas",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "nvidia-cudnn-frontend",
    "flashinfer-python",
    "triton",
)

SMI_FIELDS = {
    "driver": "driver_version",
    "power_limit_w": "power.limit",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "max_sm_mhz": "clocks.max.sm",
}


def require_gpu() -> torch.device:
    """The current Hopper GPU.  Raises UserError without one."""
    if not torch.cuda.is_available():
        raise UserError(
            "this measures on a Hopper GPU, and there is no GPU here; `bench overhead`, "
            "`bench compare`, `bench report`, `sass` and `profile timeline` work without"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        target.check_gpu(device)
    except NotImplementedError as reason:
        raise UserError(str(reason)) from None
    return device


def device_facts(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    facts = {
        "name": properties.name,
        "sms": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }
    return facts | _ask_nvidia_smi(str(properties.uuid))


def _ask_nvidia_smi(uuid: str) -> dict[str, str]:
    """Empty where there is no nvidia-smi."""
    query = ",".join(SMI_FIELDS.values())
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(SMI_FIELDS, (value.strip() for value in done.stdout.split(","))))


def versions() -> dict[str, str]:
    """Return versions of Python and of the installed ones among PACKAGES."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the commit of the repository behind this package, "+" for changes; else "unknown".

    Where the sources were copied without their history, HOPPER_ATTENTION_COMMIT may say.
    """
    if given := os.environ.get("HOPPER_ATTENTION_COMMIT"):
        return given
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
