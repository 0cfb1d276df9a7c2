"""The instruction set, a module a family; importing it fills the tables of registry.py."""

from hopper_attention.simulator.instructions import (
    arithmetic,
    async_copy,
    bulk,
    control_flow,
    conversion,
    matrix,
    memory,
    packed,
    synchronisation,
    warp,
    wgmma,
)

__all__ = [
    "arithmetic",
    "async_copy",
    "bulk",
    "control_flow",
    "conversion",
    "matrix",
    "memory",
    "packed",
    "synchronisation",
    "warp",
    "wgmma",
]
