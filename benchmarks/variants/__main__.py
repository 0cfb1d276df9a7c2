"""`python -m benchmarks.variants`: build and run variants of kernels; README.md says how."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from hopper_attention.benchmarks.peers import PEERS
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hopper_attention.bench.data.results import OURS
from hopper_attention.bench.data.workloads import load_problems
from hopper_attention.bench.measure import environment
from hopper_attention.bench.measure.protocol import Protocol
from hopper_attention.cli.bench import select_peers
from hopper_attention.errors import UserError

from . import run as running
from .build import Variant
from .build import build as build_variants

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def build(
    variants: Annotated[list[str], typer.Argument(help="NAME=REVISION:INSTANCE[,INSTANCE...]")],
    out: Annotated[Path, typer.Option(help="Folder for HOPPER_ATTENTION_PREBUILT.")] = Path(
        "build/variants"
    ),
) -> None:
    """Compile instances of other revisions beside the shipped ones; needs no GPU."""
    console, failed = Console(), 0
    parsed = [Variant.parse(text) for text in variants]
    for name, fault in build_variants(parsed, Path.cwd(), out):
        console.print(f"[red]{name}: {fault}[/]" if fault else name)
        failed += bool(fault)
    console.print(f"HOPPER_ATTENTION_PREBUILT={out} pip install .")
    if failed:
        raise UserError(f"{failed} did not compile")


@app.command()
def run(
    workload: Annotated[list[str], typer.Option("--workload", "-w", help="With wildcards.")],
    peer: Annotated[
        list[str] | None, typer.Option("--peer", "-p", help="Beside them, with wildcards.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="That count.")] = 6,
    out: Annotated[Path | None, typer.Option("--json", help="Result to write.")] = None,
) -> None:
    """Time the variants of this build on a Hopper GPU, in turns."""
    from hopper_attention.bench.measure.protocol import CudaTimer

    problems = load_problems(workload)
    peers = select_peers(PEERS, [OURS, *(peer or ())])
    device = environment.require_gpu()
    timer = CudaTimer(Protocol.flush_mib)
    rows: list[dict[str, Any]] = []
    for problem in track(problems, "measuring", transient=True):
        rows += running.measure(problem, peers, rounds, timer, device)
    Console().print(_table(rows))
    if out is not None:
        facts = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": environment.commit(),
            "device": environment.device_facts(device),
            "versions": environment.versions(),
            "rows": rows,
        }
        out.write_text(json.dumps(facts, indent=1) + "\n")


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("problem", "", "variant", "TFLOP/s", "", box=None)
    for row in rows:
        if "failed" in row:
            table.add_row(row["problem"], f"[red]{row['failed']}[/]")
            continue
        wrong = "" if row["passed"] else "[red]wrong[/]"
        table.add_row(row["problem"], row["peer"], row["variant"], f"{row['tflops']:.0f}", wrong)
    return table


def main() -> None:
    try:
        app()
    except UserError as refusal:
        typer.echo(f"error: {refusal}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
