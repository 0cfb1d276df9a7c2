"""Clocks of one SM for one pass of a main loop by all consumer warpgroups: a lower bound by unit.

The largest binds if everything overlaps.  docs/profiling.md explains the rates; none of this
accounts for latency, the prologue, the epilogue or the tail of a grid.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hopper_attention.sass.disassembler import Instruction
from hopper_attention.sass.pipes import count_pipes

SMS = 132
"""Multiprocessors of an H100 or H200 SXM."""
CLOCK_GHZ = 1.755
SHARED_MEMORY_BYTES_PER_CLOCK = 128
TENSOR_CORE_COLUMNS_PER_CLOCK = 2
"""m64nNkK takes N / 2 clocks, whatever the type: K shrinks as the elements grow."""
CLOCKS_PER_INSTRUCTION = {"mufu": 8, "fma": 1, "alu": 2, "cvt": 2, "issue": 1}
"""Clocks of a warp instruction on its sub-core: 4, 32, 16, 16 lanes and one issue a clock."""
OPERAND_ROW_BYTES = 32
"""K elements of one row of A or B, in every type."""

_SHAPE = re.compile(r"[HQI]GMMA(?:\.SP)?\.(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True)
class Wgmma:
    """One warpgroup instruction: M x N x K, operand B, and A if not in registers, from shared."""

    m: int
    n: int
    k: int
    a_in_registers: bool

    @staticmethod
    def of(instruction: Instruction) -> Wgmma | None:
        """None for any other instruction: the matrix instructions of Ampere are not modelled."""
        shape = _SHAPE.match(instruction.opcode)
        if shape is None:
            return None
        # D, [A,] descriptor, ...: one descriptor register stands for A and B together.
        in_registers = not instruction.operands[1].startswith("gdesc")
        m, n, k = map(int, shape.groups())
        return Wgmma(m, n, k, in_registers)

    @property
    def flop(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def clocks(self) -> int:
        return self.n // TENSOR_CORE_COLUMNS_PER_CLOCK

    @property
    def b_bytes(self) -> int:
        return self.n * OPERAND_ROW_BYTES

    @property
    def a_bytes(self) -> int:
        return 0 if self.a_in_registers else self.m * OPERAND_ROW_BYTES


@dataclass(frozen=True)
class Prediction:
    clocks: dict[str, int]
    """Clocks by unit: tensor, mufu, fma, alu, cvt, issue, shared."""
    bound: str
    tflops: float
    """At the clock asked for, if the bound is reached all the time."""


def predict(code: Sequence[Instruction], warpgroups: int, clock_ghz: float) -> Prediction:
    """Predict the clocks of one pass of the loop by each of `warpgroups` consumers.

    Shared memory is read by every warpgroup's own operands and written once by TMA: operand B of a
    pass, as the key and value tiles are in forward.
    """
    wgmmas = [wgmma for wgmma in map(Wgmma.of, code) if wgmma]
    pipes = count_pipes(code)
    issued = {**pipes, "issue": len(code)}
    written = sum(w.b_bytes for w in wgmmas)
    read = warpgroups * sum(w.a_bytes + w.b_bytes for w in wgmmas)
    clocks = {
        "tensor": warpgroups * sum(w.clocks for w in wgmmas),
        **{unit: warpgroups * issued[unit] * rate for unit, rate in CLOCKS_PER_INSTRUCTION.items()},
        "shared": (read + written) // SHARED_MEMORY_BYTES_PER_CLOCK,
    }
    bound = max(clocks, key=lambda unit: clocks[unit])
    flop = warpgroups * sum(w.flop for w in wgmmas)
    tflops = flop / clocks[bound] * SMS * clock_ghz / 1e3
    return Prediction(clocks, bound, round(tflops, 1))
