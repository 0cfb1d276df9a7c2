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

from hopper_attention import _cuda, manifest


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
        }
        for index in range(torch.cuda.device_count())
    ]


def _print(console: Console, facts: dict[str, Any]) -> None:
    summary = Table(show_header=False, box=None)
    for name, text in facts["versions"].items():
        summary.add_row(name, text)
    for name, value in facts["cuda"].items():
        summary.add_row(f"CUDA {name.replace('_', ' ')}", str(value))
    devices = [f"{d['name']} (sm_{d['capability'].replace('.', '')})" for d in facts["devices"]]
    summary.add_row("devices", ", ".join(devices) or "no GPU: kernels run on the simulator")
    console.print(summary)

    table = Table(title="Compiled kernel instances")
    table.add_column("instance")
    for column in ("arch", "tile", "threads", "registers", "shared memory", "stack", "spills"):
        table.add_column(column, justify="right")
    table.add_column("instructions")
    for i in facts["instances"]:
        tile = f"{i['config']['tile_m']}x{i['config']['tile_n']}"
        table.add_row(
            i["name"],
            i["architecture"],
            tile,
            str(i["threads"]),
            str(i["registers"]),
            f"{i['shared_memory_bytes']:,}",
            str(i["stack"]),
            str(i["spill_stores"] + i["spill_loads"]),
            ", ".join(f"{count} {opcode}" for opcode, count in i["opcodes"].items()),
        )
    console.print(table)
