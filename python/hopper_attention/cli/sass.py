"""`hopper-attention sass`: main loops of the compiled kernels, and what they predict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from hopper_attention import _cuda
from hopper_attention.errors import UserError

if TYPE_CHECKING:
    from hopper_attention.sass.report import MainLoop, Row

CLOCK_UNITS = ("tensor", "mufu", "alu", "issue", "shared")


def sass(
    patterns: Annotated[
        list[str] | None, typer.Argument(help="Instances, with wildcards; all by default.")
    ] = None,
    clock_ghz: Annotated[
        float, typer.Option(min=0.1, help="Of the SMs, for the predicted TFLOP/s.")
    ] = 1.755,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Show the kernels of this cubin, object or folder as well."),
    ] = None,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Compare two builds: folders, files, or what --json wrote."),
    ] = None,
    budget: Annotated[
        Path | None,
        typer.Option(help="Exit with code 1 if a main loop is more than 2 % over this budget."),
    ] = None,
    update_budget: Annotated[
        Path | None, typer.Option(help="Write the present figures to this budget.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why the figures changed, for --update-budget.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Show main-loop instructions by pipe, predicted clocks and TFLOP/s of the compiled kernels."""
    from hopper_attention.sass import report

    console = Console()
    patterns = patterns or ["*"]
    if update_budget is not None and not reason.strip():
        raise UserError("--update-budget needs a --reason")
    if diff is not None:
        pairs = report.growth(*(report.rows_of(path, clock_ghz, patterns) for path in diff))
        if as_json:
            changes = [
                {"name": name, "loop": loop, "before": asdict(old), "after": asdict(new)}
                for name, loop, old, new in pairs
            ]
            typer.echo(json.dumps(changes, indent=1))
        else:
            console.print(_difference(pairs))
        return

    rows = report.rows_of(Path(_cuda.__file__), clock_ghz, patterns)
    if update_budget is not None:
        known = report.read_budget(update_budget) if update_budget.exists() else {}
        report.write_budget(update_budget, report.updated_budget(rows, known, reason))
    faults = report.over_budget(rows, report.read_budget(budget)) if budget else []
    rows += [row for path in against or () for row in report.rows_of(path, clock_ghz)]
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        console.print(_instructions(rows))
        console.print(_clocks(rows, clock_ghz))
        console.print(_schedules(rows))
    for fault in faults:
        typer.echo(f"over budget: {fault}", err=True)
    raise typer.Exit(1 if faults else 0)


def _instructions(rows: Sequence[Row]) -> Table:
    columns = ("regs", "spill", "all", "tens", "mufu", "fma", "alu", "cvt", "lsu", "unif", "ctl")
    table = _table("Main loops: instructions of a consumer warp and pass", *columns)
    for row in rows:
        for name, loop in row.loops.items():
            figures = (row.registers, row.spills, loop.instructions, *loop.pipes.values())
            table.add_row(_label(row, name), *map(str, figures))
    return table


def _clocks(rows: Sequence[Row], clock_ghz: float) -> Table:
    title = f"Predicted clocks of an SM and pass; TFLOP/s at {clock_ghz} GHz"
    table = _table(title, *CLOCK_UNITS, "bound", "TFLOP/s")
    for row in rows:
        for name, loop in row.loops.items():
            clocks = [str(loop.clocks[unit]) for unit in CLOCK_UNITS]
            table.add_row(_label(row, name), *clocks, loop.bound, f"{loop.tflops:.0f}")
    return table


def _schedules(rows: Sequence[Row]) -> Table:
    table = _table("Schedule of one warp", "stall", "run", "EX2")
    for row in rows:
        for name, loop in row.loops.items():
            run = f"{loop.longest_run} {loop.longest_run_pipe}"
            ex2 = "/".join(map(str, loop.ex2))
            table.add_row(_label(row, name), str(loop.stalls), run, ex2)
    return table


def _table(title: str, *columns: str) -> Table:
    """Sized for 80 columns of a terminal."""
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    table.add_column("kernel", overflow="ellipsis", no_wrap=True, max_width=21)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _label(row: Row, loop: str) -> str:
    return row.name if loop == "main" else f"  {loop} loop"


def _difference(pairs: Sequence[tuple[str, str, MainLoop, MainLoop]]) -> Table:
    title = "Main loops: instructions before and after; stall: change of the sum of stall counts"
    table = _table(title, "loop", "before", "after", "change", "stall", "clocks", "TFLOP/s")
    table.add_column("by pipe")
    for name, loop, old, new in pairs:
        pipes = {
            pipe: new.pipes.get(pipe, 0) - old.pipes.get(pipe, 0)
            for pipe in {**old.pipes, **new.pipes}
        }
        change = new.instructions / old.instructions - 1
        table.add_row(
            name,
            loop,
            str(old.instructions),
            str(new.instructions),
            f"{change:+.1%}" if change else "=",
            f"{new.stalls - old.stalls:+d}",
            f"{max(new.clocks.values()) - max(old.clocks.values()):+d}",
            f"{new.tflops - old.tflops:+.0f}",
            " ".join(f"{pipe} {count:+d}" for pipe, count in pipes.items() if count),
        )
    return table
