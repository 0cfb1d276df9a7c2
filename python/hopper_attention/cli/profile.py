"""`hopper-attention profile`: Nsight Compute in one command; timelines."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from hopper_attention import _cuda
from hopper_attention.errors import UserError

if TYPE_CHECKING:
    from hopper_attention.bench.data.workloads import Problem
    from hopper_attention.profiling.summary import Summary

profile = typer.Typer(help="See where a kernel's time goes.", no_args_is_help=True)

DEFAULT = "fa3/forward_bf16_d128_causal_b4_s4096"


@profile.command()
def ncu(
    workload: Annotated[str, typer.Option("--workload", "-w", help="One problem.")] = DEFAULT,
    out: Annotated[Path, typer.Option(help="Report to write.")] = Path("profile.ncu-rep"),
    existing: Annotated[
        Path | None,
        typer.Option("--import", help="Read this report (.ncu-rep, or .csv of the raw page)."),
    ] = None,
    roofline: Annotated[Path | None, typer.Option(help="PNG to write.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Profile one launch with Nsight Compute, keep the report, and say what it means."""
    from hopper_attention.bench.measure.environment import require_gpu
    from hopper_attention.profiling import ncu as nsight
    from hopper_attention.profiling.report import load
    from hopper_attention.profiling.roofline import write_roofline
    from hopper_attention.profiling.summary import summarise

    problem = _one_problem(workload)
    instance = _instance(problem)
    if existing is None:
        require_gpu()
        existing = nsight.run(instance, problem, out)
        Console(stderr=True).print(f"report: {existing}")
    summary = summarise(load(existing, instance), problem, _roles(instance))
    if roofline is not None:
        write_roofline(summary, problem, roofline)
    if as_json:
        typer.echo(json.dumps({"problem": problem.name, **asdict(summary)}, indent=1))
    else:
        _print(problem, summary)


@profile.command()
def timeline(
    workload: Annotated[str, typer.Option("--workload", "-w", help="One problem.")] = DEFAULT,
    blocks: Annotated[int, typer.Option(min=1, max=132, help="To record, from the first.")] = 1,
    out: Annotated[Path, typer.Option(help="Trace for ui.perfetto.dev.")] = Path("timeline.json"),
    png: Annotated[Path, typer.Option(help="Picture of the first block.")] = Path("timeline.png"),
) -> None:
    """Record when the warps of a block wait, issue GEMMs and compute.

    On a Hopper GPU by clock stamps in the kernel; without one the simulator's cost model times
    the first block.
    """
    import torch

    from hopper_attention.bench.measure.environment import require_gpu
    from hopper_attention.bench.measure.inputs import Inputs
    from hopper_attention.profiling import spans
    from hopper_attention.profiling import timeline as recorder

    problem = _one_problem(workload)
    instance = _instance(problem)
    if torch.cuda.is_available():
        inputs = Inputs.make(problem, require_gpu())
        recorded, unit = recorder.record(inputs, instance, blocks)
        spans.write_picture(recorded, png, unit, f"{instance}, {problem.name}, block 0")
        spans.write_perfetto(recorded, out, unit)
    else:
        modelled = recorder.model(Inputs.make(problem, torch.device("cpu")), instance)
        for path in (out, png):
            path.parent.mkdir(parents=True, exist_ok=True)
        modelled.save_png(png)
        modelled.save_chrome(out)
        Console().print(f"simulator, block 0: {json.dumps(modelled.summary())}")
    Console().print(f"trace: {out} (ui.perfetto.dev); picture: {png}")


def _one_problem(pattern: str) -> Problem:
    from hopper_attention.bench.data.workloads import load_problems

    problems = load_problems([pattern])
    if len(problems) > 1:
        names = f"{problems[0].name} ... {problems[-1].name}"
        raise UserError(f"{pattern!r} is {len(problems)} problems; name one of {names}")
    return problems[0]


def _instance(problem: Problem) -> str:
    """On the current GPU, or the simulator.  Raises UserError if no compiled instance runs it."""
    import torch

    from hopper_attention.dispatch import target

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return problem.instance(target.target_for(torch.empty(0, device=device)))
    except NotImplementedError as reason:
        raise UserError(str(reason)) from None


def _roles(instance: str) -> list[str]:
    """Return roles of the instance's instructions; empty without the disassembler."""
    from hopper_attention.sass.cubin import find_cubins
    from hopper_attention.sass.disassembler import disassemble, find_nvdisasm
    from hopper_attention.sass.roles import roles_of

    if find_nvdisasm() is None:
        return []
    for cubin in find_cubins(Path(_cuda.__file__)):
        for kernel in cubin.kernels:
            if kernel.name == instance:
                return roles_of(disassemble(cubin.image)[kernel.symbol])
    return []


def _print(problem: Problem, summary: Summary) -> None:
    console = Console()
    facts = Table(show_header=False, box=None)
    facts.add_row("kernel", f"{summary.kernel}, {problem.name}")
    clock = f" at {summary.clock_ghz:.2f} GHz" if summary.clock_ghz else ""
    facts.add_row("time", f"{summary.microseconds:.1f} us{clock}")
    peak = f", {summary.peak_fraction:.1%} of the tensor cores" if summary.peak_fraction else ""
    facts.add_row("rate", f"{summary.tflops:.0f} TFLOP/s{peak}")
    if summary.waves is not None:
        facts.add_row("waves", f"{summary.waves:.2f} blocks an SM")
    console.print(facts)
    units = Table("% of peak", *summary.utilisation, box=None)
    values = ("-" if v is None else f"{v:.0f}" for v in summary.utilisation.values())
    units.add_row("", *values)
    console.print(units)
    for role, reasons in summary.stalls.items():
        shares = ", ".join(f"{reason} {share:.0%}" for reason, share in reasons.items())
        console.print(f"{role} warps: {shares}")
    for sentence in summary.advice:
        console.print(f"- {sentence}")
