"""The instances that the build compiled: `kernels/manifest.json`, beside the extensions.

`listed` is what a build can compile, of which this one may have only a part.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hopper_attention import _simulator
from hopper_attention.cute_kernels.ampere.instances import INSTANCES as AMPERE
from hopper_attention.cute_kernels.instance import Instance
from hopper_attention.cute_kernels.quantization.instances import INSTANCES as QUANTIZATION
from hopper_attention.hopper.instances import INSTANCES as HOPPER


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


@functools.cache
def listed() -> dict[str, Instance]:
    """Every instance of the library by its name, compiled or not."""
    return {instance.name: instance for instance in (*HOPPER, *QUANTIZATION, *AMPERE)}


def config_of(name: str) -> dict[str, Any]:
    """The configuration of an instance, as this build compiled it, else as it is listed."""
    compiled = instances().get(name)
    return asdict(listed()[name].config) if compiled is None else compiled.config


def selection_with(name: str) -> str:
    """The least value of HOPPER_ATTENTION_INSTANCES that keeps this build's and adds `name`.

    It is made of whole groups, in the order of the lists: "core,fp8".
    """
    wanted = {listed()[known].group for known in (*instances(), name) if known in listed()}
    return ",".join(dict.fromkeys(i.group for i in listed().values() if i.group in wanted))


def ptx_path(instance: str) -> Path:
    """The PTX that the simulator interprets."""
    return folder() / f"{instance}.ptx"


COUNTER, MAX_BLOCKS = "tile_counter", "max_blocks"
"""Last arguments of kernels whose blocks do tile after tile: from a counter, or every n-th."""


@functools.cache
def arguments(instance: str) -> tuple[tuple[str, bool], ...]:
    """Return the instance's arguments in order: the name, and whether it is a tensor.

    An address counts as a scalar.  Arguments that the launch adds are left out.
    """
    found = instances()[instance].arguments
    named = ((argument["name"], argument["kind"] == "tensor") for argument in found)
    return tuple((name, tensor) for name, tensor in named if name not in (COUNTER, MAX_BLOCKS))


@functools.cache
def is_persistent(instance: str) -> bool:
    """Say whether blocks take tile after tile from a counter."""
    return _has(instance, COUNTER)


@functools.cache
def takes_limit(instance: str) -> bool:
    """Say whether there may be fewer blocks than tiles."""
    return _has(instance, MAX_BLOCKS)


def _has(instance: str, name: str) -> bool:
    return any(argument["name"] == name for argument in instances()[instance].arguments)
