"""Train a byte-level GPT on real text, with one of three implementations of attention.

    python examples/train_gpt.py --size tiny --attention reference         # a CPU, two minutes
    python examples/train_gpt.py --size 350m --compile                     # one H100
    torchrun --nproc-per-node 8 examples/train_gpt.py --size 350m --compile --fsdp

Read on in gpt/model.py (the network), gpt/data.py (packed batches) and gpt/attention.py.
"""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from gpt import checkpoint, optimizer, parallel, plot
from gpt.attention import Kind, SdpaBackend, choose, describe
from gpt.data import Batch, Corpus, TokenStream, read_documents, split
from gpt.model import GPT, SIZES, GPTConfig
from gpt.report import Report
from gpt.stopwatch import TimedAttention
from hopper_attention.dispatch import target
from hopper_attention.errors import UserError

MAX_GRADIENT_NORM = 1.0
WEIGHT_DECAY = 0.1
Size = Enum("Size", {name: name for name in SIZES}, type=str)  # type: ignore[misc]


@dataclass(frozen=True)
class Defaults:
    """Defaults that fit a size."""

    tokens: int
    lr: float


DEFAULTS = {
    "tiny": Defaults(tokens=4096, lr=1e-3),
    "small": Defaults(tokens=16384, lr=1e-3),
    "125m": Defaults(tokens=32768, lr=6e-4),
    "350m": Defaults(tokens=32768, lr=3e-4),
}


@dataclass(frozen=True)
class Settings:
    model: GPTConfig
    steps: int
    tokens: int
    """Tokens of each rank's batch."""
    lr: float
    attention: Kind = Kind.HOPPER
    sdpa_backend: SdpaBackend = SdpaBackend.AUTO
    data: tuple[Path, ...] = ()
    full_context: bool = False
    accumulate: int = 1
    warmup: int = 20
    seed: int = 0
    nudge: float = 0.0
    device: str = "cpu"
    compile: bool = False
    fsdp: bool = False
    recompute: bool = False
    checkpoint: Path | None = None
    checkpoint_every: int = 0
    resume: bool = False
    stop_after: int | None = None
    validate_every: int = 50
    validation_batches: int = 4
    sample_every: int = 50
    metrics: Path | None = None

    def __post_init__(self) -> None:
        if self.full_context and self.tokens % self.model.context:
            raise UserError(
                f"--full-context: {self.tokens} tokens are not a multiple of the context, "
                f"{self.model.context}"
            )
        if self.warmup >= self.steps:
            raise UserError(f"--warmup {self.warmup} must be less than --steps {self.steps}")
        if self.sdpa_backend is not SdpaBackend.AUTO:
            if self.attention is not Kind.SDPA or self.device == "cpu":
                raise UserError("--sdpa-backend is for --attention sdpa on a GPU")
        if self.checkpoint is None and (self.resume or self.checkpoint_every):
            flag = "--resume" if self.resume else "--checkpoint-every"
            raise UserError(f"{flag} needs --checkpoint DIR")


