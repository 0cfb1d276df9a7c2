"""`hopper-attention accuracy`: FP8's error by recipe; the paper's comparison; accumulation."""

from __future__ import annotations

import enum
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hopper_attention import simulator
from hopper_attention.accuracy.inputs import RANDOM, Distribution, Inputs, Size, activations, draw
from hopper_attention.accuracy.measure import (
    BASELINES,
    PAPER,
    Accumulated,
    Accumulation,
    Row,
    accumulation_modes,
    compare_with_paper,
    gain,
    measure,
    pooled,
    variants,
)
from hopper_attention.accuracy.measure import accumulation as accumulate
from hopper_attention.bench.measure import environment
from hopper_attention.errors import UserError
from hopper_attention.problem.quantization import Recipe
from hopper_attention.reference.fp8 import HOPPER_BITS, Cut

CPU = "CPU: emulated, not a GPU"
SIMULATOR = "simulator"

accuracy = typer.Typer(
    help="Measure what FP8 attention loses, against FP64.", invoke_without_command=True
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Png = Annotated[Path | None, typer.Option(help="Write a plot here.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the inputs.")]
HeadDim = Annotated[int, typer.Option(min=8, max=256)]


class Backend(str, enum.Enum):
    EMULATION = "emulation"
    KERNEL = "kernel"


@accuracy.callback()
def recipes(
    context: typer.Context,
    seqlen: Annotated[
        int, typer.Option(min=1, help="Queries and keys; a needle lies in 8 times the keys.")
    ] = 2048,
    heads: Annotated[int, typer.Option(min=1)] = 2,
    head_dim: HeadDim = 128,
    seed: Seed = 0,
    distribution: Annotated[
        list[Distribution] | None, typer.Option(help="Repeat for more; default: all random ones.")
    ] = None,
    recipe: Annotated[
        list[Recipe] | None, typer.Option(help="Repeat for more; default: all.")
    ] = None,
    accumulation: Annotated[
        list[Accumulation] | None, typer.Option(help="Repeat; default: two_level and plain.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--activations", help="Folder that train_gpt.py wrote.")
    ] = None,
    layer: Annotated[int, typer.Option(min=0, help="Of --activations.")] = 0,
    backend: Annotated[Backend, typer.Option(help="What computes.")] = Backend.EMULATION,
    png: Png = None,
    as_json: AsJson = False,
) -> None:
    """FP8 attention by recipe and input, with and without rotation and centring, beside bf16."""
    if context.invoked_subcommand is not None:
        return
    size = Size(seqlen, heads, head_dim)
    chosen = variants(recipe or tuple(Recipe), accumulation or list(Accumulation)[:2])
    problems = _problems(distribution, size, seed, checkpoint, layer)
    rows: list[Row] = []
    count = len(problems) * (len(BASELINES) + len(chosen))
    with _progress(count) as step, _device_of(backend) as device:
        for make in problems:
            for row in measure(make(), chosen, device):
                rows.append(row)
                step(f"{row.distribution}: {row.method}")
    facts = _facts(seed, device)
    if as_json:
        typer.echo(json.dumps(facts | {"rows": [asdict(row) for row in rows]}, indent=1))
    else:
        for name in dict.fromkeys(row.distribution for row in rows):
            Console().print(_table([row for row in rows if row.distribution == name]))
    if png is not None:
        from hopper_attention.accuracy.plots import write_recipes

        write_recipes(png, rows, _caption(facts))


@contextmanager
def _device_of(backend: Backend) -> Iterator[torch.device | None]:
    """The GPU; without one the kernels run on the simulator: with 14 bits of sums, and slowly."""
    if backend is Backend.EMULATION:
        yield None
    elif torch.cuda.is_available():
        yield environment.require_gpu()
    else:
        with simulator.enabled(fp8_accumulator_bits=HOPPER_BITS):
            yield torch.device("cpu")


@accuracy.command()
def paper(
    seqlen: Annotated[
        list[int] | None, typer.Option(min=1, help="Repeat for more; default: 1k to 16k.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1)] = 2,
    head_dim: HeadDim = 128,
    queries: Annotated[int, typer.Option(min=1, help="At most so many of each head.")] = 2048,
    seeds: Annotated[int, typer.Option(min=1, help="So many draws of the inputs.")] = 4,
    seed: Seed = 0,
    png: Png = None,
    as_json: AsJson = False,
) -> None:
    """FlashAttention-3's comparison: per-tensor scales against block scales with rotation."""
    lengths = seqlen or [1024, 2048, 4096, 8192, 16384]
    runs: dict[int, list[dict[str, float]]] = {n: [] for n in lengths}
    with _progress(len(lengths) * seeds) as step:
        for n, chosen in itertools.product(lengths, range(seed, seed + seeds)):
            runs[n].append(compare_with_paper(Size(n, heads, head_dim, queries), chosen))
            step(f"{n} keys, seed {chosen}")
    facts = _facts(seed) | {"heads": heads, "head_dim": head_dim, "queries": queries}
    if as_json:
        typer.echo(json.dumps(facts | {"paper": PAPER, "rmse": runs}, indent=1))
    else:
        Console().print(_paper_table(runs))
    if png is not None:
        from hopper_attention.accuracy.plots import write_paper

        sizes = f"{heads} heads of {head_dim}, at most {queries} queries each, {seeds} seeds; "
        write_paper(png, runs, sizes + _caption(facts))


@accuracy.command("accumulation")
def accumulation_study(
    keys: Annotated[
        list[int] | None, typer.Option(min=1, help="Repeat for more; default: 1k to 64k.")
    ] = None,
    recipe: Annotated[Recipe, typer.Option(help="Of Q, K and V.")] = Recipe.PER_TENSOR,
    queries: Annotated[int, typer.Option(min=1)] = 64,
    head_dim: HeadDim = 128,
    v_mean: Annotated[float, typer.Option(help="Mean of the values, whose deviation is 1.")] = 0.5,
    cut: Annotated[Cut, typer.Option(help="What is cut to 14 bits; products: slow.")] = Cut.SUMS,
    seed: Seed = 0,
    png: Png = None,
    as_json: AsJson = False,
) -> None:
    """Sums of 14 bits over long contexts: plain, in two levels, and exact."""
    lengths = keys or [1024, 4096, 16384, 65536]
    rows: list[Accumulated] = []
    with _progress(len(lengths) * len(accumulation_modes())) as step:
        for n in lengths:
            size = Size(n, heads=1, head_dim=head_dim, queries=queries)
            for row in accumulate(size, recipe, v_mean, seed, cut):
                rows.append(row)
                step(f"{n} keys: {row.label}")
    facts = _facts(seed) | {"recipe": recipe.value, "queries": queries, "v_mean": v_mean}
    facts["cut"] = cut.value
    if as_json:
        typer.echo(json.dumps(facts | {"rows": [asdict(row) for row in rows]}, indent=1))
    else:
        Console().print(_accumulation_table(rows))
    if png is not None:
        from hopper_attention.accuracy.plots import write_accumulation

        sizes = f"{recipe.value}, {queries} queries, d {head_dim}, V of mean {v_mean:g}; "
        write_accumulation(png, rows, sizes + _caption(facts))


def _problems(
    distributions: Sequence[Distribution] | None,
    size: Size,
    seed: int,
    checkpoint: Path | None,
    layer: int,
) -> list[Callable[[], Inputs]]:
    """Made one after the other: a long context is large."""
    chosen = list(distributions or (() if checkpoint else RANDOM))
    if Distribution.ACTIVATIONS in chosen and checkpoint is None:
        raise UserError("--distribution activations needs --activations CHECKPOINT")
    problems: list[Callable[[], Inputs]] = [
        lambda name=name: draw(name, size, seed)  # type: ignore[misc]
        for name in chosen
        if name is not Distribution.ACTIVATIONS
    ]
    if checkpoint is not None:
        problems.append(lambda: activations(checkpoint, layer))
    return problems


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; what it yields is called when a step is done.

    Inside, torch has one thread: on tiles as small as these more are slower where others compute
    as well, and their number would change last bits.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=total)
            yield lambda text: progress.update(task, advance=1, description=text)
    finally:
        torch.set_num_threads(threads)


def _facts(seed: int, device: torch.device | None = None) -> dict[str, Any]:
    """`device`: where kernels ran, the simulator's is a CPU."""
    where = f"{CPU}, {os.cpu_count()} cores"
    if device is not None:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else SIMULATOR
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": environment.commit(),
        "backend": (Backend.EMULATION if device is None else Backend.KERNEL).value,
        "device": where,
        "versions": environment.versions(),
        "seed": seed,
    }


def _caption(facts: dict[str, Any]) -> str:
    """When, what and where, by the run's facts; lines are of what is always computed on a CPU."""
    where = "emulated on a CPU"
    if facts["backend"] == Backend.KERNEL.value:
        where = f"bars: kernels on {_with_article(facts['device'])}; lines: a CPU"
    commit, _, changed = facts["commit"].partition("+")
    mark = "+" if changed or facts["commit"].endswith("+") else ""
    return f"{facts['date'][:10]}, commit {commit[:7]}{mark}, seed {facts['seed']}, {where}"


def _with_article(device: str) -> str:
    return f"the {device}" if device == SIMULATOR else f"one {device}"


def _table(rows: Sequence[Row]) -> Table:
    """A distribution's; the least error among FP8's is bold."""
    title = f"{rows[0].distribution}: {rows[0].shape}"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("method", no_wrap=True, min_width=max(len(row.method) for row in rows))
    table.add_column("PV")
    for column in ("RMSE", "of output", "max error", "1 - cosine"):
        table.add_column(column, justify="right")
    least = min((row.rmse for row in rows if row.accumulation), default=0.0)
    for row in rows:
        style = "dim" if not row.accumulation else "bold" if row.rmse == least else None
        table.add_row(
            row.method, row.accumulation, f"{row.rmse:.2e}", f"{row.relative:.2%}",
            f"{row.maximum:.2e}", f"{1 - row.cosine:.1e}", style=style,
        )  # fmt: skip
    return table


def _paper_table(runs: dict[int, list[dict[str, float]]]) -> Table:
    """Pooled over seeds, with the range of their gains."""
    methods = list(next(iter(runs.values()))[0])
    table = Table("keys", box=None)
    for column in (*methods, "gain", "of a seed"):
        table.add_column(column.replace("+hadamard", "\n+hadamard"), justify="right")
    for n, seeds in runs.items():
        found, gains = pooled(seeds), [gain(run) for run in seeds]
        figures = [f"{found[name]:.2e}" for name in methods]
        spread = f"{min(gains):.2f} to {max(gains):.2f}"
        table.add_row(str(n), *figures, f"{gain(found):.2f}", spread)
    cells = [f"{PAPER[name]:.1e}" if name in PAPER else "" for name in methods]
    table.add_row("paper", *cells, f"{gain(PAPER):.2f}", "", style="dim")
    return table


def _accumulation_table(rows: Sequence[Accumulated]) -> Table:
    table = Table("keys", "PV", box=None)
    for column in ("RMSE", "of exact sums'", "difference to those"):
        table.add_column(column, justify="right")
    exact = {row.keys: row.rmse for row in rows if row.label == "exact"}
    for row in rows:
        share = f"{row.rmse / exact[row.keys]:.3f}"
        table.add_row(str(row.keys), row.label, f"{row.rmse:.2e}", share, f"{row.from_exact:.1e}")
    return table
