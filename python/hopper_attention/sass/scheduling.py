"""ptxas' static schedule: how long each instruction holds up the ones behind it.

An instruction is 16 bytes.  Bits 105 to 108 are its stall count: the clocks until its warp may
issue the next one, as ptxas knows them for fixed latencies and for the cadence of a pipe.  Other
bits name scoreboards for what takes longer.  NVIDIA does not document the bits: Jia and others
found them out for Volta (arXiv 1804.06826), and later architectures have them in the same places.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from hopper_attention.sass.disassembler import INSTRUCTION_BYTES, Instruction
from hopper_attention.sass.model import CLOCKS_PER_INSTRUCTION
from hopper_attention.sass.pipes import pipe_of

STALL_BIT = 105
STALL_MASK = 0xF


@dataclass(frozen=True)
class Run:
    """Successive instructions of one pipe, which can issue no faster than the pipe takes them."""

    pipe: str
    instructions: int

    @property
    def clocks(self) -> int:
        return self.instructions * CLOCKS_PER_INSTRUCTION.get(self.pipe, 1)


def stall_counts(code: bytes) -> list[int]:
    """Return the stall count of every instruction of a kernel's machine code."""
    words = (code[i : i + INSTRUCTION_BYTES] for i in range(0, len(code), INSTRUCTION_BYTES))
    return [int.from_bytes(word, "little") >> STALL_BIT & STALL_MASK for word in words]


def longest_run(code: Sequence[Instruction]) -> Run:
    """Return the run that takes the most clocks; of several the first."""
    runs = itertools.groupby(code, key=pipe_of)
    return max(
        (Run(pipe, len(list(run))) for pipe, run in runs),
        key=lambda run: run.clocks,
        default=Run("none", 0),
    )
