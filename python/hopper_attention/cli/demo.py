"""`hopper-attention demo`: a transformer layer's causal attention on real text."""

from __future__ import annotations

import json
import math
import pydoc_data.topics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from hopper_attention import flash_attn_func, reference, simulator
from hopper_attention.dispatch import instances, manifest
from hopper_attention.dispatch.manifest import CompiledInstance
from hopper_attention.dispatch.target import REFERENCE, VARIABLE, check_gpu, target_for
from hopper_attention.errors import UserError
from hopper_attention.problem.values import CAUSAL
from hopper_attention.reference.error import Error, pytorch_attention

HEAD_DIM = 128
TIMED_RUNS = 20


@dataclass(frozen=True)
class Size:
    tokens: int
    heads: int
    heads_kv: int


GPU_SIZE = Size(tokens=16384, heads=16, heads_kv=4)
SIMULATOR_SIZE = Size(tokens=384, heads=4, heads_kv=2)


def demo(
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text to attend over; by default CPython's own help topics.", exists=True
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Bytes of the text to use.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and of the simulator.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Run one transformer layer's causal attention over real text through the compiled kernel.

    On a Hopper GPU at full size, otherwise on the simulator at a small one.  The exit code is 1 if
    the error against FP64 exceeds twice PyTorch's in the same dtype.
    """
    device = _device()
    size = GPU_SIZE if device.type == "cuda" else SIMULATOR_SIZE
    data = text.read_bytes() if text else _help_topics()
    count = min(tokens or size.tokens, len(data))
    if count == 0:
        raise typer.BadParameter(f"{text} is empty", param_hint="--text")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=as_json)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("projecting the text to Q, K, V", total=None)
        q, k, v = layer_inputs(data[:count], size, device, seed)
        where = "GPU" if device.type == "cuda" else "simulator"
        progress.update(task, description=f"attention of {count} tokens on the {where}")
        instance = _instance(q)
        out, seconds = _run(q, k, v, seed)
        progress.update(task, description="the same in FP64, and by PyTorch in bf16")
        scale = 1.0 / math.sqrt(HEAD_DIM)
        exact, _ = reference.attention(
            q, k, v, softmax_scale=scale, mask=CAUSAL, compute_dtype=torch.float64
        )
        torch_out = pytorch_attention(q, k, v, softmax_scale=scale, mask=CAUSAL)
        progress.update(task, description="done", total=1, completed=1)
    ours, pytorch = Error.of(out, exact), Error.of(torch_out, exact)
    report = {
        "text": str(text) if text else "CPython's pydoc_data.topics",
        "shape": list(q.shape),
        "heads_kv": size.heads_kv,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "simulator",
        "instance": asdict(instance),
        "seconds": seconds,
        "error": asdict(ours),
        "pytorch_error": asdict(pytorch),
        "passed": ours.within_twice(pytorch),
    }
    if device.type == "cuda":
        report["tflops"] = 2 * count * count * HEAD_DIM * size.heads / seconds / 1e12
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        _print(console, report)
    raise typer.Exit(0 if report["passed"] else 1)


def _device() -> torch.device:
    """The first GPU that the kernels support, else the CPU."""
    if torch.cuda.is_available():
        try:
            device = torch.device("cuda", torch.cuda.current_device())
            check_gpu(device)
            return device
        except NotImplementedError as reason:
            Console(stderr=True).print(f"[yellow]{reason}; using the simulator[/]")
    return torch.device("cpu")


def _instance(q: Tensor) -> CompiledInstance:
    """Return the instance that attention of q runs.  Raises UserError if it is not compiled."""
    target = target_for(q)
    if target.kernels == REFERENCE:
        raise UserError(f"{VARIABLE}={target.kernels}: the demo is of a compiled kernel")
    kind = ("bf16", HEAD_DIM, HEAD_DIM, "causal", False, False)
    try:
        return manifest.instances()[instances.forward_instance(*kind, target)]
    except NotImplementedError as reason:
        raise UserError(str(reason)) from None


def _help_topics() -> bytes:
    return "\n".join(pydoc_data.topics.topics.values()).encode()


def layer_inputs(
    data: bytes, size: Size, device: torch.device, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes -> embeddings with sinusoidal positions -> RMSNorm -> Q, K, V projections, in bf16."""
    generator = torch.Generator().manual_seed(seed)
    hidden = size.heads * HEAD_DIM

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long().to(device)
    angle = torch.arange(len(data), device=device)[:, None] * torch.exp(
        torch.arange(0, hidden, 2, device=device) * (-math.log(10000.0) / hidden)
    )
    position = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)
    x = torch.nn.functional.rms_norm(weight(256, hidden)[ids] + position, (hidden,))

    def project(heads: int) -> Tensor:
        y = x @ weight(hidden, heads * HEAD_DIM) / math.sqrt(hidden)
        return y.view(1, len(data), heads, HEAD_DIM).to(torch.bfloat16)

    return project(size.heads), project(size.heads_kv), project(size.heads_kv)


def _run(q: Tensor, k: Tensor, v: Tensor, seed: int) -> tuple[Tensor, float]:
    """Causal attention and the seconds of one call: on a GPU the median after a warm-up."""
    if q.is_cuda:
        out = flash_attn_func(q, k, v, causal=True)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED_RUNS + 1)]
        events[0].record()
        for event in events[1:]:
            out = flash_attn_func(q, k, v, causal=True)
            event.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in zip(events, events[1:])]
        return cast(Tensor, out), sorted(times)[len(times) // 2] / 1e3
    with simulator.enabled(seed=seed):
        start = time.perf_counter()
        out = flash_attn_func(q, k, v, causal=True)
        return cast(Tensor, out), time.perf_counter() - start


def _print(console: Console, report: dict[str, Any]) -> None:
    instance, (_, tokens, heads, head_dim) = report["instance"], report["shape"]
    facts = Table(show_header=False, box=None)
    facts.add_row("text", f"{report['text']}, {tokens} bytes as tokens")
    facts.add_row(
        "layer", f"{heads} heads, {report['heads_kv']} KV heads, head_dim {head_dim}, bf16"
    )
    facts.add_row("ran on", report["device"])
    opcodes = ", ".join(f"{count} {opcode}" for opcode, count in instance["opcodes"].items())
    spills = instance["spill_stores"] + instance["spill_loads"]
    facts.add_row(
        "instance",
        f"{instance['name']}: {instance['registers']} registers, {spills} spills, "
        f"{instance['shared_memory_bytes']:,} bytes of shared memory; {opcodes}",
    )
    speed = f", {report['tflops']:.0f} TFLOP/s" if "tflops" in report else ""
    facts.add_row("time", f"{report['seconds']:.4g} s{speed}")
    console.print(facts)
    errors = Table("against FP64", "max error", "rms error")
    for name, key in (("hopper-attention", "error"), ("PyTorch, bf16", "pytorch_error")):
        errors.add_row(name, *(f"{report[key][kind]:.3e}" for kind in ("maximum", "rms")))
    console.print(errors)
    console.print(
        "[green]within twice PyTorch's error[/]"
        if report["passed"]
        else "[red]error exceeds twice PyTorch's[/]"
    )
