"""`python -m benchmarks.micro`: rates of single units, d64 forward in miniature."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hopper_attention.bench.measure import environment
from hopper_attention.errors import UserError

from .kernel import Case
from .measure import Figure, Gpu
from .programs import PROGRAMS, cases

Selection = Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(PROGRAMS)}.")]

SLOW = 1.15
"""Times the model's clocks: red in the table."""


def run(
    programs: Selection = None,
    listing: Annotated[bool, typer.Option("--list", help="List programs and cases.")] = False,
    ptx: Annotated[
        Path | None, typer.Option(help="Folder to write the kernels' PTX to, instead of running.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Result to write.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Launches that count.")] = 5,
    minutes: Annotated[float, typer.Option(help="After which no case begins.")] = 1.5,
) -> None:
    """Time small kernels on a Hopper GPU, one effect each; README.md beside this reads them."""
    selected = _select(programs or [])
    if listing:
        _print_list(selected)
        return
    if ptx is not None:
        _write_ptx(selected, ptx)
        return
    device = environment.require_gpu()
    console = Console()
    gpu = Gpu(device)
    figures: list[Figure] = []
    end = monotonic() + 60 * minutes
    for case in track(selected, "measuring", console=console, transient=True):
        if monotonic() < end:
            figures += gpu.measure(case, repeats)
    console.print(_table(figures))
    if out is not None:
        out.write_text(json.dumps(_result(figures, device), indent=1) + "\n")


def _select(programs: list[str]) -> list[Case]:
    for program in programs:
        if program not in PROGRAMS:
            raise UserError(f"unknown program {program!r}; there are: {', '.join(PROGRAMS)}")
    return [case for case in cases() if not programs or case.program in programs]


def _print_list(selected: list[Case]) -> None:
    table = Table("program", "case", "threads", "shared memory", box=None)
    for case in selected:
        table.add_row(case.program, case.name, str(case.threads), f"{case.shared_bytes} B")
    console = Console()
    console.print(table)
    for program in dict.fromkeys(case.program for case in selected):
        console.print(f"{program}: {PROGRAMS[program]}")


def _write_ptx(selected: list[Case], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(selected):
        (folder / f"{case.program}_{number}.ptx").write_text(f"// {case.name}\n{case.ptx()}")
    typer.echo(f"{folder}: {len(selected)} kernels")


def _table(figures: list[Figure]) -> Table:
    table = Table(box=None)
    for column in ("program", "case", "clocks for each"):
        table.add_column(column)
    for column in ("measured", "low", "high", "model", "ratio"):
        table.add_column(column, justify="right")
    for f in figures:
        model, ratio = "", ""
        if f.model is not None:
            model = f"{f.model:g}"
            colour = "red" if f.clocks > SLOW * f.model else "green"
            ratio = f"[{colour}]{f.clocks / f.model:.2f}[/]"
        measured = (f"{f.clocks:.2f}", f"{f.low:.2f}", f"{f.high:.2f}")
        table.add_row(f.program, f.case, f.kind, *measured, model, ratio)
    return table


def _result(figures: list[Figure], device: Any) -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": environment.commit(),
        "device": environment.device_facts(device),
        "versions": environment.versions(),
        "figures": [asdict(figure) for figure in figures],
    }


def main() -> None:
    try:
        typer.run(run)
    except UserError as refusal:
        typer.echo(f"error: {refusal}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
