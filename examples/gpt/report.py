"""Reports of a run: a progress bar and a table for people, JSON lines for programs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Record = dict[str, Any]
"""One line of metrics; "event" says of what: start, step, attention, validation or end."""
LAST = 20
"""Steps that the final training loss is the mean of."""


class Report:
    """Collects a run's records; writes them to `path`; shows them if not `quiet`."""

    def __init__(self, path: Path | None, resumed: bool, quiet: bool):
        self.records: list[Record] = []
        self._latest: dict[str, Record] = {}
        self.console = Console(quiet=quiet, highlight=False)
        self._file: TextIO | None = None
        if path and not quiet:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a" if resumed else "w")
        self._progress: Progress | None = None

    @contextmanager
    def progress(self, done: int, steps: int) -> Iterator[None]:
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as self._progress:
            self._progress.add_task("", total=steps, completed=done)
            yield
        self._progress = None

    def add(self, event: str, **values: Any) -> None:
        record = {"event": event, **values}
        self.records.append(record)
        self._latest[event] = record
        if self._file:
            print(json.dumps(record), file=self._file, flush=True)
        if self._progress and event == "step":
            text, task = self._status(), self._progress.task_ids[0]
            self._progress.update(task, completed=values["step"], description=text)

    def of(self, event: str) -> list[Record]:
        return [record for record in self.records if record["event"] == event]

    def last(self, event: str, key: str) -> Any:
        """None if there was no such event."""
        return self._latest.get(event, {}).get(key)

    def _status(self) -> str:
        step, share = self._latest["step"], self.last("attention", "share")
        attention = "" if share is None else f"  attention {share:.0%}"
        return f"loss {step['loss']:.3f}  {step['tokens_per_second']:,.0f} tokens/s{attention}"

    def summary(self) -> Record:
        steps = self.of("step")
        return {
            "steps": len(steps),
            "tokens": sum(step["tokens"] for step in steps),
            "first_loss": steps[0]["loss"],
            "loss": statistics.fmean(step["loss"] for step in steps[-LAST:]),
            "validation_loss": self.last("validation", "loss"),
            "tokens_per_second": statistics.median(step["tokens_per_second"] for step in steps),
            "attention_share": self.last("attention", "share"),
            "seconds": sum(step["seconds"] for step in steps),
        }

    def print_summary(self, title: str) -> None:
        """Print the event `end`, which has the summary."""
        summary = self._latest["end"]
        table = Table(title=title, show_header=False)
        table.add_row("steps", f"{summary['steps']}, {summary['tokens']:,} tokens")
        table.add_row("first loss", f"{summary['first_loss']:.3f} nats a byte")
        steps = min(LAST, summary["steps"])
        table.add_row("training loss", f"{summary['loss']:.3f} (mean of the last {steps} steps)")
        if summary["validation_loss"] is not None:
            table.add_row("validation loss", f"{summary['validation_loss']:.3f}")
        table.add_row("speed", f"{summary['tokens_per_second']:,.0f} tokens/s (median step)")
        if summary["attention_share"] is not None:
            how = self.last("attention", "how")
            table.add_row("attention", f"{summary['attention_share']:.0%} of a step ({how})")
        if summary.get("peak_memory"):
            table.add_row("peak memory", f"{summary['peak_memory'] / 2**30:.1f} GiB")
        table.add_row("time", f"{summary['seconds']:.0f} s")
        self.console.print(table)

    def close(self) -> None:
        if self._file:
            self._file.close()
