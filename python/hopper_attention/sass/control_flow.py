"""Loops of a kernel: natural loops of its control flow graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import networkx as nx

from hopper_attention.sass.disassembler import INSTRUCTION_BYTES, Instruction

LEAVES = ("EXIT", "RET", "BRX", "JMX", "KILL", "BPT")
"""Nothing known follows them.  Calls, BSSY and BSYNC continue with the next instruction: ptxas puts
the point where a warp reconverges right behind its BSYNC."""


@dataclass(frozen=True)
class Loop:
    """The blocks that can reach a back edge without leaving through the header."""

    header: int
    latches: frozenset[int]
    """Blocks that end with a back edge."""
    blocks: frozenset[int]
    """All of the body, loops inside included; a block is named by its first instruction."""


class ControlFlow:
    """Basic blocks of a kernel, who dominates whom, and its loops in the order of their headers."""

    def __init__(self, code: Sequence[Instruction]):
        self.graph = _basic_blocks(code)
        # Releases of networkx differ in what they say of the entry.
        self.dominators = {**nx.immediate_dominators(self.graph, 0), 0: None}
        latches: dict[int, set[int]] = {}
        for tail, header in self.graph.edges:
            if tail in self.dominators and self.dominates(header, tail):
                latches.setdefault(header, set()).add(tail)
        self.loops = [
            Loop(header, frozenset(tails), frozenset(self._body(header, tails)))
            for header, tails in sorted(latches.items())
        ]

    def dominates(self, block: int, other: int) -> bool:
        """Say whether every path from the entry to `other` passes `block`."""
        above: int | None = other
        while above is not None and above != block:
            above = self.dominators.get(above)
        return above == block

    def instructions(self, loop: Loop) -> list[int]:
        """Indices, ascending, of all instructions in the body."""
        return self._instructions(loop.blocks)

    def pass_of(self, loop: Loop) -> list[int]:
        """Indices of what one pass issues when no wait has to be repeated.

        Left out are inner loops that a pass can go around, with what only they lead to: ptxas moves
        the repetitions of a failed mbarrier wait there, behind the end of the kernel.
        """
        avoidable = [
            inner.header
            for inner in self.loops
            if inner.header in loop.blocks - {loop.header}
            and not any(self.dominates(inner.header, latch) for latch in loop.latches)
        ]
        return self._instructions(
            block
            for block in loop.blocks
            if not any(self.dominates(header, block) for header in avoidable)
        )

    def skippable_of(self, loop: Loop) -> list[int]:
        """Those of `pass_of` that a branch goes around: not every pass issues them."""
        skippable = {
            block
            for block in loop.blocks
            if not any(self.dominates(block, latch) for latch in loop.latches)
        }
        return sorted(set(self._instructions(skippable)) & set(self.pass_of(loop)))

    def _instructions(self, blocks: Iterable[int]) -> list[int]:
        return [i for block in sorted(blocks) for i in self.graph.nodes[block]["range"]]

    def _body(self, header: int, latches: set[int]) -> set[int]:
        found, pending = {header}, list(latches)
        while pending:
            block = pending.pop()
            if block not in found:
                found.add(block)
                pending.extend(self.graph.predecessors(block))
        return found


def _basic_blocks(code: Sequence[Instruction]) -> nx.DiGraph:
    """Nodes: indices of first instructions, each with the `range` of its block."""
    targets = [_target(instruction) for instruction in code]
    starts = {0, *(target for target in targets if target is not None)}
    starts |= {i + 1 for i, target in enumerate(targets) if target is not None or _leaves(code[i])}
    first = sorted(start for start in starts if start < len(code))
    graph = nx.DiGraph()
    for start, end in zip(first, [*first[1:], len(code)]):
        graph.add_node(start, range=range(start, end))
        last, target = code[end - 1], targets[end - 1]
        if target is not None:
            graph.add_edge(start, target)
        if end < len(code) and not _is_unconditional(last, target):
            graph.add_edge(start, end)
    return graph


def _target(instruction: Instruction) -> int | None:
    """Index of the instruction that a branch leads to.  `BRA.U UP0, 0x1c0`: the last operand."""
    if instruction.name != "BRA":
        return None
    return int(instruction.operands[-1], 16) // INSTRUCTION_BYTES


def _leaves(instruction: Instruction) -> bool:
    return instruction.name in LEAVES


def _is_unconditional(instruction: Instruction, target: int | None) -> bool:
    if instruction.predicate:
        return False
    return _leaves(instruction) or (target is not None and len(instruction.operands) == 1)
