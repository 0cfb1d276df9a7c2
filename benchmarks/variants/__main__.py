"""`python -m benchmarks.variants`: build and run variants of kernels; README.md says how."""

from __future__ import annotations

import json
import math
import sys
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic
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
from . import table
from .build import build as build_variants

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command("list")
def show() -> None:
    """Print the table's variants with their claims, and the plan."""
    console, variants, plan = Console(), Table(box=None), Table(box=None)
    for column in ("variant", "instances", "a model's claim", "decides"):
        variants.add_column(column, overflow="fold")
    for variant in table.variants().values():
        note = "timing only: " if variant.timing_only else ""
        instances = "\n".join(variant.patterns)
        variants.add_row(variant.name, instances, note + variant.claim, variant.decides)
    start = 0.0
    for column in ("minutes", "what"):
        plan.add_column(column)
    for step in table.plan():
        plan.add_row(f"{start:g} to {start + step.minutes:g}", step.what)
        start += step.minutes
    console.print(variants)
    console.print(plan)


@app.command()
def build(
    variants: Annotated[
        list[str] | None,
        typer.Argument(help="Of the table (default: all), or NAME=REVISION:INSTANCE[,...]."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for HOPPER_ATTENTION_PREBUILT.")] = Path(
        "build/variants"
    ),
    dry_run: Annotated[
        bool, typer.Option(help="One instance of each, to see that changes fit and nothing spills.")
    ] = False,
) -> None:
    """Compile variants beside the shipped kernels; needs no GPU."""
    console, failed = Console(), 0
    parsed = [table.Variant.parse(text) for text in variants or table.variants()]
    for name, fault in build_variants(parsed, Path.cwd(), out, try_only=dry_run):
        console.print(f"[red]{name}: {fault}[/]" if fault else name)
        failed += bool(fault)
    if failed:
        raise UserError(f"{failed} did not compile")
    if not dry_run:
        console.print(f"HOPPER_ATTENTION_PREBUILT={out} pip install .")


@app.command()
def run(
    workload: Annotated[list[str], typer.Option("--workload", "-w", help="With wildcards.")],
    peer: Annotated[
        list[str] | None, typer.Option("--peer", "-p", help="Beside them, with wildcards.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="That count.")] = 6,
    minutes: Annotated[float, typer.Option(help="After which no problem begins.")] = math.inf,
    out: Annotated[Path | None, typer.Option("--json", help="Result to write.")] = None,
) -> None:
    """Time the variants of this build on a Hopper GPU, in turns."""
    from hopper_attention.bench.measure.protocol import CudaTimer

    end = monotonic() + 60 * minutes
    problems = [problem for pattern in workload for problem in load_problems([pattern])]
    peers = select_peers(PEERS, [OURS, *(peer or ())])
    device = environment.require_gpu()
    timer = CudaTimer(Protocol.flush_mib)
    rows: list[dict[str, Any]] = []
    for problem in track(list(dict.fromkeys(problems)), "measuring", transient=True):
        if monotonic() > end:
            rows.append({"problem": problem.name, "failed": "no time left"})
            continue
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


@app.command("plan")
def carry_out(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("build/plan"),
) -> None:
    """Carry out the plan on a Hopper GPU, with a build of the table's variants."""
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    for step in table.plan():
        console.rule(step.what)
        console.print(step.run(out))


def _table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("problem", "", "variant", "TFLOP/s", "", box=None)
    for row in rows:
        if "failed" in row:
            shown.add_row(row["problem"], f"[red]{row['failed']}[/]")
            continue
        wrong = {True: "", False: "[red]wrong[/]", None: "timing only"}[row["passed"]]
        shown.add_row(row["problem"], row["peer"], row["variant"], f"{row['tflops']:.0f}", wrong)
    return shown


def main() -> None:
    try:
        app()
    except UserError as refusal:
        typer.echo(f"error: {refusal}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
