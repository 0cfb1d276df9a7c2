"""One kernel instance: what the build compiles and the dispatcher chooses from.

Free of imports from the CuTe DSL: the list of instances can be read where that is not installed.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Instance:
    """A kernel class bound to one frozen configuration, compiled ahead of time into one object."""

    name: str
    """Name of the object, of the kernel in a profiler, and of the instance in Python."""
    family: str
    """The key of the dispatcher: "forward", ..."""
    kernel: str
    """Kernel class as "module:Class"; constructed with the configuration."""
    config: Any
    """Frozen dataclass of plain values; its fields are what the dispatcher matches."""
    architecture: str = "sm_90a"
    group: str = "core"
    """"core" is built by default; "full" adds every other group."""
    claims: tuple[str, ...] = ("HGMMA", "UTMALDG")
    """SASS opcodes that the compiled kernel must contain."""
    spills_because: str = ""
    """Why this instance may spill registers or serialise WGMMA; empty: it may not."""