class Trainer:
    """A model, its data and its optimizer on one rank."""

    def __init__(self, settings: Settings, place: parallel.Ranks):
        self.settings, self.place = settings, place
        self.training, self.validation = streams(settings)
        torch.manual_seed(settings.seed)  # equal parameters on all ranks
        self.model = GPT(settings.model, settings.recompute)
        nudge(self.model, settings.nudge)
        self.model.to(place.device)
        if settings.compile:
            for block in self.model.blocks:
                block.compile()
        if settings.fsdp:
            parallel.shard(self.model, place)
        self.optimizer = optimizer.adamw(self.model, settings.lr, WEIGHT_DECAY)
        self.rate = optimizer.cosine(settings.steps, settings.warmup)
        self.attend = TimedAttention(
            choose(settings.attention, settings.sdpa_backend), place.device
        )
        self.done = 0
        self.position = 0
        """Tokens that all ranks together have taken from the stream."""

    def step(self) -> tuple[float, float]:
        """(loss, norm of the gradient) of one update."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * self.rate(self.done)
        loss = self.gradients(self.position)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        self.position += self.tokens_per_step
        if hasattr(norm, "full_tensor"):  # of shards
            norm = norm.full_tensor()
        return self.place.mean(loss), norm.item()  # where a step waits for the GPU

    def gradients(self, position: int) -> Tensor:
        """Mean loss of this rank's batches; leaves their mean gradient."""
        count = self.settings.accumulate
        total = torch.zeros((), device=self.place.device)
        for index in range(count):
            if self.settings.fsdp:  # ranks exchange gradients once a step
                self.model.set_requires_gradient_sync(index == count - 1)  # type: ignore[operator]
            loss = self.loss(self.batch(self.training, position, index)) / count
            loss.backward()
            total += loss.detach()
        return total

    def batch(self, stream: TokenStream, position: int, index: int) -> Batch:
        """This rank's `index`-th batch from there on: ranks take turns."""
        turn = index * self.place.world + self.place.rank
        return stream.batch(position + turn * self.settings.tokens).to(self.place.device)

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy, nats per byte."""
        with torch.autocast(self.place.device.type, dtype=torch.bfloat16):
            logits = self.model(batch.ids, batch.packing, self.attend)
        return F.cross_entropy(logits, batch.targets)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss of always the same batches of the held-out documents."""
        self.model.eval()
        count = self.settings.validation_batches
        losses = [self.loss(self.batch(self.validation, 0, index)) for index in range(count)]
        self.model.train()
        return self.place.mean(torch.stack(losses).mean())

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Times attention in the step inside; in an uncompiled extra pass if steps are compiled."""
        if not self.settings.compile:
            with self.attend.timing():
                yield
            return
        yield
        with torch.compiler.set_stance("force_eager"), self.attend.timing():
            self.gradients(self.position)
        self.optimizer.zero_grad()

    @property
    def tokens_per_step(self) -> int:
        return self.settings.tokens * self.settings.accumulate * self.place.world

    def save(self, folder: Path) -> Path:
        progress = checkpoint.Progress(
            self.done, self.position, self.training.fingerprint, self.settings.model
        )
        return checkpoint.save(folder, self.model, self.optimizer, progress)

    def resume(self, folder: Path) -> None:
        """Raises UserError if the checkpoint does not continue into these settings."""
        path = checkpoint.latest(folder)
        progress = checkpoint.read_progress(path)
        if progress.config != self.settings.model:
            raise UserError(f"{path} is of another model: {progress.config}")
        if progress.stream != self.training.fingerprint:
            raise UserError(f"{path} was trained on other data, or with another seed or packing")
        if progress.step >= self.settings.steps:
            raise UserError(f"{path} has all of its {self.settings.steps} steps; give more --steps")
        checkpoint.restore(path, self.model, self.optimizer)
        self.done, self.position = progress.step, progress.position


@torch.no_grad()
def nudge(model: GPT, share: float) -> None:
    """Moves every parameter by about this share of it.

    Two runs with the same attention, one of them nudged by 1e-7, show how far a difference in
    rounding alone drives losses apart: two implementations of attention should do no worse.
    """
    for parameter in model.parameters() if share else ():
        parameter.mul_(1 + share * torch.randn_like(parameter))


def streams(settings: Settings) -> tuple[TokenStream, TokenStream]:
    """(training, validation)."""
    documents = split(read_documents(settings.data), settings.seed)
    names = ("training text", "validation text")
    training, validation = (
        TokenStream(
            Corpus.of(name, part),
            tokens=settings.tokens,
            context=settings.model.context,
            seed=settings.seed,
            full_context=settings.full_context,
            fixed_shapes=settings.compile,
        )
        for name, part in zip(names, documents)
    )
    return training, validation


def train(settings: Settings) -> Report:
    """All steps, or those until `stop_after`."""
    with parallel.ranks(torch.device(settings.device), settings.fsdp) as place:
        trainer = Trainer(settings, place)
        if settings.resume and settings.checkpoint:
            trainer.resume(settings.checkpoint)
        report = Report(settings.metrics, settings.resume, quiet=not place.first)
        announce(report, trainer)
        last = min(settings.steps, settings.stop_after or settings.steps)
        with report.progress(trainer.done, last):
            while trainer.done < last:
                one_step(trainer, report, last)
        if place.first:
            finish(report, trainer)
        return report


def one_step(trainer: Trainer, report: Report, last: int) -> None:
    """A training step, and what is due after it."""
    settings = trainer.settings
    sampled = is_due(trainer.done - 1, settings.sample_every)  # the second, not the slow first
    start = time.perf_counter()
    if sampled:
        with trainer.sampling():
            loss, norm = trainer.step()
            seconds = time.perf_counter() - start
        how = "in an uncompiled pass beside it" if settings.compile else "within a step"
        share = trainer.attend.seconds / seconds
        attention = {"seconds": trainer.attend.seconds, "share": share, "how": f"timed {how}"}
        report.add("attention", step=trainer.done, **attention)
    else:
        loss, norm = trainer.step()
        seconds = time.perf_counter() - start
    if not math.isfinite(loss):
        raise UserError(f"the loss of step {trainer.done} is {loss}; try a lower --lr")
    tokens = trainer.tokens_per_step
    report.add(
        "step", step=trainer.done, loss=loss, lr=trainer.optimizer.param_groups[0]["lr"],
        gradient_norm=norm, tokens=tokens, seconds=seconds, tokens_per_second=tokens / seconds,
    )  # fmt: skip
    if is_due(trainer.done, settings.validate_every) or trainer.done == last:
        report.add("validation", step=trainer.done, loss=trainer.validate())
    if settings.checkpoint:
        if is_due(trainer.done, settings.checkpoint_every) or trainer.done == last:
            report.add("checkpoint", path=str(trainer.save(settings.checkpoint)))


def is_due(step: int, every: int) -> bool:
    """`every` 0: never."""
    return every > 0 and step % every == 0


def announce(report: Report, trainer: Trainer) -> None:
    settings, place = trainer.settings, trainer.place
    parameters = sum(p.numel() for p in trainer.model.parameters())
    attention = describe(
        settings.attention, settings.sdpa_backend, place.device, settings.full_context
    )
    name = device_name(place.device)
    report.add(
        "start", attention=settings.attention.value, runs=attention, device=name,
        world=place.world, parameters=parameters, torch=torch.__version__, step=trainer.done,
        settings={key: str(value) for key, value in asdict(settings).items()},
    )  # fmt: skip
    say = report.console.print
    say(f"model      {parameters / 1e6:.1f} M parameters, {settings.model}")
    say(f"attention  {attention}")
    say(f"device     {place.world} x {name}, bf16 autocast")
    text = trainer.training
    say(
        f"text       {len(text.corpus):,} bytes in {len(text.corpus.lengths)} documents to train "
        f"on, {len(trainer.validation.corpus):,} to validate"
    )
    if trainer.done:
        say(f"resumed    after step {trainer.done}, {trainer.position:,} tokens")


def finish(report: Report, trainer: Trainer) -> None:
    summary = report.summary()
    if trainer.place.device.type == "cuda":
        summary["peak_memory"] = torch.cuda.max_memory_allocated(trainer.place.device)
    report.add("end", **summary)
    report.print_summary(f"attention: {trainer.settings.attention.value}")
    report.close()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


def choose_device(attention: Kind) -> str:
    """The GPU if there is one that the kernels run on, or if they are not asked for."""
    if not torch.cuda.is_available():
        return "cpu"
    if attention is Kind.HOPPER:
        try:
            target.check_gpu(torch.device("cuda", torch.cuda.current_device()))
        except NotImplementedError as reason:
            raise UserError(f"{reason}; or give --device cpu, or --attention sdpa") from None
    return "cuda"


def draw(path: Path, report: Report, metrics: Path | None, others: list[Path]) -> None:
    """This run's curve over those of others, whatever was before a resume included."""
    ours = plot.Curve.read(metrics) if metrics else plot.Curve.of(report.records)
    curves = [*(plot.Curve.read(other) for other in others), ours]
    plot.write(path, curves)
    report.console.print(f"wrote {path}")
    for curve in curves[:-1]:
        difference = plot.max_difference(curve, ours)
        report.console.print(
            f"{ours.label} against {curve.label}: at most {difference:.1e} between losses of a step"
        )


