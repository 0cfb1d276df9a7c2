"""variants.toml: what each variant changes, what it should show, and the plan of a run."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hopper_attention.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE = Path(__file__).with_name("variants.toml")
ENDING = 0.3
"""Minutes that a step takes to start, and to end what it has begun."""
SEPARATOR = "__"
"""Between an instance's name and its variant's."""


@dataclass(frozen=True)
class Replacement:
    """A text that stands once in a file, and what stands there instead."""

    file: str
    old: str
    new: str

    def apply(self, tree: Path) -> None:
        """Raises UserError where the text is not what it was when this was written."""
        path = tree / self.file
        text = path.read_text() if path.exists() else ""
        if (found := text.count(self.old)) != 1:
            raise UserError(f"{self.file} has {found} times, not once: {self.old.strip()!r}")
        path.write_text(text.replace(self.old, self.new))


@dataclass(frozen=True)
class Variant:
    """Instances of a revision, changed: fields of their configuration, texts of its kernels."""

    name: str
    patterns: tuple[str, ...]
    """Patterns of the instances' names."""
    revision: str = "HEAD"
    config: Mapping[str, Any] = field(default_factory=dict)
    replacements: tuple[Replacement, ...] = ()
    timing_only: bool = False
    """Its results are wrong on purpose."""
    claim: str = ""
    """What a model says it will show."""
    decides: str = ""
    """What is done about which result."""

    @staticmethod
    def parse(text: str) -> Variant:
        """NAME of the table, or NAME=REVISION:PATTERN[,PATTERN...].  Raises UserError."""
        if (known := variants()) and text in known:
            return known[text]
        name, equals, rest = text.partition("=")
        revision, colon, patterns = rest.rpartition(":")
        if not (equals and colon and name.isidentifier() and SEPARATOR not in name and patterns):
            raise UserError(
                f"{text!r}: expected NAME=REVISION:INSTANCE[,INSTANCE...] or one of"
                f" {', '.join(known)}"
            )
        return Variant(name, tuple(patterns.split(",")), revision)


@dataclass(frozen=True)
class Step:
    """A command of the plan, stopped when its minutes are over."""

    minutes: float
    what: str
    command: str
    """Arguments of Python; {out} is the folder of results, {minutes} until nothing new begins."""

    def run(self, out: Path) -> str:
        """Return how it ended."""
        last = self.minutes - ENDING
        arguments = shlex.split(self.command.format(out=out, minutes=round(last, 2)))
        try:
            done = subprocess.run([sys.executable, *arguments], timeout=60 * self.minutes)
        except subprocess.TimeoutExpired:
            return f"stopped after {self.minutes:g} minutes"
        return "done" if done.returncode == 0 else f"failed: {done.returncode}"


def variants(table: Path = TABLE) -> dict[str, Variant]:
    """Return the variants by name, in order.  `on` another one: its changes come first."""
    found: dict[str, Variant] = {}
    for name, facts in _read(table)["variants"].items():
        base = found[facts.pop("on")] if "on" in facts else Variant(name, ())
        own = tuple(Replacement(**each) for each in facts.pop("replace", ()))
        found[name] = replace(
            base,
            name=name,
            patterns=tuple(facts.pop("instances")),
            replacements=base.replacements + own,
            config={**base.config, **facts.pop("config", {})},
            **facts,
        )
    return found


def plan(table: Path = TABLE) -> list[Step]:
    return [Step(**step) for step in _read(table)["plan"]]


def _read(table: Path) -> dict[str, Any]:
    return tomllib.loads(table.read_text())
