"""`hopper-attention info`: device, versions, compiled instances."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from hopper_attention import _cuda
from hopper_attention.dispatch import manifest, target


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Show the device, versions, and the compiled kernel instances."""
    facts = {
        "versions": {
            "hopper-attention": version("hopper-attention"),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "cuda": _cuda.runtime_info(),
        "devices": _devices(),
        "forced_backend": target.forced(),
        "instances": [asdict(instance) for instance in manifest.instances().values()],
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        _print(Console(), facts)


def _devices() -> list[dict[str, Any]]:
    return [
        {
            "name": torch.cuda.get_device_name(index),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
            **_backend(torch.cuda.get_device_capability(index)),
        }
        for index in range(torch.cuda.device_count())
    ]


def _backend(capability: tuple[int, int]) -> dict[str, str | None]:
    """Return the kernels that calls run there, or why they are refused."""
    try:
        return {"backend": target.choose(capability, target.forced()).kernels}
    except NotImplementedError as reason:
        return {"backend": None, "refusal": str(reason)}


def _print(console: Console, facts: dict[str, Any]) -> None:
    summary = Table(show_header=False, box=None)
    for name, text in facts["versions"].items():
        summary.add_row(name, text)
    for name, value in facts["cuda"].items():
        summary.add_row(f"CUDA {name.replace('_', ' ')}", str(value))
    for device in facts["devices"]:
        number = device["capability"].replace(".", "")
        runs = device["backend"] or f"no backend: {device['refusal']}"
        summary.add_row("device", f"{device['name']} (sm_{number}): {runs}")
    if not facts["devices"]:
        summary.add_row("devices", "no GPU: kernels run on the simulator")
    if facts["forced_backend"]:
        summary.add_row(target.VARIABLE, facts["forced_backend"])
    console.print(summary)

    instances = facts["instances"]
    architectures = ", ".join(sorted({i["architecture"] for i in instances}))
    table = Table(
        title=f"Compiled kernel instances ({architectures})",
        caption="--json counts their instructions, `hopper-attention sass` their clocks",
        box=None,
    )
    table.add_column("instance", no_wrap=True)
    for column in ("tile", "regs", "shared", "spills"):
        table.add_column(column, justify="right", no_wrap=True)
    for i in instances:
        figures = (
            i["registers"],
            i["shared_memory_bytes"],
            i["spill_stores"] + i["spill_loads"],
        )
        sides = [i["config"][side] for side in ("tile_m", "tile_n") if side in i["config"]]
        table.add_row(i["name"], "x".join(map(str, sides)), *map(str, figures))
    console.print(table)