def main(
    size: Annotated[Size, typer.Option(help="Of the model.")] = Size.tiny,  # type: ignore[attr-defined]
    attention: Annotated[Kind, typer.Option(help="Which implementation.")] = Kind.HOPPER,
    sdpa_backend: Annotated[
        SdpaBackend, typer.Option(help="Of --attention sdpa, on a GPU.")
    ] = SdpaBackend.AUTO,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A file is a document; repeat for more. Default: CPython's help topics.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 200,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="In a batch of a rank. Default: by size.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Longest sequence. Default: by size.")
    ] = None,
    full_context: Annotated[
        bool, typer.Option(help="Sequences of exactly --context instead of documents.")
    ] = False,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of a rank in a step.")] = 1,
    lr: Annotated[float | None, typer.Option(min=0, help="Peak. Default: by size.")] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Steps to the peak.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of parameters and data.")] = 0,
    nudge: Annotated[
        float,
        typer.Option(min=0, help="Share by which initial parameters are moved, as a control."),
    ] = 0.0,
    untied: Annotated[bool, typer.Option(help="An output layer of its own.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: a GPU if any.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the blocks.")] = False,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Shard over torchrun's ranks.")] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Keep no activations within blocks.")
    ] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder to write them to.")] = None,
    checkpoint_every: Annotated[
        int, typer.Option(min=0, help="Steps; there is one at the end anyhow.")
    ] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last in --checkpoint.")
    ] = False,
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="Step to stop at, to be resumed; --steps stays.")
    ] = None,
    validate_every: Annotated[int, typer.Option(min=0, help="Steps; 0: at the end only.")] = 50,
    sample_every: Annotated[
        int, typer.Option(min=0, help="Steps between timings of attention; 0: none.")
    ] = 50,
    metrics: Annotated[
        Path | None, typer.Option("--json", help="File for a JSON line of every step.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="PNG file for the loss curve.")
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Metrics of other runs, for --plot."),
    ] = None,
) -> None:
    """Train a byte-level GPT on real text."""
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device}: choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU")
    if compare and not plot_file:
        raise UserError("--compare needs --plot FILE")
    model = replace(SIZES[size.value], tied=not untied)
    model = replace(model, context=context or model.context)
    defaults = DEFAULTS[size.value]
    lr = defaults.lr if lr is None else lr
    settings = Settings(
        model=model, steps=steps, tokens=tokens or defaults.tokens, lr=lr,
        attention=attention, sdpa_backend=sdpa_backend, data=tuple(data or ()),
        full_context=full_context, accumulate=accumulate, warmup=min(warmup, steps // 2),
        seed=seed, nudge=nudge, device=device or choose_device(attention), compile=compile,
        fsdp=fsdp, recompute=recompute, checkpoint=checkpoint, checkpoint_every=checkpoint_every,
        resume=resume, stop_after=stop_after, validate_every=validate_every,
        sample_every=sample_every, metrics=metrics,
    )  # fmt: skip
    report = train(settings)
    if plot_file and not report.console.quiet:
        draw(plot_file, report, metrics, compare or [])


if __name__ == "__main__":
    try:
        typer.run(main)
    except (UserError, NotImplementedError) as refusal:
        typer.echo(f"error: {refusal}", err=True)
        sys.exit(2)
