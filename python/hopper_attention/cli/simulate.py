"""`hopper-attention simulate`: one attention problem on the simulator."""

from __future__ import annotations

import json
import math
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.table import Table

from hopper_attention import flash_attn_func, reference, simulator
from hopper_attention.problem.values import CAUSAL, FULL
from hopper_attention.reference.error import Error, pytorch_attention

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def simulate(
    batch: Annotated[int, typer.Option(min=1)] = 1,
    seqlen_q: Annotated[int, typer.Option(min=1, help="Query rows.")] = 128,
    seqlen_k: Annotated[int, typer.Option(min=1, help="Keys.")] = 1024,
    heads: Annotated[int, typer.Option(min=1)] = 1,
    heads_kv: Annotated[
        int | None, typer.Option(min=1, help="By default as many as heads.")
    ] = None,
    head_dim: Annotated[int, typer.Option(help="A multiple of 8 up to 256.")] = 128,
    dtype: Annotated[str, typer.Option(help="bf16 or fp16.")] = "bf16",
    causal: Annotated[bool, typer.Option(help="Bottom-right aligned mask.")] = False,
    seed: Annotated[
        int, typer.Option(min=0, help="0 is friendly; others are adversarial schedules.")
    ] = 0,
    hazards: Annotated[str, typer.Option(help="raise, warn or off.")] = "raise",
    timeline: Annotated[
        Path | None, typer.Option(help="Write the first block's Chrome/Perfetto trace here.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write its picture here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Run one attention problem on the simulator, check it, and show where its clocks go.

    The exit code is 1 if the error against FP64 exceeds twice PyTorch's in the same dtype, or if a
    hazard or an error stops the kernel.
    """
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype}; one of {', '.join(DTYPES)}", param_hint="--dtype")
    if hazards not in ("raise", "warn", "off"):
        raise typer.BadParameter(f"{hazards}; raise, warn or off", param_hint="--hazards")
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, count: int) -> torch.Tensor:
        shape = (batch, rows, count, head_dim)
        return torch.randn(shape, generator=generator).to(DTYPES[dtype])

    kv = heads_kv or heads
    q, k, v = random(seqlen_q, heads), random(seqlen_k, kv), random(seqlen_k, kv)
    console = Console(stderr=as_json)
    start = time.perf_counter()
    try:
        with (
            warnings.catch_warnings(record=True) as found,
            simulator.enabled(seed=seed, hazards=hazards),
            simulator.record() as recording,
        ):
            warnings.simplefilter("always", simulator.HazardWarning)
            out = cast(torch.Tensor, flash_attn_func(q, k, v, causal=causal))
    except simulator.SimulatorError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    seconds = time.perf_counter() - start
    problem: dict[str, Any] = {"softmax_scale": 1 / math.sqrt(head_dim)}
    problem["mask"] = CAUSAL if causal else FULL
    exact, _ = reference.attention(q, k, v, **problem, compute_dtype=torch.float64)
    pytorch_out = pytorch_attention(q, k, v, **problem)
    ours, pytorch = Error.of(out, exact), Error.of(pytorch_out, exact)
    replay = simulator.Timeline(recording.traces[0])
    if timeline is not None:
        replay.save_chrome(timeline)
    if png is not None:
        replay.save_png(png)
    report = {
        "shape": list(q.shape), "seqlen_k": seqlen_k, "heads_kv": kv, "dtype": dtype,
        "causal": causal, "seed": seed, "seconds": seconds,
        "hazards": [str(w.message) for w in found if issubclass(w.category, UserWarning)],
        "error": asdict(ours), "pytorch_error": asdict(pytorch),
        "passed": ours.within_twice(pytorch), **replay.summary(),
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        _print(console, report)
    raise typer.Exit(0 if report["passed"] else 1)


def _print(console: Console, report: dict[str, Any]) -> None:
    facts = Table(show_header=False, box=None)
    facts.add_row("kernel", f"{report['kernel']}, seed {report['seed']}")
    facts.add_row("simulated in", f"{report['seconds']:.3g} s")
    error, pytorch = report["error"]["maximum"], report["pytorch_error"]["maximum"]
    facts.add_row("max error", f"{error:.3e}; PyTorch in {report['dtype']}: {pytorch:.3e}")
    facts.add_row("hazards", "none" if not report["hazards"] else str(len(report["hazards"])))
    per_tile = report["clocks_per_tile"]
    tile = f", {per_tile:.0f} a tile" if per_tile else ""
    facts.add_row("model", f"{report['clocks']} clocks in block {report['block']}{tile}")
    busy = ", ".join(f"{name} {share:.0%}" for name, share in report["utilisation"].items())
    facts.add_row("units busy", busy)
    console.print(facts)
    for hazard in report["hazards"]:
        console.print(hazard, style="yellow", markup=False)
