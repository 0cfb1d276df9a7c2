"""Files that commands write."""

from __future__ import annotations

from pathlib import Path


def replace(path: Path, text: str) -> None:
    """At once: a command that is interrupted leaves the file as it was."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
