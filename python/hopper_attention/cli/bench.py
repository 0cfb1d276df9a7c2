"""`hopper-attention bench`: run, list, compare, report; call overhead."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hopper_attention import files
from hopper_attention.dispatch import manifest
from hopper_attention.errors import UserError

if TYPE_CHECKING:
    from hopper_attention.bench.data.results import Row, Run
    from hopper_attention.bench.data.workloads import Problem
    from hopper_attention.bench.measure.protocol import Protocol
    from hopper_attention.bench.measure.runner import Peer

bench = typer.Typer(
    help="Measure attention against its peers, and compare and report results.",
    invoke_without_command=True,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@bench.callback()
def run(
    context: typer.Context,
    listing: Annotated[bool, typer.Option("--list", help="List workloads and peers.")] = False,
    workload: Annotated[
        list[str] | None, typer.Option("--workload", "-w", help="Names, with wildcards.")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option("--peer", "-p", help="Names, with wildcards.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Result to write, as it grows.")] = Path("bench.json"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Even if --out holds another result.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Folder for PNGs.")] = None,
    quantisation: Annotated[
        bool, typer.Option("--quantisation", help="Also the kernels that quantise to FP8.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=2, help="Rounds that count.")] = 20,
    mode: Annotated[
        list[str] | None, typer.Option(help="burst or sustained; both by default.")
    ] = None,
    load_seconds: Annotated[
        float,
        typer.Option(min=5, help="Of load before `sustained`: power must be steady."),
    ] = 5.0,
    idle_seconds: Annotated[
        float, typer.Option(min=0, help="Without work before a round of `burst`.")
    ] = 0.5,
) -> None:
    """Time workloads on a Hopper GPU, each peer in turn, every result checked against FP64."""
    if context.invoked_subcommand is not None:
        return
    from hopper_attention.bench.data.workloads import load_problems
    from hopper_attention.bench.measure.environment import require_gpu
    from hopper_attention.bench.measure.protocol import Protocol
    from hopper_attention.benchmarks.peers import PEERS

    problems = load_problems(workload or ())
    peers = select_peers(PEERS, peer)
    if listing:
        _print_list(problems, peers)
        return
    modes = _select_modes(mode)
    device = require_gpu()
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; move it, give another --out, or --overwrite")
    protocol = Protocol(
        repeats=repeats, load_seconds=load_seconds, idle_seconds=idle_seconds, modes=modes
    )
    console = Console()
    result = _measure(console, problems, peers, protocol, device, out, quantisation)
    console.print(_summary(result))
    console.print(f"{len(result.rows)} rows in {out}")
    if plot is not None:
        _plot(console, result, plot)


def select_peers(peers: Sequence[Peer], patterns: Sequence[str] | None) -> list[Peer]:
    for pattern in patterns or ():
        if not any(fnmatchcase(peer.name, pattern) for peer in peers):
            known = ", ".join(peer.name for peer in peers)
            raise UserError(f"unknown peer {pattern!r}; there are: {known}")
    return [p for p in peers if not patterns or any(fnmatchcase(p.name, x) for x in patterns)]


def _select_modes(names: Sequence[str] | None) -> tuple[str, ...]:
    from hopper_attention.bench.data.results import MODES

    for name in names or ():
        if name not in MODES:
            raise UserError(f"unknown mode {name!r}; there are: {', '.join(MODES)}")
    return tuple(mode for mode in MODES if not names or mode in names)


def _print_list(problems: Sequence[Problem], peers: Sequence[Peer]) -> None:
    from hopper_attention.bench.data.workloads import descriptions

    about = descriptions()
    table = Table("workload", "problems", "", box=None)
    for name in dict.fromkeys(problem.workload for problem in problems):
        count = sum(problem.workload == name for problem in problems)
        table.add_row(name, str(count), about[name])
    console = Console()
    console.print(table)
    console.print(f"\npeers: {', '.join(peer.name for peer in peers)}")


def _measure(
    console: Console,
    problems: Sequence[Problem],
    peers: Sequence[Peer],
    protocol: Protocol,
    device: Any,
    out: Path,
    quantisation: bool,
) -> Run:
    """The result, which is also written to `out` after every problem."""
    from hopper_attention.bench.data import results
    from hopper_attention.bench.measure import environment
    from hopper_attention.bench.measure.baselines import baseline_rows
    from hopper_attention.bench.measure.protocol import CudaTimer
    from hopper_attention.bench.measure.quantisation import quantisation_rows
    from hopper_attention.bench.measure.runner import run_problem

    result = results.Run(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=environment.commit(),
        device=environment.device_facts(device),
        versions=environment.versions(),
        protocol=asdict(protocol),
        rows=[],
    )
    timer = CudaTimer(protocol.flush_mib)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("cuBLAS and copy", total=len(problems))
        result.rows.extend(baseline_rows(protocol, timer))
        if quantisation:
            result.rows.extend(quantisation_rows(protocol, timer, device))
        results.save(out, result)
        for problem in problems:
            progress.update(task, description=problem.name)
            for row in run_problem(problem, peers, protocol, timer, device):
                result.rows.append(row)
                if row.status in ("wrong", "failed"):
                    progress.print(f"[red]{row.peer}: {row.status}: {row.reason}[/]")
            results.save(out, result)
            progress.advance(task)
    return result


def _summary(result: Run) -> Table:
    mode = result.protocol["modes"][-1]
    table = Table(title=f"{result.device.get('name', '')}, {mode}", box=None)
    figures = ("ms", "±", "TFLOP/s", "TB/s", "of cuBLAS, copy", "of cuDNN", "MHz", "W")
    for column in ("problem", "peer", *figures):
        table.add_column(column, justify="left" if column in ("problem", "peer") else "right")
    for row in result.rows:
        if row.mode == mode and row.status in ("ok", "wrong"):
            table.add_row(row.problem, row.peer, *_figures(result, row))
    return table


def _figures(result: Run, row: Row) -> list[str]:
    if row.status == "wrong":
        return ["[red]wrong[/]", *[""] * 7]
    time, fraction, beside = row.milliseconds, result.fraction(row), result.beside_cudnn(row)
    return [
        f"{time.median:.3f}",
        f"{time.spread:.1%}",
        f"{row.tflops:.0f}" if row.flop else "",
        f"{row.terabytes_per_second:.2f}" if row.bytes else "",
        "" if fraction is None else f"{fraction:.2f}",
        "" if beside is None else f"{beside:.2f}",
        f"{median(row.sm_mhz):.0f}" if row.sm_mhz else "",
        f"{median(row.power_w):.0f}" if row.power_w else "",
    ]


def _plot(console: Console, result: Run, folder: Path) -> None:
    from hopper_attention.bench.report.plots import write_plots

    for path in write_plots(result, folder):
        console.print(str(path))


@bench.command("plot")
def plot(
    result: Annotated[Path, typer.Argument(help="Result of a run.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for PNGs.")] = Path("plots"),
) -> None:
    """Draw a result: bars by sequence length, a panel for each head dim and mask."""
    from hopper_attention.bench.data.results import load

    _plot(Console(), load(result), folder)


@bench.command()
def compare(before: Path, after: Path, as_json: AsJson = False) -> None:
    """Show what became faster or slower between two results, beside the noise."""
    from hopper_attention.bench.data.results import load
    from hopper_attention.bench.report.compare import compare as compare_runs

    changes = compare_runs(load(before), load(after))
    if as_json:
        typer.echo(json.dumps([asdict(change) for change in changes], indent=1))
        return
    table = Table("problem", "peer", "mode", box=None)
    for column in ("before ms", "after ms", "speedup", "noise"):
        table.add_column(column, justify="right")
    table.add_column("")
    colours = {"faster": "green", "slower": "red", "same": "dim"}
    for c in changes:
        figures = (f"{c.before_ms:.3f}", f"{c.after_ms:.3f}", f"{c.speedup:.3f}", f"±{c.noise:.1%}")
        verdict = f"[{colours[c.verdict]}]{c.verdict}[/]"
        table.add_row(c.problem, c.peer, c.mode, *figures, verdict)
    Console().print(table)


@bench.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder with results of runs.")] = Path(
        "benchmarks/results"
    ),
    ledger: Annotated[Path, typer.Option(help="Ledger of instances; brought up to date.")] = Path(
        "benchmarks/ledger.json"
    ),
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("docs/results.md"),
) -> None:
    """Write the results page from the committed results, and the ledger of instances.

    The ledger's names are those of the library's lists, whichever of them this build has.
    """
    from hopper_attention.bench.data.results import load_folder
    from hopper_attention.bench.report import ledger as ledgers
    from hopper_attention.bench.report.report import markdown

    for path in (results, out.parent, ledger.parent):
        if not path.is_dir():
            raise UserError(f"{path} is not a folder; run this in the repository, or say where")
    runs, checks = load_folder(results), ledgers.load_checks(results / "checks")
    entries = ledgers.update(ledgers.read(ledger), runs, checks, manifest.listed())
    ledgers.write(ledger, entries)
    files.replace(out, markdown(runs, entries))
    typer.echo(f"{out}: {len(runs)} results, {len(entries)} instances")
    if gone := entries.keys() - manifest.listed().keys():
        typer.echo(f"{ledger} has entries of no instance that is listed: {', '.join(sorted(gone))}")


@bench.command()
def overhead(
    as_json: AsJson = False,
    repeats: Annotated[int, typer.Option(min=3, help="Samples of 1000 calls.")] = 30,
) -> None:
    """Time flash_attn_func from the Python call to a launch that does nothing; needs no GPU."""
    from hopper_attention.bench.measure import overhead as measurement

    figures = measurement.measure(repeats)
    if as_json:
        typer.echo(json.dumps(figures, indent=1))
        return
    table = Table("", box=None)
    for column in ("median", "±", "minimum"):
        table.add_column(column, justify="right")
    for name, summary in {**figures["call_us"], **figures["start_ms"]}.items():
        unit = "us" if name in figures["call_us"] else "ms"
        label = name.replace("_", " ")
        median, minimum = (f"{summary[key]:.2f} {unit}" for key in ("median", "minimum"))
        table.add_row(label, median, f"{summary['spread']:.1%}", minimum)
    console = Console()
    console.print(table)
    console.print(f"included: {'; '.join(figures['included'])}")
    console.print(f"not included: {'; '.join(figures['not_included'])}")
