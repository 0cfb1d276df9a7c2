"""What the build compiled: `kernels/manifest.json`, installed beside the extensions."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hopper_attention import _simulator


@dataclass(frozen=True)
class CompiledInstance:
    """One compiled kernel instance, as the compile driver and ptxas reported it."""

    name: str
    family: str
    architecture: str
    config: dict[str, Any]
    registers: int
    """Per thread at kernel entry; `setmaxnreg` redistributes them between the roles."""
    stack: int
    spill_stores: int
    spill_loads: int
    shared_memory_bytes: int
    threads: int
    opcodes: dict[str, int]
    """SASS opcodes that the instance claims -> how many there are."""
    arguments: list[dict[str, Any]]


@functools.cache
def folder() -> Path:
    """In an editable install the extensions and these files lie apart from the Python sources."""
    return Path(_simulator.__file__).parent / "kernels"


@functools.cache
def instances() -> dict[str, CompiledInstance]:
    entries = json.loads((folder() / "manifest.json").read_text())
    names = [f.name for f in fields(CompiledInstance)]
    return {
        key: CompiledInstance(**{name: entry[name] for name in names})
        for key, entry in entries.items()
    }


def ptx_path(instance: str) -> Path:
    """The PTX that the simulator interprets."""
    return folder() / f"{instance}.ptx"
